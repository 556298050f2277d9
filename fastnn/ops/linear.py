"""Linear, and Linear with the activation and the dropout that follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as stock
from torch import Tensor

from fastnn import _rng, kernels
from fastnn._op import Function, Invalid, Stock, Work, op, reads_setting, run, second_order
from fastnn._shards import Split
from fastnn.kernels import _gpus
from fastnn.ops import activation as acts
from fastnn.ops.activation import Formula
from fastnn.ops.dropout import Dropout, Noise, native_scales


def matmul_precision(device_index: int) -> str:
    """How products of float32 matrices are computed: "tf32" or "ieee".

    PyTorch's setting decides, if the GPU has tf32.
    """
    return tf32_setting() if _gpus.facts(_gpus.architecture(device_index)).tf32 else "ieee"


_read_precision: Any = getattr(torch._C, "_get_fp32_precision_getter", None)


class Fp32Precision:
    """A setting of PyTorch for one kind of float32 products: "tf32" or "ieee".

    kind: "matmul" or "conv", the name of the products in PyTorch.
    new, old: the objects that have the setting under its name `fp32_precision`, and under its older
    name `allow_tf32`. The new name is read first: after it was written, reading the old one raises
    an error.
    """

    def __init__(self, kind: str, new: Callable[[], Any], old: Callable[[], Any]):
        self._kind, self._new, self._old = kind, new, old
        self._short = False
        # What the attribute of the new name calls. It takes a tenth of the time.
        self.questions: tuple = (self,)
        with suppress(Exception):
            self._short = _read_precision("cuda", kind) == self._new().fp32_precision
        if self._short:
            self.questions = (partial(_read_precision, "cuda", kind),)

    def __call__(self) -> str:
        reads_setting()
        if self._short:
            return "tf32" if _read_precision("cuda", self._kind) == "tf32" else "ieee"
        try:
            tf32 = self._new().fp32_precision == "tf32"
        except AttributeError:
            tf32 = self._old().allow_tf32
        return "tf32" if tf32 else "ieee"

    @contextmanager
    def set_to(self, precision: str) -> Iterator[None]:
        """Inside the block the setting is `precision`."""
        home, name, value = self._old(), "allow_tf32", precision == "tf32"  # type: Any, str, Any
        with suppress(AttributeError):
            if hasattr(self._new(), "fp32_precision"):
                home, name, value = self._new(), "fp32_precision", precision
        before = getattr(home, name)
        setattr(home, name, value)
        try:
            yield
        finally:
            setattr(home, name, before)


tf32_setting = Fp32Precision(
    "matmul", lambda: torch.backends.cuda.matmul, lambda: torch.backends.cuda.matmul
)


def _matrix(x):
    """x (..., K) -> (M, K); a copy only if the leading dims cannot be one dim."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _foldable(x):
    """x (..., K) with leading dims that can be one dim: a copy, as ATen makes one, or x itself.

    The copy is made here, and not beside the product, so that it is what the backward keeps.
    """
    step = None
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size != 1:
            if step is not None and stride != step:
                return x.contiguous()
            step = size * stride
    return x


def _rows(dy):
    """dy (..., N) -> (M, N) with unit stride in N."""
    dy = _matrix(dy)
    return dy if dy.stride(1) == 1 else dy.contiguous()


class How(NamedTuple):
    """What multiplies, and how: our kernel or ATen, in which precision, on which architecture."""

    ours: bool
    precision: str
    arch: str


def _gradients_of_product(dz, x, weight, shape, needs, how):
    """dz (M, N) -> the gradients of x (with `shape`) and of the weight; None if not needed."""
    dx = dw = None
    if not any(needs[:2]):  # dz was not made either
        return dx, dw
    if how.ours:
        if needs[0]:
            dx = kernels.linear.bwd_dx(dz, weight, how.precision, how.arch).view(shape)
        if needs[1]:
            dw = kernels.linear.bwd_dw(dz, _matrix(x), how.precision, how.arch)
        return dx, dw
    with torch.autocast(dz.device.type, enabled=False):
        if needs[0]:
            dx = (dz @ weight).view(shape)
        if needs[1]:
            if weight is not None and weight.stride(0) == 1 != weight.stride(1):
                dw = (_matrix(x).t() @ dz).t()  # in the layout of the weight
            else:
                dw = dz.t() @ _matrix(x)
    return dx, dw


def _differentiable_gradients(dz, x, weight, needs):
    """dz (..., N) -> the gradients of x, weight and bias, with graphs of their own."""
    return (
        dz @ weight if needs[0] else None,
        _matrix(dz).t() @ _matrix(x) if needs[1] else None,
        _matrix(dz).sum(0) if needs[2] else None,
    )


# ---- Linear --------------------------------------------------------------------------------------


class Linear(Function):
    """x (..., K), weight (N, K), bias (N,) or None -> y (..., N)."""

    strided = ("dy",)

    @staticmethod
    def forward(ctx, x, weight, bias, how):
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )
        ctx.rest = x.shape, how
        # y is made in its final shape: a view that was made here could not be edited in place
        # later.
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        kernels.linear.fwd(_matrix(x), weight, bias, how.precision, how.arch, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        shape, how = ctx.rest
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: a kernel's gradient would carry no graph
            return *_differentiable_gradients(dy, x, weight, needs), None
        dy = _rows(dy)
        dx, dw = _gradients_of_product(dy, x, weight, shape, needs, how)
        db = None
        if needs[2]:
            _, db = kernels.epilogue.bwd(dy, want_dz=False)
        return dx, dw, db, None


def _declined(input, weight, bias):
    """Why kernels do not take these operands; None if they do."""
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return Invalid("shape", f"input {tuple(input.shape)}, weight {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        return Invalid("shape", f"bias {tuple(bias.shape)} for {weight.shape[0]} features")
    if input.dtype != weight.dtype or (bias is not None and bias.dtype != input.dtype):
        return Invalid("dtype", "several dtypes")
    if max(weight.shape) > 2**23:  # kernels index a tile of up to 256 rows in 32 bits
        return Stock("size", f"a weight {tuple(weight.shape)}; kernels take at most 2^23 a side")
    return None


def _splits(input, weight, bias=None, **others):
    """By rows of the input, by features of the result, and by the features that are summed."""
    last = input.dim() - 1
    rows = [Split({"input": d}, d) for d in range(last)]
    columns = {"weight": 0} if bias is None else {"weight": 0, "bias": 0}
    return [*rows, Split(columns, last), Split({"input": last, "weight": 1}, None, ("bias",))]


@op(
    stock=stock.linear,
    settings=tf32_setting,
    split=_splits,
    strided=("input", "weight"),
    autocast="lower",
    autocast_cpu="lower",
)
def linear(input, weight, bias=None):
    """Fused with its bias, for a (N, K) weight and input of any leading shape."""
    why = _declined(input, weight, bias)
    if why is not None:
        return why
    how = How(True, matmul_precision(input.get_device()), _gpus.architecture(input.get_device()))
    return run(Linear, _foldable(input), weight, bias, how)


# ---- Linear, activation, dropout -----------------------------------------------------------------

ACTIVATIONS: dict[str, Formula] = {
    "relu": acts.RELU,
    "leaky_relu": acts.LEAKY_RELU,
    "elu": acts.ELU,
    "selu": acts.SELU,
    "gelu": acts.GELU,
    "gelu_tanh": acts.GELU_TANH,
    "silu": acts.SILU,
    "mish": acts.MISH,
    "sigmoid": acts.SIGMOID,
    "tanh": acts.TANH,
    "hardtanh": acts.HARDTANH,
    "hardsigmoid": acts.HARDSIGMOID,
    "hardswish": acts.HARDSWISH,
}
# A formula that keeps y names PyTorch's gradient, not PyTorch's function.
_OF_X: dict[str, Callable[..., Tensor]] = {
    "relu": lambda x, a, b: torch.relu(x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "tanh": lambda x, a, b: torch.tanh(x),
}


def stock_activation(activation: str) -> Callable[..., Tensor]:
    """PyTorch's activation, as a function of (x, a, b)."""
    if activation not in ACTIVATIONS:
        accepted = ", ".join(ACTIVATIONS)
        raise ValueError(f"linear_act: activation {activation!r}; accepted are {accepted}")
    return _OF_X.get(activation) or ACTIVATIONS[activation].stock


class Neighbours(NamedTuple):
    """What follows the product, and how it is computed."""

    activation: str
    a: float
    b: float
    plan: str
    noise: Noise | None
    how: How

    @property
    def formula(self) -> Formula:
        return ACTIVATIONS[self.activation]

    @property
    def keeps_y(self) -> bool:
        # Never the result of a dropout, because users may edit it in place, as in PyTorch.
        return self.formula.keeps == "y" and self.noise is None


class LinearAct(Function):
    """x, weight, bias as for `Linear` -> y = noise * act(z), and z = x W^T + b if it is kept.

    z is an output, so that a second derivative can pass through z.
    """

    strided = ("dy", "dz_of_second")

    @staticmethod
    def forward(ctx, x, weight, bias, rest):
        wanted = any(ctx.needs_input_grad)
        noise = state = None
        if rest.noise is not None:
            n = rest.noise
            state = n.draw.new_state(x)
            noise = n.draw, n.bound, n.scale, state
            rest = rest._replace(noise=n.kept())
        keeps_z = wanted and not rest.keeps_y
        y, z = _forward(x, weight, bias, rest, noise, keeps_z)
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
            z if keeps_z else y,
            state,
        )
        ctx.rest = x.shape, rest
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    def backward(ctx, dy, dz_of_second):
        x, weight, s, state = ctx.saved_tensors
        shape, rest = ctx.rest
        needs = ctx.needs_input_grad
        noise = rest.noise
        if noise is not None:
            draw = noise.draw.from_state(state)
            noise = noise._replace(draw=draw, scale=noise.grad_scale)
        if torch.is_grad_enabled():
            dz = dz_of_second
            if dy is not None:
                through_y = _differentiable_dz(dy, s, rest, noise)
                dz = through_y if dz is None else through_y + dz
            return *_differentiable_gradients(dz, x, weight, needs), None
        dz = db = None
        if dy is not None:
            formula = rest.formula
            recompute = formula.keeps == "y" and not rest.keeps_y
            dz, db = kernels.epilogue.bwd(
                _rows(dy), _matrix(s), formula.gradient, formula.value if recompute else None,
                rest.a, rest.b, *((noise.draw, noise.bound, noise.scale) if noise else ()),
                want_dz=needs[0] or needs[1] or dz_of_second is not None,
                want_db=needs[2] and dz_of_second is None,
            )  # fmt: skip
        if dz_of_second is not None:
            more = _rows(dz_of_second)
            dz = more if dz is None else dz + more
            if needs[2]:
                _, db = kernels.epilogue.bwd(dz, want_dz=False)
        dx, dw = _gradients_of_product(dz, x, weight, shape, needs, rest.how)
        return dx, dw, db, None


def _forward(x, weight, bias, rest, noise, keeps_z):
    formula, how = rest.formula, rest.how
    z = None
    if rest.plan == "epilogue":
        z = stock.linear(x, weight, bias)
        # Noise goes by the order of storage, and so into a tensor that is contiguous.
        if noise is not None:
            y = z.new_empty(z.shape)
        else:
            y = torch.empty_like(z) if keeps_z else z
        kernels.epilogue.fwd(z, y, formula.value, rest.a, rest.b, *(noise or (None, 0, 1.0)))
        return y, z if keeps_z else None
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if rest.plan == "gemm":
        if keeps_z:
            z = torch.empty_like(y)
        act = formula.value, rest.a, rest.b
        kernels.linear.fwd(
            _matrix(x), weight, bias, how.precision, how.arch, y=y, z=z, act=act, noise=noise
        )
    else:
        # Only for relu: its gelu is the tanh formula on CUDA, and the erf formula on the CPU.
        torch._addmm_activation(bias, _matrix(x), weight.t(), out=y.view(-1, y.shape[-1]))
    return y, z


def _differentiable_dz(dy, s, rest, noise):
    if noise is not None:
        dy = run(Dropout, dy.contiguous(), noise, False)
    if rest.keeps_y:
        return rest.formula.stock(dy, s, rest.a, rest.b)
    act = stock_activation(rest.activation)
    (dz,) = second_order(lambda z: act(z, rest.a, rest.b), (s,), dy, (True,))
    return dz


def _composed(
    input, weight, bias=None, activation="relu", a=0.0, b=0.0, p=0.0, training=False
):  # fmt: skip
    y = stock_activation(activation)(stock.linear(input, weight, bias), a, b)
    if p == 0 and not training:  # nothing follows the activation
        return y
    return stock.dropout(y, p, training)


# Estimates from bytes and FLOPs, not timed. If our GEMM has 0.7 of the speed of cuBLAS, it still
# wins by the pass that it saves: for K below about 1000, or half of that if it must write z too.
GEMM_ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
_LEAST_GEMM = 128 * 128 * 66


def choose_variant(M, N, K, itemsize, arch, activation, bias, training, drops, sums) -> str | Stock:
    """How `linear_act` runs if cuBLAS may be used.

    "gemm": our GEMM with the rest in its epilogue. "addmm": cuBLASLt with bias and relu in its
    epilogue. "dropout", "epilogue": cuBLAS, then one pass for the rest, which also sums the
    gradient of the bias. Without a dropout, that sum is all that it saves. sums: whether the bias
    gets a gradient.
    """
    if activation == "relu" and bias and not drops and M * N:
        return "addmm"
    if (
        K <= (256 if training else 512)
        and K % 8 == N % 8 == 0
        and itemsize == 2
        and M * N >= _LEAST_GEMM
        and arch in GEMM_ARCHITECTURES
    ):
        return "gemm"
    if drops or sums:
        return "dropout" if drops else "epilogue"
    return Stock("gate", "there is no dropout to fuse, and no gradient of a bias")


def _outputs(
    input, weight, bias=None, activation="relu", a=0.0, b=0.0, p=0.0, training=False
):  # fmt: skip
    """The gate's policy: the number of outputs, and what multiplies."""
    N, K = weight.shape
    M = input.shape[:-1].numel()
    tracked = torch.is_grad_enabled()
    sums = tracked and bias is not None and bias.requires_grad
    variant = choose_variant(
        M, N, K, input.element_size(), _gpus.architecture(input.get_device()), activation,
        bias is not None, sums or (tracked and (input.requires_grad or weight.requires_grad)),
        training and p > 0, sums,
    )  # fmt: skip
    return variant if isinstance(variant, Stock) else Work(M * N, "outputs", variant)


@op(
    stock=_composed,
    strided=("input", "weight"),
    autocast="lower",
    autocast_cpu="lower",
    policy=_outputs,
    settings=tf32_setting,
    at_most="input.numel() // (_its_shape := weight.shape)[1] * _its_shape[0]",
    variants=("gemm", "addmm", "epilogue", "dropout"),
)
def linear_act(
    input, weight, bias=None, activation="relu", a=0.0, b=0.0, p=0.0, training=False, *, variant=""
):  # fmt: skip
    """`dropout(activation(linear(input, weight, bias), a, b), p, training)`.

    `Sequential` calls it for a Linear and its neighbours. The activation is one of `relu`,
    `leaky_relu` (a: slope), `elu` (a: alpha, b: 1), `selu`, `gelu`, `gelu_tanh`, `silu`, `mish`,
    `sigmoid`, `tanh`, `hardtanh` (a, b: the limits), `hardsigmoid` and `hardswish`. It is fused
    into the GEMM, or into one pass after it. The backward through dropout, activation and bias is
    one pass.

    Raises ValueError for any other activation.
    """
    why = _declined(input, weight, bias)
    if why is not None:
        return why
    if activation not in ACTIVATIONS:
        return Invalid("option", f"activation={activation!r}")
    why = acts.refuse_numbers(a, b, activation=activation)
    if why is not None:
        return why
    if not 0 <= p <= 1:
        return Invalid("option", f"p={p}")
    N = weight.shape[0]
    M = input.shape[:-1].numel()
    drops = training and p > 0 and M * N > 0
    if drops and M * N >= 2**31:
        return Stock("size", f"dropout of {M * N:,} elements; 32 bits cannot index so many")
    arch = _gpus.architecture(input.get_device())
    noise = None
    if drops:
        bound = kernels._philox.bound(1.0 - p)
        if p == 1:
            draw: Any = _rng.draw_nothing(M * N, input.get_device())
            noise = Noise(draw, "elements", bound, 0.0, 0.0)
        else:
            draw = _rng.draw_native_of_new(M * N, input.element_size(), input.get_device())
            if isinstance(draw, str):
                return Stock("random", draw)
            noise = Noise(draw, "elements", bound, *native_scales(p))
    # A forced call has no variant: our GEMM multiplies, also in the backward.
    how = How(not variant, matmul_precision(input.get_device()), arch)
    plan = "epilogue" if variant == "dropout" else variant or "gemm"
    rest = Neighbours(activation, float(a), float(b), plan, noise, how)
    return run(LinearAct, _foldable(input), weight, bias, rest)[0]
