"""The record of one accelerated function, and the one place that picks kernel or PyTorch.

An op file declares a function under its name and signature in `torch.nn.functional`. `@op` turns it
into a plain function, which calls PyTorch while no kernel can run, and otherwise calls `dispatch`.
Op files can import from here everything that they need of the layers below.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastnn import _front, _gate, _mode, _shards
from fastnn._batches import is_batch
from fastnn._function import Function as Function
from fastnn._function import run as run
from fastnn._function import second_order as second_order
from fastnn._gate import Policy
from fastnn._gate import Work as Work
from fastnn._gate import always as always
from fastnn._gate import in_backward as in_backward
from fastnn._graph import launcher as launcher
from fastnn._graph import traced_for_fastnn
from fastnn._mode import BackendError, Code, Invalid, Stock
from fastnn._plan import active, questions
from fastnn._plan import impossible as impossible
from fastnn._plan import reads_setting as reads_setting
from fastnn._record import Plans
from fastnn._scalars import fits_64_bits
from fastnn._scalars import rounded as rounded
from fastnn._strides import is_dense as is_dense
from fastnn._strides import make_dense, not_strided

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# The devices whose tensors kernels take. With the interpreter, kernels also run on the CPU.
kernel_devices = {"cuda", "cpu"} if _mode.INTERPRET else {"cuda"}


# ---- The record ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Op:
    """What fastnn knows about one function. Everything else is derived from these fields."""

    name: str
    fused: Callable  # PyTorch's signature; returns the result, or Stock(code, why)
    stock: Callable  # the fallback, and the reference of every check
    dtypes: tuple[torch.dtype, ...] = FLOATS
    integers: tuple[torch.dtype, ...] = ()  # the dtypes of index arguments, if any
    # tensors that `fused` takes with any strides; all others are made dense
    strided: tuple[str, ...] = ()
    # arguments that may be on the CPU while the others are on a GPU, because the host reads them
    on_host: tuple[str, ...] = ()
    autocast: Literal["fp32", "lower", None] = None  # the autocast list of CUDA that has this op
    autocast_cpu: Literal["fp32", "lower", None] = None
    lowered: tuple[str, ...] = ()  # the arguments that autocast to 16 bits casts; default: all
    compiled: Literal["stock", "opaque"] = "stock"  # what runs it under torch.compile
    opaque: bool = False  # whether its launches are registered, so that a graph can hold them
    policy: Policy | None = None  # how much work a call is; default: elements of the first argument
    # source of a bound on the size that the policy gives; default: elements of the first argument
    at_most: str | None = None
    variants: tuple[str, ...] = ("",)  # the variants that the policy may name
    settings: Callable[[], Any] | None = None  # the PyTorch settings on which a call depends
    # whether PyTorch raises for a call on a GPU, if deterministic algorithms are required
    alerts: _gate.Alerts | None = None
    split: _shards.Rule | None = None  # the ways to split a call among processes
    source: str = ""
    takes_variant: bool = field(init=False)  # whether `fused` is told which variant to run
    dense_at: tuple[int, ...] = field(init=False)  # positions of arguments that are made dense
    dense_names: frozenset[str] = field(init=False)
    floor: _gate.Floor = field(init=False, default_factory=_gate.Floor)
    names: tuple[str, ...] = field(init=False)  # of the public function's parameters
    flags: frozenset[str] = field(init=False)  # parameters whose arguments PyTorch wants as bool
    flags_at: tuple[int, ...] = field(init=False)
    keyword_only: frozenset[str] = field(init=False)
    keyed_by: int = field(init=False)  # the parameter by whose shape plans are found
    plans: Plans = field(init=False)

    def __post_init__(self):
        declared = inspect.signature(self.fused).parameters
        at, dense = not_strided(self.fused, self.strided)
        parameters = _front.parameters(self.fused)
        names = tuple([p.name for p in parameters])
        # `inplace` is read by Python, which takes any object for true or false
        flags = [p.name for p in parameters if type(p.default) is bool and p.name != "inplace"]
        for name, value in (
            ("takes_variant", "variant" in declared),
            ("dense_at", at),
            ("dense_names", dense),
            ("names", names),
            ("flags", frozenset(flags)),
            ("flags_at", tuple(map(names.index, flags))),
            ("keyword_only", frozenset([p.name for p in parameters if p.kind is p.KEYWORD_ONLY])),
            ("keyed_by", names.index(_front.below(self, names[0]).tensors[0])),
        ):
            object.__setattr__(self, name, value)
        if self.alerts is not None:
            object.__setattr__(self, "settings", _WithDeterminism(self.settings))
        object.__setattr__(self, "plans", Plans(self))

    def __repr__(self):
        return f"Op({self.name})"

    def find_floor(self) -> None:
        """Make the floor known, if it is not."""
        if not self.floor.known and _gate.answers():
            self.floor.set(_gate.floor(self.name, self.variants))

    def autocast_list(self, device_type: str):
        return self.autocast if device_type == "cuda" else self.autocast_cpu


class _WithDeterminism:
    """These settings, and whether determinism is required."""

    def __init__(self, settings: Callable[[], Any] | None):
        self._settings = settings
        self.questions = (
            *questions(settings),
            torch._C._get_deterministic_algorithms,
            torch._C._get_deterministic_algorithms_warn_only,
        )

    def __call__(self) -> tuple:
        return self._settings and self._settings(), _gate.only_deterministic()


def op(*, stock: Callable, **fields) -> Callable[[Callable], Callable]:
    """Declare a fused function under its name and signature in `torch.nn.functional`.

    The decorator returns a plain function of the same signature that dispatches. Its attribute `op`
    is the `Op`. Users do not see two keyword-only arguments, which dispatch passes to the fused
    function: `out_dtype`, the dtype of the result under autocast to float32, and `variant`, the one
    of `variants` that the policy named in `auto` ("" if a kernel is forced).
    """

    def declare(fused: Callable) -> Callable:
        record = Op(name=fused.__name__, fused=fused, stock=stock, **fields)
        return _front.front(record, dispatch)

    return declare


# ---- What no kernel takes -----------------------------------------------------------------------

_SCALARS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.Size, FunctionType))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_dtype(op: Op, dtype: torch.dtype) -> Stock | None:
    if dtype in op.dtypes or dtype in op.integers:
        return None
    supported = ", ".join(map(_short, op.dtypes))
    return Stock("dtype", f"no kernel supports {_short(dtype)} (supported: {supported})")


def _refuse_tensor(op: Op, t: Tensor) -> Stock | None:
    if t.device.type not in kernel_devices:
        supported = ", ".join(sorted(kernel_devices))
        return Stock("device", f"a tensor is on {t.device.type}, and kernels run on {supported}")
    if t.layout is not torch.strided or t.is_nested:
        return Stock("layout", "a tensor is sparse, nested or otherwise not strided")
    why = _refuse_dtype(op, t.dtype)
    if why is not None:
        return why
    if t.is_neg():
        return Stock("layout", "a tensor has a pending negation")
    if is_batch(t):
        return Stock("mode", "a tensor is a batch of gradients (is_grads_batched)")
    return None


def _read_by_host(op: Op, t: Tensor, args: tuple, kwargs: dict) -> bool:
    given = {**dict(zip(op.names, args, strict=False)), **kwargs}
    return any(given.get(name) is t for name in op.on_host)


_NO_TENSOR = Invalid("option", "there is no tensor among the arguments")
_WRAPPED = Stock(
    "distributed", "an argument is a DTensor, or the result of a collective that is not complete"
)


def survey(op: Op, args: tuple, kwargs: dict) -> Stock | Tensor:
    """Why no kernel can take this call, for reasons that all ops share; else one of its tensors.

    Tensors inside tuples and lists count, too. `_WRAPPED` if local tensors are inside.
    """
    if not _mode.HAS_TRITON:
        return Stock("device", "triton is not installed")
    if torch._C._are_functorch_transforms_active():
        return Stock("mode", "the call is inside a functorch transform (vmap, grad, jacrev, ...)")
    if torch._C._get_tracing_state() is not None:
        return Stock("mode", "the call is inside torch.jit.trace")
    if forward_ad._current_level >= 0:
        return Stock("mode", "forward-mode automatic differentiation is active")
    if torch._C._len_torch_dispatch_stack() > (active.recorder is not None):
        return Stock(
            "mode", "a torch dispatch mode is active (FakeTensorMode, FlopCounterMode, ...)"
        )
    if torch._C._len_torch_function_stack() and (mode := _mode.function_mode()) is not None:
        return Stock("mode", f"a torch function mode is active ({type(mode).__name__})")
    first = None
    index = 0
    values = [*args, *kwargs.values()]
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if op.on_host and first is not None and value.is_cpu and not first.is_cpu:
                if _read_by_host(op, value, args, kwargs):
                    continue
            why = _refuse_tensor(op, value)
            if why is not None:
                return why
            if first is None:
                first, index = value, value.get_device()
            elif index != value.get_device():
                return Stock("device", "the tensors are on several devices")
        elif kind is tuple or kind is list:
            values.extend(value)  # the loop continues with these values
        elif kind is int:
            if not fits_64_bits(value):
                return Invalid("option", "an integer that 64 bits cannot hold")
        elif kind not in _SCALARS:
            if _shards.is_wrapped(kind):
                return _WRAPPED
            if isinstance(value, Tensor):
                return Stock("layout", f"an argument is a tensor subclass ({kind.__name__})")
            if hasattr(kind, "__torch_function__"):
                return Stock("layout", f"an argument overrides torch functions ({kind.__name__})")
    if first is None:
        return _NO_TENSOR
    for i in op.flags_at:
        if i < len(args) and type(args[i]) is not bool:
            return Invalid("option", f"{op.names[i]} is a {type(args[i]).__name__}")
    for name, value in kwargs.items():
        if name in op.flags and type(value) is not bool:
            return Invalid("option", f"{name} is a {type(value).__name__}")
    return first


# ---- Dispatch -----------------------------------------------------------------------------------


def _under_autocast(op: Op, device_type: str, args: tuple, kwargs: dict):
    """The arguments as autocast would pass them to PyTorch.

    If autocast sets the dtype of the result to float32, that dtype is added as `out_dtype`.
    """
    rule = op.autocast_list(device_type)
    if rule is None or not torch.is_autocast_enabled(device_type):
        return args, kwargs
    if rule == "fp32":
        # The kernel reads 16-bit values as they are and writes fp32, so no pass converts them.
        return args, {**kwargs, "out_dtype": torch.float32}
    low = torch.get_autocast_dtype(device_type)

    def cast(v):
        if isinstance(v, Tensor):
            return v.to(low) if v.is_floating_point() else v
        return type(v)(map(cast, v)) if type(v) in (tuple, list) else v

    names = op.lowered or op.names
    given = zip(op.names, args, strict=False)
    return (
        tuple([cast(v) if name in names else v for name, v in given]),
        {k: cast(v) if k in names else v for k, v in kwargs.items()},
    )


def _fused(op: Op, device_type: str, args: tuple, kwargs: dict, variant: str) -> Any:
    """Call the fused function with the arguments as autocast and the op's record require them."""
    args, kwargs = _under_autocast(op, device_type, args, kwargs)
    args, kwargs = make_dense(op.dense_at, op.dense_names, args, kwargs)
    if op.takes_variant:
        kwargs = {**kwargs, "variant": variant}
    return op.fused(*args, **kwargs)


class _Reached(Exception):
    """A fused function took its call."""


class _Asking:
    """Stands for a recorder, and for its log, where a fused function is only asked.

    The function runs no autograd function, and draws nothing.
    """

    asks = True
    reads_setting = False

    def __init__(self):
        self.log = self

    def run(self, function, args):
        raise _Reached

    def numbers(self) -> tuple[int, int]:
        return 0, 0

    def refuse(self, why: str) -> None:
        pass

    def lasting(self, *tensors: Tensor) -> None:
        pass


def refusal(op: Op, device: torch.device, args: tuple, kwargs: dict, cast: bool) -> Stock | None:
    """Why no kernel takes such a call at any size; None if one does. Nothing is computed.

    The tensors among the arguments are on the meta device, and stand for tensors on `device`.
    `cast` says whether autocast is on. What `survey` asks of a thread or a device is not asked.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and (why := _refuse_dtype(op, value.dtype)) is not None:
            return why
    before, active.recorder = active.recorder, _Asking()
    kind = device.type
    autocast: Any = contextlib.nullcontext()
    if torch.amp.is_autocast_available(kind):
        autocast = torch.autocast(kind, enabled=cast)
    try:
        given = inspect.Signature(_front.parameters(op.fused)).bind(*args, **kwargs)
        given.apply_defaults()
        # With gradients, because some calls are taken only without them.
        with torch.enable_grad(), autocast:
            found = _fused(op, kind, given.args, given.kwargs, "")
    except _Reached:
        return None
    except (AttributeError, TypeError) as e:  # PyTorch is going to reject the arguments
        return Invalid("option", str(e))
    finally:
        active.recorder = before
    return found if isinstance(found, Stock) else None


def _has_elements(result: Any) -> bool:
    if isinstance(result, (tuple, list)):
        return any(map(_has_elements, result))
    return isinstance(result, Tensor) and result.numel() > 0


def _forced(op: Op, declined: Stock, args: tuple, kwargs: dict) -> Any:
    """What `backend("triton")` does with a call that is declined.

    A result without elements is that of PyTorch: no kernel would have anything to compute, and the
    backward does what PyTorch does. All else raises.
    """
    if isinstance(declined, Invalid):
        op.stock(*args, **kwargs)  # raises PyTorch's error
    elif declined.code == "empty":
        result = op.stock(*args, **kwargs)
        if not _has_elements(result):
            return result
    _forced_onto_stock(op.name, declined.code, declined.why)


def _forced_onto_stock(name: str, code: Code, why: str) -> NoReturn:
    hint = ""
    if code == "device" and not _mode.INTERPRET:
        hint = " With TRITON_INTERPRET=1 set before the import, kernels run on CPU tensors, slowly."
    error = BackendError(
        f"{name}: backend('triton') was requested, but this call can only run on PyTorch: {why}. "
        f"Under backend('auto') it does so without an error.{hint}"
    )
    error.code = code
    raise error


# Dynamo then runs this function while tracing, so the user gets this error and not Dynamo's.
_forced_onto_stock._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _dispatch_compiling(op: Op, args: tuple, kwargs: dict):
    """The choice when Dynamo traces: PyTorch, or the fused function with opaque launches."""
    if traced_for_fastnn():
        return op.stock(*args, **kwargs)
    mode = _mode.traced_mode()
    torch_fuses = "torch.compile fuses PyTorch's formula itself"
    declined = Stock("mode", 'backend("torch")' if mode == "torch" else torch_fuses)
    if op.opaque and mode != "torch" and (mode == "triton" or op.compiled == "opaque"):
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        known = all(t.dtype in op.dtypes or t.dtype in op.integers for t in tensors)
        if _mode.HAS_TRITON and known and tensors and tensors[0].device.type in kernel_devices:
            out = _fused(op, tensors[0].device.type, args, kwargs, "")
            if not isinstance(out, Stock):
                return out
            declined = out
        else:
            declined = Stock("dtype", "the device or the dtype is one that no kernel takes")
    if mode == "triton":
        return _forced(op, declined, args, kwargs)
    return op.stock(*args, **kwargs)


_interceptor: Callable[[Op, tuple, dict], Any] | None = None


@contextmanager
def intercept(call: Callable[[Op, tuple, dict], Any]) -> Iterator[None]:
    """Every dispatch in the block returns `call(op, args, kwargs)` instead. For tests and tools.

    `args` are the positional arguments in the order of the signature.
    """
    global _interceptor
    before, _interceptor = _interceptor, call
    try:
        with _mode.decisions():  # this makes every call go through dispatch
            yield
    finally:
        _interceptor = before


def dispatch(op: Op, args: tuple, kwargs: dict):
    """Run `op` on the path that its record, the arguments and the mode determine."""
    if torch.compiler.is_compiling():
        return _dispatch_compiling(op, args, kwargs)
    if _interceptor is not None:
        return _interceptor(op, args, kwargs)
    mode = _mode.current_mode()
    if mode == "torch":
        declined = Stock("mode", 'backend("torch")')
    else:
        op.find_floor()
        declined = _try_kernel(op, args, kwargs, mode)
        if not isinstance(declined, Stock):
            _mode.note(op, None)
            return declined
    _mode.note(op, declined)
    if mode != "triton":
        if mode == "auto":
            op.plans.declined(args, kwargs)
        return op.stock(*args, **kwargs)
    return _forced(op, declined, args, kwargs)


def _raise_as_stock(op: Op, args: tuple, kwargs: dict) -> None:
    """Raise the error that PyTorch raises for this call; return if it raises none.

    PyTorch gets copies of the tensors, and the generators are put back. So nothing that a call
    without an error wrote or drew remains.
    """
    devices = set()

    def copied(v):
        if isinstance(v, Tensor):
            if v.is_cuda:
                devices.add(v.get_device())
            return v.detach().clone().requires_grad_(v.requires_grad) if v.is_leaf else v.clone()
        return type(v)(map(copied, v)) if type(v) in (tuple, list) else v

    args, kwargs = tuple(map(copied, args)), {k: copied(v) for k, v in kwargs.items()}
    with torch.random.fork_rng(sorted(devices)):
        try:
            op.stock(*args, **kwargs)
        except Exception as e:
            raise e from None


def _try_kernel(op: Op, args: tuple, kwargs: dict, mode: str) -> Any:
    """The result of the fused function; a `Stock` if no kernel can run, or if PyTorch is faster."""
    found = survey(op, args, kwargs)
    if found is _WRAPPED:
        local = _shards.local(op.names, op.split, args, kwargs)
        if isinstance(local, str):
            return Stock("distributed", local)
        result = local.run(lambda args, kwargs: _try_kernel(op, args, kwargs, mode))
        return result if isinstance(result, Stock) else local.whole(result)
    if isinstance(found, Stock):
        return found
    tensor, variant = found, ""
    if mode != "triton":
        chosen = _gate.decide(
            op.name, op.policy, tensor.get_device(), args, kwargs, mode == "graph", op.alerts
        )
        if isinstance(chosen, Stock):
            return chosen
        variant = chosen
    try:
        return op.plans.heard(
            args, kwargs, mode, lambda: _fused(op, tensor.device.type, args, kwargs, variant)
        )
    # for example, an argument that should be a tensor is not one
    except (AttributeError, TypeError):
        _raise_as_stock(op, args, kwargs)
        raise
