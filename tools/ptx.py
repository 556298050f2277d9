"""Runs rows on the CPU, on the code that Triton compiled for GPUs that are not present.

`python -m tools.ptx [target ...]` runs all rows, and rows as wide as those of models, on the code
for every target or for those named. With `--share TARGET` it runs about a fortieth of them: a row
of every second op or layer, and the next target a row of each of the others. All rows run twice,
for equal bits; those of a share run once.
"""

import itertools
import sys

import torch

from fastnn.testing import Case, check, classes, randn
from fastnn.testing.aot import emulate

EMULATED = ("cuda:80", "cuda:90")


def parity():
    from fastnn.testing.cases import CASES

    return [(case, dtype) for case in CASES if case.stock is None for dtype in case.dtypes]


def rows():
    return parity() + [(case, torch.bfloat16) for case in of_real_widths()]


def keep(*shape):
    """Maker of a mask that keeps four of five elements."""
    return lambda dtype, device: (torch.rand(shape) > 0.2).to(device)


def of_real_widths():
    """A few rows as wide as those of models, for the tiles, loops and stages that a GPU runs."""
    L, S = 150, 200
    for D, mask, causal, p, groups in itertools.product(
        (64, 128), (None, keep(L, S), randn(L, S)), (False, True), (0.0, 0.1), (1, 2)
    ):
        if not (causal and mask):
            options = {"dropout_p": p, "is_causal": causal, "enable_gqa": groups > 1}
            keys = (randn(1, 2 // groups, S, D) for _ in range(2))
            options |= {"attn_mask": mask} if mask else {}
            yield Case("scaled_dot_product_attention", (randn(1, 2, L, D), *keys), options)
    for n in (768, 1600, 4096, 8192, 12288, 50000):
        yield Case("LayerNorm", (randn(5, n),), {"normalized_shape": n})
        yield Case("RMSNorm", (randn(5, n),), {"normalized_shape": n})
    for n in (1000, 32000, 50257, 128256):
        yield Case("CrossEntropyLoss", (randn(3, n), classes(3, high=n)))
        yield Case("Softmax", (randn(3, n),), {"dim": -1})
    for shape, groups in (((8, 64, 7, 7), 32), ((2, 16, 56, 56), 4), ((1, 320, 64, 64), 32)):
        yield Case("BatchNorm2d", (randn(*shape),), {"num_features": shape[1]})
        options = {"num_groups": groups, "num_channels": shape[1]}
        yield Case("GroupNorm", (randn(*shape),), options)
    for act in ("GELU", "ReLU", "SiLU"):
        members = (
            lambda nn: nn.Linear(256, 384),
            lambda nn, act=act: getattr(nn, act)(),
            lambda nn: nn.Dropout(0.1),
        )
        yield Case("Sequential", (randn(140, 256),), members=members)
    yield Case("Linear", (randn(300, 768),), {"in_features": 768, "out_features": 512})
    options = {"num_embeddings": 1000, "embedding_dim": 768}
    yield Case("Embedding", (classes(8, 128, high=1000),), options)
    yield Case(
        "dropout_add_layer_norm",
        (randn(16, 768), randn(16, 768), (768,), randn(768), randn(768)),
        {"p": 0.1, "training": True},
    )


# Rows that a share leaves out. The run of all rows tells them.
LEFT_OUT = {
    "lp_pool2d(1x1x4x4, 3.5": "libdevice's pow errs more than the pow of a CPU, which is the"
    " reference here; PyTorch uses libdevice's on a GPU",
}


def shared(target):
    """Of every second name one row for each 80, and a few of the wide rows. Compiling takes most of
    the time, so all names are in the shares of two targets, and few of them twice."""
    turn = EMULATED.index(target) % 2
    named = {}
    for row in parity():
        if any(part in str(row[0]).lower() for part in LEFT_OUT):
            continue
        named.setdefault(row[0].name, []).append(row)
    chosen = []
    for i, of_name in enumerate(named.values()):
        n = len(of_name)
        if i % 2 == turn or n > 80:
            chosen += [of_name[(37 * i + 80 * k + 17 * turn) % n] for k in range(-(-n // 80))]
    return chosen + [(case, torch.bfloat16) for case in of_real_widths()][turn::20]


def main(arguments):
    share = arguments[:1] == ["--share"]
    targets = arguments[1:] if share else arguments or EMULATED
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory starts as nan
    wrong = 0
    for target in targets:
        chosen = shared(target) if share else rows()
        with emulate(target):
            for case, dtype in chosen:
                try:
                    failures = check(case, dtype, twice=not share).failures
                except (IndexError, NotImplementedError) as e:
                    failures = [f"{type(e).__name__}: {e}"]
                if failures:
                    wrong += 1
                    print("WRONG:", target, case, dtype, *failures, sep="\n  ", flush=True)
        print(f"{target}: {len(chosen)} rows on its code, {wrong} wrong so far", flush=True)
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
