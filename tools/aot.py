"""Compiles the launches of the rows for GPUs that are not present, and looks for known faults.

`python -m tools.aot [target ...]` compiles all launches, for every target or for those named. It
prints the table and says what is wrong. With `--into PAGE.md` it also writes one line per kernel
between the markers of that page. The rows make about 4000 specialisations, and a compile takes a
third of a second. With `--share` it therefore compiles only specialisations that differ in what
decides on registers and shared memory, each for one of the targets. It launches rows in float16
only if they do not run in bfloat16.
"""

import itertools
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
import triton
from torch.utils._pytree import tree_leaves

import fastnn
import fastnn.functional
from fastnn import _gate
from fastnn.testing.aot import TARGETS, code_faults, compile_only, summary, table

# Kernels that need not run at the speed of memory: they gather, multiply matrices, or only pool
# partial sums.
NOT_STREAMING = (
    "attention",
    "embedding",
    "gemm",
    "nll_loss",
    "unpool",
    "channel_pool",
    "channel_totals",
    "conv_direct_weight",
)
NOT_STREAMING += ("fold",)  # and unfold


def attention_is_stocks(target):
    """Whether attention runs stock in `auto` on that target, because its kernels spill there."""
    architecture = TARGETS[target].architecture
    return _gate.crossover("scaled_dot_product_attention", architecture).least == math.inf


def streams(record):
    """Whether the accesses of a kernel should be wide. `UNIT` and `*_VEC` divide its sizes."""
    element = int(re.search(r"\d+", next(iter(record.signature.values())))[0]) // 8
    divisors = [v for k, v in record.constexprs.items() if k == "UNIT" or k.endswith("_VEC")]
    gathers = any(word in record.kernel for word in NOT_STREAMING)
    if record.constexprs.get("C") == record.constexprs.get("S") == 1:  # a PReLU of one element
        return False
    if record.kernel in ("_loss_fwd_kernel", "_loss_bwd_kernel"):
        # All tensors are read through strides: each one is broadcast, or has gaps.
        there = [t for t in "ABCW" if t in record.signature]
        gathers = all(f"{t.lower()}2" in record.signature for t in there)
    if record.kernel.startswith(("_pool_", "_cells_", "_doubled_")):
        gathers = not record.constexprs["LAST"]  # else lanes are windows apart
        divisors.append(record.constexprs.get("C_UNIT", 16))
    return not gathers and all(divisor * element >= 16 for divisor in divisors)


class Share:
    """Chooses the first and then every sixteenth variety of each kernel, others for each target.

    A variety has a new combination of pointer types, tile and warps, or a new value of another
    constexpr. fp16 counts as bf16, because the two differ in one instruction.
    """

    def __init__(self, target):
        self.index = list(TARGETS).index(target)
        self.number = defaultdict(itertools.count)
        self.answers = {}
        self.seen = set()

    def __call__(self, what):
        types = tuple(t.replace("fp16", "bf16") for t in what.signature.values() if t[0] == "*")
        sizes = {k: v for k, v in what.constexprs.items() if type(v) is int and v >= 16}
        options = {k: str(v) for k, v in what.constexprs.items() if k not in sizes}
        features = {(what.kernel, *option) for option in options.items()}
        features.add((what.kernel, types, what.num_warps, math.prod(sizes.values())))
        key = (types, what.num_warps, *sizes.items(), *options.items(), what.kernel)
        if key not in self.answers:
            novel = not features <= self.seen
            self.seen |= features
            n = next(self.number[what.kernel]) if novel else None
            self.answers[key] = n == 0 or (novel and n % 16 == self.index)
        return self.answers[key]


def launch(case, dtype):
    """Run a row forward and backward. The results of its kernels are missing."""
    given = {k: v(dtype, "cpu") if callable(v) else v for k, v in case.options.items()}
    if case.is_layer:
        members = [member(fastnn) for member in case.members]
        call = getattr(fastnn, case.name)(*members, **given).to(dtype).train(case.train)
        given = {}
    else:
        call = getattr(fastnn.functional, case.name)
    first, *rest = case.make(dtype, "cpu")
    if case.view is not None:
        first = case.view(first)
    with torch.autocast("cpu", case.autocast, enabled=case.autocast is not None):
        out = call(first, *rest, **given)
    outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.autograd.backward(outs, [torch.ones_like(t) for t in outs])


def launch_attention():
    """Run attention with real head sizes, forward and backward, as `launch` runs a row."""
    L, S = 256, 264
    wide = torch.zeros(L, S)  # this takes twice the shared memory
    masks = (None, torch.ones(L, S, dtype=torch.bool), wide.bfloat16(), wide)
    for D, mask, causal, p, groups in itertools.product(
        (64, 128), masks, (False, True), (0.0, 0.1), (1, 2)
    ):
        if (causal and mask is not None) or (mask is wide and (p or groups > 1)):
            continue
        q = torch.zeros(2, 4, L, D, dtype=torch.bfloat16, requires_grad=True)
        k, v = torch.zeros(2, 2, 4 // groups, S, D, dtype=torch.bfloat16, requires_grad=True)
        if mask is not None and mask.is_floating_point():
            mask = mask.detach().requires_grad_()
        out = fastnn.functional.scaled_dot_product_attention(
            q, k, v, mask, p, is_causal=causal, enable_gqa=groups > 1
        )
        out.backward(torch.zeros_like(out))


def compile_rows(target, wanted=None):
    """(records, faults in words) of all rows in all their dtypes, and of `launch_attention`."""
    from fastnn.testing.cases import CASES

    with compile_only(target, wanted) as records, fastnn.backend("triton"):
        for case in CASES:
            if case.stock is None:
                for dtype in case.dtypes:
                    # a share counts fp16 as bf16
                    if not (wanted and dtype == torch.float16 and torch.bfloat16 in case.dtypes):
                        launch(case, dtype)
        if not attention_is_stocks(target):
            launch_attention()
    faults = []
    for record in records:
        if record.kernel.startswith("_attention") and attention_is_stocks(target):
            continue
        wrong = code_faults(record, streaming=streams(record))
        faults += ["WRONG: " + "; ".join(wrong) + "\n" + table([record])] if wrong else []
    return records, faults


MARKED = re.compile(r"(<!-- compiled -->\n).*(<!-- /compiled -->\n)", re.S)


def put(records, path):
    """Write the summary of the records into a page, with the versions that compiled them."""
    total = f"{len(records)} compiled by Triton {triton.__version__}, torch {torch.__version__}."
    text = f"\n{total}\n\n{summary(records)}\n"
    page = Path(path)
    page.write_text(MARKED.sub(lambda m: m[1] + text + m[2], page.read_text()))


def main(arguments: list[str]) -> int:
    share = "--share" in arguments
    into = arguments[arguments.index("--into") + 1] if "--into" in arguments else None
    failed, everything = False, []
    compiled = [name for name, target in TARGETS.items() if target.facts.compiled_from]
    for target in [a for a in arguments if a in TARGETS] or compiled:
        found, faults = compile_rows(target, Share(target) if share else None)
        print(table(found), *faults, f"{target}: {len(found)} compiled", sep="\n")
        failed = failed or bool(faults)
        everything += found
    if into:
        put(everything, into)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
