"""Bytes and launches of a training step of real models: eager PyTorch against the backend fastnn.

Nothing is computed. Dynamo captures the model at its full size with "meta" tensors, and the graph
runs twice with autograd: as it was captured, and as the backend `fastnn` rewrites it. `Outside`
counts PyTorch's operators. A call of fastnn that would run kernels counts what those kernels move:
each kind of call runs once in Triton's interpreter with its real shapes and a sample of its
programs (see `fastnn.bench.predict`).

Products, convolutions and attention count as launches and not as bytes. An embedding counts as
PyTorch's on both sides, since what it reads depends on the indices.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import fastnn
from fastnn import _gate
from fastnn._compiler import _gradients
from fastnn._compiler._backend import rewrite
from fastnn._op import intercept
from fastnn.bench.predict import ARCHITECTURE, as_on_the_gpu, costs_of
from fastnn.testing import simulated
from fastnn.testing.meter import AtenOp, AtenTraffic, Cost, as_on_cuda, nbytes

STOCK, AUTO, OPEN = "stock", "auto", "open"
PRODUCTS = {
    "mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "dot", "_addmm_activation", "convolution",
    "convolution_backward",
}  # fmt: skip
# Ours that count as PyTorch's: products, and what depends on values.
_AS_STOCK = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "embedding"}
_PRODUCT_KERNEL = "_gemm_kernel"  # of kernels/linear.py


# ---- Models -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model of a library at its full size, and the batch of one training step.

    package: what must be installed.
    build: () -> (model, inputs, keywords) on the "meta" device; the call returns an output with
        the attribute `loss`, or the loss.
    """

    name: str
    package: str
    build: Callable[[], tuple[nn.Module, tuple, dict]]


def _tokens(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def _language(cls: str, config: str, batch: int, length: int, **sizes: Any) -> Callable:
    def build():
        import transformers

        made = getattr(transformers, config)(use_cache=False, **sizes)
        model = getattr(transformers, cls)(made)
        model.loss_type = "ForMaskedLM" if "Masked" in cls else "ForCausalLM"
        tokens = _tokens(batch, length)
        return model, (tokens,), {"labels": tokens.clone()}

    return build


def _t5():
    import transformers

    config = transformers.T5Config(decoder_start_token_id=0, use_cache=False)
    tokens = _tokens(16, 128)
    return transformers.T5ForConditionalGeneration(config), (tokens,), {"labels": tokens.clone()}


def _whisper():
    import transformers

    config = transformers.WhisperConfig(
        d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, dropout=0.1,
        use_cache=False,
    )  # fmt: skip
    sound = torch.empty(8, config.num_mel_bins, 3000)
    return (
        transformers.WhisperForConditionalGeneration(config),
        (sound,),
        {"labels": _tokens(8, 128)},
    )


def _vit():
    import transformers

    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_dropout_prob=0.1, num_labels=1000)
    )
    model.config.problem_type = "single_label_classification"
    return model, (torch.empty(64, 3, 224, 224),), {"labels": _tokens(64)}


class _Classified(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images, labels):
        return F.cross_entropy(self.model(images).float(), labels)


class _Denoised(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images, times, text, noise):
        return F.mse_loss(self.model(images, times, text).sample.float(), noise.float())


def _timm(name: str) -> Callable:
    def build():
        import timm

        model = _Classified(timm.create_model(name))
        return model, (torch.empty(64, 3, 224, 224), _tokens(64)), {}

    return build


def _unet():
    from diffusers import UNet2DConditionModel

    model = _Denoised(UNet2DConditionModel(sample_size=64, cross_attention_dim=768))
    images = torch.empty(4, 4, 64, 64)
    return model, (images, _tokens(4), torch.empty(4, 77, 768), images.clone()), {}


MODELS = [
    Model(
        "GPT-2 small, 8 x 1024", "transformers",
        _language("GPT2LMHeadModel", "GPT2Config", 8, 1024),
    ),
    Model(
        "Llama 1B, 2 x 2048", "transformers",
        _language(
            "LlamaForCausalLM", "LlamaConfig", 2, 2048, hidden_size=2048, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192,
            vocab_size=128256, max_position_embeddings=4096,
        ),
    ),
    Model(
        "BERT-base, 32 x 128", "transformers",
        _language("BertForMaskedLM", "BertConfig", 32, 128),
    ),
    Model("T5-small, 16 x 128", "transformers", _t5),
    Model("Whisper-base, 8", "transformers", _whisper),
    Model("ViT-B/16, 64", "transformers", _vit),
    Model("ViT-B/16, 64", "timm", _timm("vit_base_patch16_224")),
    Model("Swin-T, 64", "timm", _timm("swin_tiny_patch4_window7_224")),
    Model("ConvNeXt-T, 64", "timm", _timm("convnext_tiny")),
    Model("ResNet-50, 64", "timm", _timm("resnet50")),
    Model("ResNet-18, 64", "timm", _timm("resnet18")),
    Model("EfficientNet-B0, 64", "timm", _timm("efficientnet_b0")),
    Model("MobileNetV3-L, 64", "timm", _timm("mobilenetv3_large_100")),
    Model("U-Net of Stable Diffusion, 4", "diffusers", _unet),
]  # fmt: skip


# ---- Counting -----------------------------------------------------------------------------------


class Outside(AtenTraffic):
    """Counts bytes outside of products and convolutions.

    The sum for a convolution's bias counts, and so does a matrix to which a product adds.

    `by` has the bytes of each operator.
    """

    @staticmethod
    def _count(name: str, args: Any, kwargs: Any, out: Any) -> AtenOp:
        counted = AtenTraffic._count(name, args, kwargs, out)
        if name not in PRODUCTS:
            return counted
        sums = name == "convolution_backward" and args[-1][2]
        sums |= name in ("addmm", "addmm_") and args[0].dim() == 2
        return AtenOp(name, nbytes(args[0]) if sums else 0, 0, counted.launches)

    @property
    def by(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for one in self.ops:
            found[one.name] += one.read + one.written
        return found


class _Shaped(torch.autograd.Function):
    """Results and gradients of the right shapes. `tally` hears of the forward and the backward."""

    @staticmethod
    def forward(ctx, make, tally, *tensors):
        ctx.tally, ctx.given = tally, tensors
        ctx.set_materialize_grads(False)
        with _disable_current_modes():
            results = tuple(torch.empty_like(t) for t in make())
        ctx.mark_non_differentiable(*(t for t in results if not t.is_floating_point()))
        tally(0)
        return results

    @staticmethod
    def backward(ctx, *gradients):
        ctx.tally(1)
        with _disable_current_modes():
            needed = zip(ctx.needs_input_grad[2:], ctx.given, strict=True)
            found = [torch.empty_like(t) if need else None for need, t in needed]
        return None, None, *found


def fused_attention(query, key, value, *args, **kwargs):
    """Attention as fused kernels lay its result out: (batch, length, heads, width) in memory."""
    batch, heads, length, _ = query.shape

    def make():
        wide = torch.empty(
            batch, length, heads, value.shape[-1], dtype=query.dtype, device=query.device
        )
        return [wide.transpose(1, 2)]

    return _Shaped.apply(make, lambda which: None, query, key, value)[0]


def _unfilled(t: Any) -> Any:
    """A tensor of the CPU with shape, strides and dtype of `t`. Its memory is never touched."""
    if not isinstance(t, Tensor):
        return t
    if not t.is_floating_point():
        return torch.zeros(t.shape, dtype=t.dtype)
    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    return made.requires_grad_(t.requires_grad)


def _kind(tree: Any) -> tuple:
    """What the cost of a call depends on."""

    def told(v: Any) -> Any:
        if isinstance(v, Tensor):
            return tuple(v.shape), v.stride(), v.dtype, v.requires_grad
        return repr(v)

    return tuple(map(told, tree_leaves(tree, is_leaf=lambda v: v is None)))


def cost_of_call(function: Callable, args: tuple, kwargs: dict, size: int) -> list[Cost]:
    """[forward, backward] of one call of ours, whatever its size. `size`: bytes of its results."""

    def make() -> list[Callable]:
        given, named = tree_map(_unfilled, (args, kwargs))
        kept: list[Tensor] = []

        def forward():
            kept.extend(t for t in tree_leaves(function(*given, **named)) if t.requires_grad)

        def backward():
            leaves = [t for t in tree_leaves((given, named)) if isinstance(t, Tensor)]
            leaves = [t for t in leaves if t.requires_grad]
            upstream = [torch.empty_like(t) for t in kept]
            if kept:
                torch.autograd.grad(kept, leaves, upstream, allow_unused=True)

        return [forward, backward]

    with _disable_current_modes(), as_on_the_gpu(), simulated(least=0), fastnn.backend("auto"):
        costs, kernels = costs_of(make, Outside, lambda name: name == _PRODUCT_KERNEL)
        if _PRODUCT_KERNEL in kernels[0] and len(costs) > 1:
            # What the product keeps for its backward, beside its result, is of the result's size.
            costs[0] += Cost(size, 0)
        return costs


@dataclass
class Count:
    """A training step: bytes outside of products, launches, and bytes by operator or call."""

    bytes: int
    launches: int
    by: dict[str, int]


class _Counted(Interpreter):
    """Runs a graph on "meta" tensors; `ours` counts what kernels of calls of fastnn would move."""

    def __init__(self, gm: GraphModule, replaced: dict, side: str, known: dict):
        super().__init__(gm)
        self.replaced, self.side, self.known = replaced, side, known
        self.ours: list[tuple[str, Cost]] = []

    def call_function(self, target, args, kwargs):
        if target is F.scaled_dot_product_attention:
            return fused_attention(*args, **kwargs)
        name = getattr(target, "__name__", "")
        if not getattr(target, "__module__", "").startswith("fastnn"):
            return super().call_function(self.replaced.get(target, target), args, kwargs)
        if target.__module__ == _gradients.__name__:
            with simulated(ARCHITECTURE, devices=["meta"]):
                return target(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return fused_attention(*args, **kwargs)
        results, asked = self._asked(target, args, kwargs)
        if name in _AS_STOCK or not self._wins(asked):
            with intercept(self._stock):
                return target(*args, **kwargs)
        kind = target, torch.is_grad_enabled(), _kind((args, kwargs))
        if kind not in self.known:
            size = nbytes(*tree_leaves(results))
            self.known[kind] = cost_of_call(target, args, kwargs, size)
        costs = self.known[kind]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        out = _Shaped.apply(
            lambda: tree_leaves(results),
            lambda which: self.ours.append((name, costs[which])),
            *tensors,
        )
        return out if isinstance(results, (tuple, list)) else out[0]

    def _stock(self, op, args, kwargs):
        """The call on PyTorch, as CUDA has it."""
        return self.replaced.get(op.stock, op.stock)(*args, **kwargs)

    def _asked(self, target, args, kwargs):
        """The result on PyTorch, and what the gate was asked for it; nothing is counted."""
        with (
            _disable_current_modes(),
            torch.no_grad() if self.side == STOCK else torch.enable_grad(),
            simulated(ARCHITECTURE, devices=["meta"]),
            fastnn.backend("auto"),
            fastnn._mode.decisions(),
            _gate.asked() as asked,
        ):
            return target(*args, **kwargs), asked

    def _wins(self, asked) -> bool:
        """Whether kernels would run the call."""
        if not asked or not all(isinstance(work, _gate.Work) for _, work in asked):
            return False
        return self.side == OPEN or all(
            work.size >= _gate.crossover(op, ARCHITECTURE, work.variant).least for op, work in asked
        )


def _as_cuda_has_them() -> dict:
    """PyTorch's functions, and what stands for them inside `as_on_cuda()`."""
    names = [n for n in dir(F) if callable(getattr(F, n))]
    before = {n: getattr(F, n) for n in names}
    with as_on_cuda():
        return {before[n]: getattr(F, n) for n in names if getattr(F, n) is not before[n]}


def _count(gm: GraphModule, args: tuple, side: str, known: dict) -> Count:
    run = _Counted(gm, _as_cuda_has_them(), side, known)
    with as_on_cuda():
        with Outside() as forward:
            loss = run.run(*args)
        loss = next(t for t in tree_leaves(loss) if isinstance(t, Tensor) and t.dim() == 0)
        first = torch.empty_like(loss)
        leaves = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
        with Outside() as backward:
            torch.autograd.grad(loss, leaves, first, allow_unused=True)
    total = forward.cost + backward.cost
    by = forward.by + backward.by
    for name, cost in run.ours:
        total += cost
        by[f"fastnn {name}"] += cost.bytes
    return Count(total.bytes, total.launches, dict(by.most_common()))


def _narrowed(t: Any) -> Any:
    """A leaf in bfloat16, if `t` is a tensor of floating dtype."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        return t
    return t.detach().bfloat16().requires_grad_(t.requires_grad)


class _Done(Exception):
    pass


def counted(model: Model, sides: tuple[str, ...] = (STOCK, AUTO, OPEN)) -> dict[str, Any]:
    """The record of one model: per side a `Count`, and how often each rule held.

    `stock` is eager PyTorch. `auto` is the compiled model on an H100, with the shipped size gate.
    `open` is the same with kernels at every size.
    """
    record: dict[str, Any] = {"kind": "model", "name": model.name, "package": model.package}
    try:
        with torch.device("meta"):
            module, args, kwargs = model.build()
    except ImportError as e:
        return record | {"why": f"{model.package} cannot be imported: {e}"}
    module = module.to(torch.bfloat16).train()
    args = tree_map(_narrowed, args)

    def backend(gm: GraphModule, example_inputs: list) -> Callable:
        graphs = {side: copy.deepcopy(gm) for side in sides}
        for side, one in graphs.items():
            if side != STOCK:
                # Not later: Dynamo forgets which inputs are parameters.
                record["rules"] = dict(Counter(f.rule for f in rewrite(one)))

        def count(*inputs: Any) -> Any:
            known: dict = {}
            for side, one in graphs.items():
                record[side] = vars(_count(one, inputs, side, known))
            raise _Done

        return count

    def step(*args, **kwargs):
        out = module(*args, **kwargs)
        return out.loss if hasattr(out, "loss") else out

    torch._dynamo.reset()
    try:
        torch.compile(step, backend=backend, fullgraph=True)(*args, **kwargs)
    except _Done:
        pass
    return record


def ratio(record: dict, side: str, what: str = "bytes") -> float | None:
    """What a side has of eager PyTorch's bytes or launches; None without a count."""
    if side not in record or STOCK not in record:
        return None
    return record[side][what] / record[STOCK][what]


def mean(records: list[dict], side: str, what: str = "bytes") -> float | None:
    """The geometric mean of `ratio`."""
    found = [r for r in (ratio(x, side, what) for x in records) if r is not None]
    return math.exp(sum(map(math.log, found)) / len(found)) if found else None


def matching(only: list[str] | None) -> list[Model]:
    """The models of which the name or the package has one of `only`; all if there is none."""

    def named(m: Model) -> bool:
        return any(o.lower() in f"{m.name} {m.package}".lower() for o in only or [""])

    return [m for m in MODELS if named(m)]


LEGEND = (
    "bytes: outside of products, convolutions and attention. compiled: the backend fastnn with the "
    "size gate of an H100;\ngate open: kernels at every size. Ratios are over eager PyTorch."
)
COLUMNS = ("model", "from", "eager, GB", "compiled", "bytes", "launches", "bytes, gate open")


def rows(records: list[dict]) -> list[list[str]]:
    """The cells of the table: one row per model, and their geometric mean."""

    def told(x: float | None) -> str:
        return "" if x is None else f"{x:.2f}"

    found = []
    for r in records:
        if "why" in r:
            found.append([r["name"], r["package"], r["why"], "", "", "", ""])
            continue
        found.append([
            r["name"], r["package"], *(f"{r[s]['bytes'] / 1e9:.2f}" for s in (STOCK, AUTO)),
            told(ratio(r, AUTO)), told(ratio(r, AUTO, "launches")), told(ratio(r, OPEN)),
        ])  # fmt: skip
    means = mean(records, AUTO), mean(records, AUTO, "launches"), mean(records, OPEN)
    return [*found, ["geometric mean", "", "", "", *map(told, means)]]


def markdown(records: list[dict]) -> str:
    """The table for a document."""
    return markdown_of(rows(records))


def markdown_of(lines: list[list[str]]) -> str:
    """Lines of the table, such as `rows` gives, under its head."""
    lines = [list(COLUMNS), ["---", "---", *["---:"] * 5], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
