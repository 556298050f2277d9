# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.attention.flex_attention import *
from torch.nn.attention.flex_attention import (
    _DEFAULT_SPARSE_BLOCK_SIZE as _DEFAULT_SPARSE_BLOCK_SIZE,
)
from torch.nn.attention.flex_attention import _EMPTY_CLOSURE_SPEC as _EMPTY_CLOSURE_SPEC
from torch.nn.attention.flex_attention import _EXTRACTED_LEAF as _EXTRACTED_LEAF
from torch.nn.attention.flex_attention import (
    _FLEX_ATTENTION_DISABLE_COMPILE_DEBUG as _FLEX_ATTENTION_DISABLE_COMPILE_DEBUG,
)
from torch.nn.attention.flex_attention import _LARGE_SPARSE_BLOCK_SIZE as _LARGE_SPARSE_BLOCK_SIZE
from torch.nn.attention.flex_attention import _R as _R
from torch.nn.attention.flex_attention import _WARNINGS_SHOWN as _WARNINGS_SHOWN
from torch.nn.attention.flex_attention import (
    _adjust_num_blocks_and_indices as _adjust_num_blocks_and_indices,
)
from torch.nn.attention.flex_attention import _apply_kernel_options as _apply_kernel_options
from torch.nn.attention.flex_attention import _Backend as _Backend
from torch.nn.attention.flex_attention import _broadcast_to_dim as _broadcast_to_dim
from torch.nn.attention.flex_attention import _callable_entry_eq as _callable_entry_eq
from torch.nn.attention.flex_attention import _callable_entry_hash as _callable_entry_hash
from torch.nn.attention.flex_attention import _CallableLeaf as _CallableLeaf
from torch.nn.attention.flex_attention import _CallableMetadata as _CallableMetadata
from torch.nn.attention.flex_attention import (
    _compute_dq_write_order_from_block_mask as _compute_dq_write_order_from_block_mask,
)
from torch.nn.attention.flex_attention import (
    _convert_block_mask_to_mask as _convert_block_mask_to_mask,
)
from torch.nn.attention.flex_attention import (
    _convert_mask_to_block_mask as _convert_mask_to_block_mask,
)
from torch.nn.attention.flex_attention import _create_empty_block_mask as _create_empty_block_mask
from torch.nn.attention.flex_attention import (
    _create_sparse_block_from_block_mask as _create_sparse_block_from_block_mask,
)
from torch.nn.attention.flex_attention import _dense_to_ordered as _dense_to_ordered
from torch.nn.attention.flex_attention import _enforce_mem_layouts as _enforce_mem_layouts
from torch.nn.attention.flex_attention import _extract_callable_leaves as _extract_callable_leaves
from torch.nn.attention.flex_attention import _extract_callable_pytree as _extract_callable_pytree
from torch.nn.attention.flex_attention import _ExtractedLeaf as _ExtractedLeaf
from torch.nn.attention.flex_attention import _get_mod_type as _get_mod_type
from torch.nn.attention.flex_attention import _identity as _identity
from torch.nn.attention.flex_attention import (
    _KernelOptionsWithInternals as _KernelOptionsWithInternals,
)
from torch.nn.attention.flex_attention import _mask_mod_signature as _mask_mod_signature
from torch.nn.attention.flex_attention import _MaskModWrapper as _MaskModWrapper
from torch.nn.attention.flex_attention import _ModificationType as _ModificationType
from torch.nn.attention.flex_attention import _ordered_to_dense as _ordered_to_dense
from torch.nn.attention.flex_attention import _PlainFunction as _PlainFunction
from torch.nn.attention.flex_attention import _reconstruct_closure_fn as _reconstruct_closure_fn
from torch.nn.attention.flex_attention import _round_up_to_multiple as _round_up_to_multiple
from torch.nn.attention.flex_attention import _score_mod_signature as _score_mod_signature
from torch.nn.attention.flex_attention import _sliced_mask_mod_error as _sliced_mask_mod_error
from torch.nn.attention.flex_attention import _StrippedClosure as _StrippedClosure
from torch.nn.attention.flex_attention import _StrippedPartial as _StrippedPartial
from torch.nn.attention.flex_attention import _transpose_ordered as _transpose_ordered
from torch.nn.attention.flex_attention import _validate_device as _validate_device
from torch.nn.attention.flex_attention import _validate_embed_dim as _validate_embed_dim
from torch.nn.attention.flex_attention import (
    _validate_no_nested_tensors as _validate_no_nested_tensors,
)
from torch.nn.attention.flex_attention import _validate_sdpa_input as _validate_sdpa_input
from torch.nn.attention.flex_attention import _vmap_for_bhqkv as _vmap_for_bhqkv
from torch.nn.attention.flex_attention import _warn_once as _warn_once
