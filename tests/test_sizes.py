"""Every dimension of every row at 0 and at 1, with every reduction, compared with stock.

The op calls of the parity rows are made again with another size of one dimension. Dimensions with
the same size may be the same dimension. The size is therefore changed in all of them together, and
then in one alone, which stock mostly rejects. Where stock raises, ours raises the same error. Where
stock does not raise, values, gradients, dtypes and strides are those of stock.
`python -m tests.test_sizes all` makes all calls, `pytest` those of the first rows of each op.
"""

import sys
import time
from collections import Counter

import pytest
import torch
from torch import Tensor

from fastnn.ops import REGISTRY
from fastnn.testing import meter
from tests.calls import Call, attempt, differences, recorded
from tests.marks import interpreted
from tests.parts import part

ROWS = 4  # rows of each op in pytest
FEWER = {"conv2d": 2, "conv3d": 1, "conv_transpose2d": 1, "conv_transpose3d": 1}  # as conv1d
FEWER |= {"conv_act": 2}

# Differences from stock that stay, by op and words of the difference: see docs/design.md.
KNOWN = {
    ("binary_cross_entropy_with_logits", "(stock is 0 away)"): "stock adds a tiny term to 1",
    ("multi_margin_loss", "finite where stock is not"): "of no rows, stock leaves a sum unwritten",
    ("multilabel_margin_loss", "finite where stock is not"): "the same",
}
# In these calls stock on a CPU reads and writes outside its tensors, and corrupts the process.
LEFT_OUT = {"scaled_dot_product_attention": "query, key or value alone without elements"}


def _safe(call: Call) -> bool:
    """Whether stock on a CPU stays inside its tensors: it does not check the labels of CTC, nor the
    indices of maxima of bags, nor whether there are bags, nor the sizes of packed sequences."""
    if call.op.name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return all(t.is_floating_point() for t in call.tensors().values())
    if call.op.name == "ctc_loss":
        most, indices = call.arguments["log_probs"].shape[-1], call.arguments["targets"]
    elif call.op.name == "embedding_bag":
        most, indices = call.arguments["weight"].shape[0], call.arguments["input"]
        offsets = call.arguments.get("offsets")
        if offsets is not None and offsets.numel() <= 1:
            return False
    else:
        return True
    return not indices.numel() or bool(indices.max() < most)


def _known(name, difference):
    return any(op == name and words in difference for op, words in KNOWN)


def _resized(t: Tensor, shape) -> Tensor:
    """Values of `t` in a shape with no larger size."""
    return t[tuple(slice(size) for size in shape)].clone(memory_format=torch.contiguous_format)


def resized(call: Call, sizes: dict[str, tuple]) -> Call:
    copies: dict[int, Tensor] = {}
    made = {}
    for name, shape in sizes.items():
        t = call.arguments[name]
        made[name] = copies.setdefault(id(t), _resized(t, shape)) if shape != t.shape else t
    return call.with_(**made)


def variants(call: Call):
    """(the change, the call) for each size of a dimension, at 0 and at 1."""
    tensors = call.tensors()
    for to in (0, 1):
        for size in sorted({s for t in tensors.values() for s in t.shape if s > to}):

            def new(s, size=size, to=to):
                if isinstance(s, Tensor):  # in a tuple, as the states of an LSTM
                    return _resized(s, tuple(map(new, s.shape)))
                return to if s == size else s

            shapes = {k: tuple(map(new, t.shape)) for k, t in tensors.items()}
            every = resized(call, shapes)
            changed = {
                k: type(v)(map(new, v))
                for k, v in call.arguments.items()
                if isinstance(v, (tuple, list)) and not isinstance(v, torch.Size)
            }
            yield f"{size} to {to}", every.with_(**changed)
        for k, t in tensors.items():
            for d, s in enumerate(t.shape):
                if s > to and not (to == 0 and call.op.name in LEFT_OUT):
                    shape = (*t.shape[:d], to, *t.shape[d + 1 :])
                    yield f"{k}.shape[{d}] to {to}", resized(call, {k: shape})
    yield "as it is", call


def _valid(call: Call) -> Call:
    """The call. If an index is no longer valid, all indices become 0."""
    stock = attempt(call, call.op.stock, {})
    if isinstance(stock.error, (IndexError, RuntimeError)) and "out of" in str(stock.error):
        integers = {
            k: torch.zeros_like(t)
            for k, t in call.tensors().items()
            if not t.is_floating_point() and t.dtype != torch.bool
        }
        return call.with_(**integers)
    return call


def _reductions(call: Call):
    given = call.arguments.get("reduction")
    if given is None:
        return [call]
    more = ("batchmean",) if call.op.name == "kl_div" else ()
    return [call.with_(reduction=r) for r in ("none", "mean", "sum", *more)]


def sweep(name: str, every: bool):
    counts: Counter = Counter()
    wrong, stock, seen = [], [], set()
    calls = recorded().get(name, [])
    for call in calls if every else calls[: FEWER.get(name, ROWS)]:
        for what, changed in variants(call):
            if not _safe(changed):
                counts["left out"] += 1
                continue
            for again in _reductions(changed):
                key = str(
                    [
                        (k, v.shape if isinstance(v, Tensor) else v)
                        for k, v in again.arguments.items()
                    ]
                )
                if key in seen:
                    continue
                seen.add(key)
                with meter.traffic(distinct=False):
                    path, found = differences(_valid(again), {})
                counts[path if path in ("kernel", "error") else "stock"] += 1
                if path not in ("kernel", "error"):
                    stock.append(path)
                reduction = again.arguments.get("reduction", "")
                if any(_known(name, w) for w in found):
                    counts["differs as docs say"] += 1
                found = [w for w in found if not _known(name, w)]
                wrong += [f"{what} {reduction}: {w}   [{call.row}]" for w in found]
    return counts, wrong, stock


@interpreted
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_dimensions_of_no_and_of_one_element(name, record_property):
    counts, wrong, _ = sweep(name, every=False)
    record_property("sizes", tuple(counts.items()))
    assert not wrong, "\n".join(wrong)
    assert counts["kernel"], f"{name}: no row has it on kernels"


if __name__ == "__main__":
    from fastnn.testing import interpreter

    interpreter.install()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    total: Counter = Counter()
    names = part(sorted(REGISTRY), sys.argv)  # --part K/N
    for name in sys.argv[2:] or names:
        start = time.process_time()
        counts, wrong, stock = sweep(name, every=sys.argv[1:2] == ["all"])
        total += counts
        print(f"{name}: {dict(counts)} in {time.process_time() - start:.1f} s", flush=True)
        for line in wrong:
            print("   ", line)
        for line, k in Counter(stock).items():
            print("    stock:", k, line)
    print(dict(total))
