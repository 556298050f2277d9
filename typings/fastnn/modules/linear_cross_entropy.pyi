# Written by `python -m tools.stubs`.
# ruff: noqa: F403, E501  (whatever stock exports, by whatever name)

from torch.nn.modules.linear_cross_entropy import *
from torch.nn.modules.linear_cross_entropy import _NUM_OP_INPUTS as _NUM_OP_INPUTS
from torch.nn.modules.linear_cross_entropy import _ChunkContext as _ChunkContext
from torch.nn.modules.linear_cross_entropy import _ChunkViews as _ChunkViews
from torch.nn.modules.linear_cross_entropy import (
    _linear_cross_entropy_batch_chunked as _linear_cross_entropy_batch_chunked,
)
from torch.nn.modules.linear_cross_entropy import (
    _linear_cross_entropy_batch_chunked_accumulator as _linear_cross_entropy_batch_chunked_accumulator,
)
from torch.nn.modules.linear_cross_entropy import (
    _linear_cross_entropy_batch_chunked_backward as _linear_cross_entropy_batch_chunked_backward,
)
from torch.nn.modules.linear_cross_entropy import (
    _linear_cross_entropy_batch_chunked_no_reduction as _linear_cross_entropy_batch_chunked_no_reduction,
)
from torch.nn.modules.linear_cross_entropy import (
    _linear_cross_entropy_batch_chunked_no_reduction_backward as _linear_cross_entropy_batch_chunked_no_reduction_backward,
)
from torch.nn.modules.linear_cross_entropy import (
    _linear_cross_entropy_batch_chunked_no_reduction_setup_context as _linear_cross_entropy_batch_chunked_no_reduction_setup_context,
)
from torch.nn.modules.linear_cross_entropy import (
    _linear_cross_entropy_batch_chunked_setup_context as _linear_cross_entropy_batch_chunked_setup_context,
)
from torch.nn.modules.linear_cross_entropy import _make_empty as _make_empty
from torch.nn.modules.linear_cross_entropy import _make_zeros as _make_zeros
from torch.nn.modules.linear_cross_entropy import _vmap as _vmap
from torch.nn.modules.linear_cross_entropy import _vmap_no_reduction as _vmap_no_reduction
