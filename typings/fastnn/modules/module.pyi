# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.module import *
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX as _EXTRA_STATE_KEY_SUFFIX
from torch.nn.modules.module import T as T
from torch.nn.modules.module import _addindent as _addindent
from torch.nn.modules.module import _forward_unimplemented as _forward_unimplemented
from torch.nn.modules.module import _global_backward_hooks as _global_backward_hooks
from torch.nn.modules.module import _global_backward_pre_hooks as _global_backward_pre_hooks
from torch.nn.modules.module import (
    _global_buffer_registration_hooks as _global_buffer_registration_hooks,
)
from torch.nn.modules.module import _global_forward_hooks as _global_forward_hooks
from torch.nn.modules.module import (
    _global_forward_hooks_always_called as _global_forward_hooks_always_called,
)
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs as _global_forward_hooks_with_kwargs,
)
from torch.nn.modules.module import _global_forward_pre_hooks as _global_forward_pre_hooks
from torch.nn.modules.module import _global_is_full_backward_hook as _global_is_full_backward_hook
from torch.nn.modules.module import (
    _global_module_registration_hooks as _global_module_registration_hooks,
)
from torch.nn.modules.module import (
    _global_parameter_registration_hooks as _global_parameter_registration_hooks,
)
from torch.nn.modules.module import _grad_t as _grad_t
from torch.nn.modules.module import _has_any_global_hook as _has_any_global_hook
from torch.nn.modules.module import _IncompatibleKeys as _IncompatibleKeys
from torch.nn.modules.module import _WrappedHook as _WrappedHook
