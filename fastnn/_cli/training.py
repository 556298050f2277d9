"""`fastnn demo`: one small GPT, built with torch.nn and with fastnn, trained side by side.

This file trains and judges. It needs only torch. `demo.py` shows the results.

When do two curves coincide? If both sides ran stock on a CPU, they coincide when every loss has
equal bits. Kernels take sums in another order, and training amplifies the last bit, so with kernels
bits differ even if all is well. There the parity rule of this project holds at every step: the
distance of fastnn from the same training in float64 may be at most twice the distance of stock,
plus an ulp. The distance of stock is an envelope: the largest distance up to that step, over stock
and its twins. A twin is a stock training that sees the rows of each batch in another order. The
order does not matter for mathematics, and for rounding it has the effect of another kernel. Dropout
is 0 in this comparison. Float64 and the twins would draw other masks from the same seed, on a CPU
the kernels too, and trainings with different masks are different trainings.

Two curves are judged: the loss, and the sum of the norms of all gradients. AdamW divides a gradient
by its own size. If the gradient of a parameter is wrong by a constant factor, the model is trained
in the same way, and the loss alone would never show the fault.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn
from torch import Tensor

import fastnn
from fastnn import _mode

VOCABULARY = 128  # ASCII: no tokenizer, and the same on every version of Python
PROMPT = "The "
# The rounding error of one run is a single draw, and half of all correct kernels draw a larger one.
# A trial with torch.nn in the place of fastnn gave these numbers: of 80 runs at the interpreted
# size none was judged to differ, and of 64 runs of 200 steps one was.
TWINS = 4


class DemoError(Exception):
    """Something that the demo needs is missing. The message says what is missing and what to do."""


@dataclass(frozen=True)
class Size:
    """The model and its training."""

    width: int
    heads: int
    layers: int
    context: int
    batch: int
    steps: int
    lr: float
    dropout: float = 0.0
    encoder: bool = False  # blocks are `nn.TransformerEncoderLayer`s, not written out


CPU = Size(width=96, heads=4, layers=3, context=64, batch=16, steps=500, lr=4e-3, dropout=0.05)
CPU_QUICK = replace(CPU, width=32, heads=2, layers=2, context=32, batch=8, steps=60, lr=1e-2)
GPU = Size(width=256, heads=4, layers=4, context=128, batch=64, steps=600, lr=2e-3)
GPU_QUICK = replace(GPU, width=128, layers=2, steps=100)
INTERPRETED = Size(width=32, heads=2, layers=2, context=16, batch=4, steps=24, lr=5e-3)
INTERPRETED_QUICK = replace(INTERPRETED, layers=1, batch=3, steps=6)


# ---- The model, as any user would write it ------------------------------------------------------


def build(nn: Any, size: Size) -> torch.nn.Module:
    """A GPT from the layers of `nn`, which is `torch.nn` or `fastnn`. Nothing else differs."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(size.width, 3 * size.width)
            self.proj = nn.Linear(size.width, size.width)

        def forward(self, x):
            B, T, C = x.shape
            q, k, v = self.qkv(x).view(B, T, 3, size.heads, C // size.heads).permute(2, 0, 3, 1, 4)
            x = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.proj(x.transpose(1, 2).reshape(B, T, C))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1 = nn.LayerNorm(size.width)
            self.attention = Attention()
            self.norm2 = nn.LayerNorm(size.width)
            self.mlp = nn.Sequential(
                nn.Linear(size.width, 4 * size.width),
                nn.GELU(),
                nn.Linear(4 * size.width, size.width),
                nn.Dropout(size.dropout),
            )

        def forward(self, x):
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class Encoder(nn.TransformerEncoder):
        def __init__(self):
            layer = nn.TransformerEncoderLayer(
                size.width, size.heads, 4 * size.width, size.dropout, "gelu",
                batch_first=True, norm_first=True,
            )  # fmt: skip
            super().__init__(layer, size.layers, enable_nested_tensor=False)

        def forward(self, x):
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
            return super().forward(x, mask, is_causal=True)

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Embedding(VOCABULARY, size.width)
            self.position = nn.Embedding(size.context, size.width)
            if size.encoder:
                self.blocks = Encoder()
            else:
                self.blocks = nn.Sequential(*(Block() for _ in range(size.layers)))
            self.norm = nn.LayerNorm(size.width)
            self.head = nn.Linear(size.width, VOCABULARY)
            self.loss = nn.CrossEntropyLoss()

        def forward(self, ids, targets=None):
            x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
            logits = self.head(self.norm(self.blocks(x)))
            if targets is None:
                return logits
            return self.loss(logits.flatten(0, 1), targets.flatten())

    model = GPT()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
    return model


# ---- The text -----------------------------------------------------------------------------------


def text() -> tuple[Tensor, Tensor]:
    """The topics of Python's `help()` in ASCII, as two parts: the first nine tenths, the rest."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DemoError(
            f"the demo trains on the text of pydoc_data.topics, which this Python lacks ({error}); "
            "install Python's full standard library"
        ) from error
    joined = "\n\n".join(topics[name] for name in sorted(topics))
    data = torch.frombuffer(bytearray(joined.encode("ascii", "replace")), dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def batches(data: Tensor, size: Size, seed: int, device: torch.device) -> Iterator[tuple]:
    """Endless (ids, targets), each (batch, context), equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(size.context)
    while True:
        start = torch.randint(len(data) - size.context, (size.batch, 1), generator=generator)
        at = start + offsets
        yield data[at].to(device), data[at + 1].to(device)


# ---- Training sides in lockstep -----------------------------------------------------------------


class TrainedModel:
    """One model in training. For each step it records the loss, the sum of the norms of its
    parameters' gradients, and the seconds taken. `memory` is the bytes of one step.
    """

    def __init__(
        self,
        nn: Any,
        size: Size,
        device: torch.device,
        seed: int,
        start: dict | None = None,
        *,
        mode: _mode.Mode = "torch",
        dtype: torch.dtype = torch.float32,
        roll: int = 0,
    ):
        self.nn, self.size, self.device, self.seed, self.mode = nn, size, device, seed, mode
        self.roll = roll  # the rows of each batch are rolled by this number, which makes a twin
        self.model = build(nn, size)
        if start is not None:
            try:
                self.model.load_state_dict(start)
            except RuntimeError as error:
                why = str(error).replace("\n", " ")
                raise DemoError(f"the sides cannot start from equal weights: {why}") from error
        self.model.to(device, dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=size.lr, betas=(0.9, 0.95))
        self.losses: list[float] = []
        self.gradients: list[float] = []
        self.seconds: list[float] = []
        self.memory: int | None = None

    def _pass(self, ids: Tensor, targets: Tensor) -> Tensor:
        step = len(self.losses)
        warm = min(1.0, (step + 1) / (1 + self.size.steps // 20))
        for group in self.optimizer.param_groups:
            group["lr"] = self.size.lr * warm * (1 - 0.9 * step / self.size.steps)
        torch.manual_seed(self.seed * 1_000_003 + step)  # the same dropout on every side
        if self.roll:
            ids, targets = ids.roll(self.roll, 0), targets.roll(self.roll, 0)
        with fastnn.backend(self.mode):
            loss = self.model(ids, targets)
            loss.backward()
        self.optimizer.step()
        return loss.detach()

    def step(self, ids: Tensor, targets: Tensor, weigh: bool) -> None:
        self.optimizer.zero_grad()
        if weigh:
            loss, self.memory = peak_memory(lambda: self._pass(ids, targets), self.device)
        else:
            self._wait()
            began = time.perf_counter()
            loss = self._pass(ids, targets)
            self._wait()
            self.seconds.append(time.perf_counter() - began)
        norms = (p.grad.double().norm() for p in self.model.parameters() if p.grad is not None)
        self.gradients.append(sum(norms, loss.new_zeros((), dtype=torch.float64)).item())
        self.losses.append(loss.item())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def evaluate(self, data: Tensor, count: int) -> float:
        """Mean loss over `count` fixed batches of `data`, without dropout."""
        self.model.eval()
        with fastnn.backend(self.mode):
            pairs = itertools.islice(batches(data, self.size, 0, self.device), count)
            losses = [self.model(ids, targets).item() for ids, targets in pairs]
        self.model.train()
        return statistics.fmean(losses)

    @torch.no_grad()
    def sample(self, length: int) -> str:
        """Text drawn from the model, character by character, from a fixed seed."""
        self.model.eval()
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.tensor([list(PROMPT.encode("ascii"))])
        with fastnn.backend(self.mode):
            for _ in range(length):
                logits = self.model(ids[:, -self.size.context :].to(self.device))[:, -1]
                chances = (logits.cpu().float() / 0.7).softmax(-1)
                ids = torch.cat((ids, torch.multinomial(chances, 1, generator=generator)), 1)
        self.model.train()
        return bytes(ids[0].tolist()).decode("ascii")


def peak_memory(run: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """(result of `run()`, the most bytes of tensors alive at once beyond those held before).

    On a GPU the allocator keeps this figure. On a CPU PyTorch's profiler lists each allocation and
    release, also of temporaries inside operators, and the result is the peak of the running sum.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to stderr otherwise
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return result, max(itertools.accumulate(change for _, change in changes), default=0)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, because the tensors are small. Two threads spin while they wait for
    each other: on two cores with eight busy processes they took seven times as long as one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    sides: dict[str, TrainedModel],
    data: Tensor,
    steps: int,
    on_step: Callable[[int, dict[str, float]], None],
) -> None:
    """Give the same batches to all sides in turn, so that a noisy machine slows all of them."""
    first = next(iter(sides.values()))
    source = batches(data, first.size, first.seed, first.device)
    for step, (ids, targets) in enumerate(itertools.islice(source, steps)):
        order = list(sides)
        if step % 2:
            order[:2] = reversed(order[:2])
        for name in order:
            sides[name].step(ids, targets, weigh=step == min(2, steps - 1))
        on_step(step, {name: side.losses[-1] for name, side in sides.items()})


# ---- The verdict --------------------------------------------------------------------------------


@dataclass
class Verdict:
    """Whether two curves coincide, the rule that was applied, and the figures that decided."""

    coincide: bool
    rule: str
    finding: str
    # For each step under the float64 rule: the distance of both sides, and the distance allowed.
    fastnn_error: list[float] = field(default_factory=list)
    stock_error: list[float] = field(default_factory=list)
    allowed: list[float] = field(default_factory=list)


def judge_bits(curves: dict[str, list[float]]) -> Verdict:
    """Requires equal bits at every step. This is the rule if both sides ran the same code."""
    stock, ours = curves["stock"], curves["fastnn"]
    # repr, because under == nan differs from itself, and 0.0 equals -0.0.
    apart = [i for i, (a, b) in enumerate(zip(stock, ours, strict=True)) if repr(a) != repr(b)]
    finite = all(map(math.isfinite, stock + ours))
    finding = f"all {len(stock)} values have equal bits"
    if apart:
        finding = (
            f"{len(apart)} of {len(stock)} values differ, first at step {apart[0]}: "
            f"stock {stock[apart[0]]!r}, fastnn {ours[apart[0]]!r}"
        )
    elif not finite:
        finding = "a value is not finite"
    return Verdict(not apart and finite, "equal bits at every step", finding)


def judge_rounding(curves: dict[str, list[float]]) -> Verdict:
    """Requires at each step at most twice the largest distance from float64 that stock or a twin
    had so far, plus an ulp."""
    exact = curves["float64"]
    errors = {
        name: [abs(a - b) for a, b in zip(curve, exact, strict=True)]
        for name, curve in curves.items()
    }
    error = errors.pop("fastnn")
    reach = list(itertools.accumulate(map(max, zip(*errors.values(), strict=True)), max))
    ulp = torch.finfo(torch.float32).eps
    allowed = [2 * far + ulp * abs(value) for far, value in zip(reach, exact, strict=True)]
    apart = [i for i, (e, a) in enumerate(zip(error, allowed, strict=True)) if not e <= a]
    ratio = max(error) / max(reach[-1], ulp)
    finding = (
        f"largest distance from float64 is {max(error):.2g}, of stock {reach[-1]:.2g} "
        f"(ratio {ratio:.2f})"
    )
    if apart:
        finding = (
            f"{len(apart)} of {len(error)} values are out of bounds, first at step {apart[0]}: "
            f"{error[apart[0]]:.3g} from float64, {allowed[apart[0]]:.3g} allowed"
        )
    rule = "at most twice the distance of stock from float64 so far, plus an ulp, at each step"
    return Verdict(not apart, rule, finding, error, errors["stock"], allowed)


# ---- Checkpoints --------------------------------------------------------------------------------


@dataclass
class Move:
    """The checkpoint of one side, loaded into a new model of the other side."""

    name: str
    moved: bool
    finding: str


@torch.no_grad()
def move(source: TrainedModel, target: TrainedModel, path: Path, ids: Tensor) -> Move:
    """Save `source`, load it strictly into a new model and optimizer of `target`'s kind, compare.

    Both models then run stock, so equal weights must give logits with equal bits. A weight that did
    not arrive cannot hide in a tolerance.
    """
    name = " -> ".join(getattr(side.nn, "__name__", "?") for side in (source, target))
    torch.save({"model": source.model.state_dict(), "adamw": source.optimizer.state_dict()}, path)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    fresh = TrainedModel(target.nn, target.size, target.device, seed=0)
    try:
        fresh.model.load_state_dict(saved["model"], strict=True)
        fresh.optimizer.load_state_dict(saved["adamw"])
    except (RuntimeError, ValueError) as error:
        return Move(name, False, str(error).replace("\n", " "))
    with fastnn.backend("torch"):
        was, now = source.model.eval()(ids), fresh.model.eval()(ids)
    source.model.train()
    if not torch.equal(was, now):
        return Move(name, False, f"logits differ by up to {(was - now).abs().max():.3g}")
    count = sum(p.numel() for p in fresh.model.parameters())
    return Move(name, True, f"strict, {count:,} weights, logits of equal bits")


# ---- The two comparisons ------------------------------------------------------------------------


@dataclass
class DemoResult:
    """The comparison of stock and fastnn that `fastnn demo` shows, plots and writes."""

    title: str
    device: str
    mode: str
    size: Size
    losses: dict[str, list[float]]
    gradients: dict[str, list[float]]
    loss_verdict: Verdict
    gradient_verdict: Verdict
    validation: dict[str, float]
    step_ms: dict[str, float]
    step_bytes: dict[str, int | None]
    layers: list[dict]  # the rows of `fastnn.explain`
    samples: dict[str, str] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.coincide and all(m.moved for m in self.moves)

    @property
    def coincide(self) -> bool:
        return self.loss_verdict.coincide and self.gradient_verdict.coincide

    @property
    def largest_difference(self) -> float:
        pairs = zip(self.losses["stock"], self.losses["fastnn"], strict=True)
        return max(abs(a - b) for a, b in pairs)

    def as_dict(self) -> dict:
        more = {"passed": self.passed, "largest_difference": self.largest_difference}
        return {**asdict(self), **more}


def explained(side: TrainedModel, ids: Tensor, targets: Tensor) -> list[dict]:
    """`fastnn.explain` of one training call, as dictionaries."""
    with fastnn.backend(side.mode):
        rows = fastnn.explain(side.model, ids, targets)
    return [{k: getattr(row, k) for k in ("layer", "op", "path", "reason")} for row in rows]


def compare(
    size: Size,
    *,
    mode: _mode.Mode,
    device: torch.device,
    seed: int,
    title: str,
    ours: ModuleType | Any = fastnn,
    out: Path | None = None,
    sample: int = 0,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> DemoResult:
    """Train stock beside fastnn, and judge. If kernels may run, also train float64 and twins.

    `ours` is the namespace of the second side. Checkpoints are saved and moved if `out` is given.
    """
    training, held_out = text()
    torch.manual_seed(seed)
    start = build(torch.nn, size).state_dict()
    may_run_kernels = mode == "triton" or device.type == "cuda"
    sides = {
        "stock": TrainedModel(torch.nn, size, device, seed, start),
        "fastnn": TrainedModel(ours, size, device, seed, start, mode=mode),
    }
    if may_run_kernels:
        if size.dropout:
            raise ValueError("compare: dropout must be 0 where kernels run; their masks differ")
        sides["float64"] = TrainedModel(torch.nn, size, device, seed, start, dtype=torch.float64)
        for roll in range(1, min(TWINS + 1, size.batch)):
            sides[f"twin {roll}"] = TrainedModel(torch.nn, size, device, seed, start, roll=roll)
    train(sides, training, size.steps, on_step)

    losses = {name: side.losses for name, side in sides.items()}
    gradients = {name: side.gradients for name, side in sides.items()}
    judge = judge_rounding if may_run_kernels else judge_bits
    both = {name: sides[name] for name in ("stock", "fastnn")}
    ids, targets = next(batches(held_out, size, 1, device))
    count = 1 + size.steps // 20
    result = DemoResult(
        title=title,
        device=device.type,
        mode=mode,
        size=size,
        losses=losses,
        gradients=gradients,
        loss_verdict=judge(losses),
        gradient_verdict=judge(gradients),
        validation={name: side.evaluate(held_out, count) for name, side in both.items()},
        step_ms={n: 1e3 * statistics.median(s.seconds or [math.nan]) for n, s in both.items()},
        step_bytes={name: side.memory for name, side in both.items()},
        layers=explained(sides["fastnn"], ids, targets),
    )
    if sample:
        result.samples = {name: side.sample(sample) for name, side in both.items()}
    if out is not None:
        a, b = both.values()
        result.moves = [move(a, b, out / "stock.pt", ids), move(b, a, out / "fastnn.pt", ids)]
    return result


# ---- Kernels without a GPU ----------------------------------------------------------------------
#
# Triton decides at import whether to interpret, so this needs a second process. The process reports
# one JSON object per line: {"step": ..., "losses": ...} in training, {"result": ...} at the end.


def compare_interpreted(
    size: Size, seed: int, on_step: Callable[[int, dict[str, float]], None]
) -> DemoResult:
    """`compare` with kernels interpreted on the CPU, in a separate process."""
    environment = {k: v for k, v in os.environ.items() if k != "FASTNN_BACKEND"}
    environment["TRITON_INTERPRET"] = "1"
    job = json.dumps({**asdict(size), "seed": seed})
    command = [sys.executable, "-m", "fastnn._cli.training", job]
    result = None
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as worker:
            assert worker.stdout is not None
            try:
                for line in worker.stdout:
                    message = json.loads(line)
                    if "step" in message:
                        on_step(message["step"], message["losses"])
                    else:
                        result = message["result"]
            except BaseException:
                worker.kill()
                raise
        if result is None:
            errors.seek(0)
            last = errors.read().strip().splitlines() or [f"exit status {worker.returncode}"]
            raise DemoError(f"training with interpreted kernels failed: {last[-1]}")
    for key in ("passed", "largest_difference"):
        del result[key]
    result["size"] = Size(**result["size"])
    for key in ("loss_verdict", "gradient_verdict"):
        result[key] = Verdict(**result[key])
    return DemoResult(**result)


def _worker(options: dict) -> None:
    from fastnn.testing import interpreter

    interpreter.install()
    seed = options.pop("seed")

    def on_step(step: int, losses: dict[str, float]) -> None:
        print(json.dumps({"step": step, "losses": losses}), flush=True)

    with one_thread():
        result = compare(
            Size(**options),
            mode="triton",
            device=torch.device("cpu"),
            seed=seed,
            title="kernels, interpreted",
            on_step=on_step,
        )
    print(json.dumps({"result": result.as_dict()}), flush=True)


if __name__ == "__main__":
    _worker(json.loads(sys.argv[1]))
