"""Tiles of attention are computed from the table of GPUs, and every rule and exception is used."""

import itertools
from dataclasses import replace
from unittest import mock

import pytest

from fastnn import kernels
from fastnn.kernels import _gpus

SIZES = (16, 20, 32, 64, 80, 128, 192, 256)


def shapes(arch, itemsize=2, heads=(16, 256)):
    Shape = kernels.attention_config.Shape
    for D, *flags in itertools.product(SIZES, *[(False, True)] * 4):
        masked = flags[0]
        for mask in (0, itemsize, 4) if masked else (0,):
            shape = Shape(256, D, D, itemsize, arch, *flags, mask)
            if heads[0] <= shape.d <= heads[1]:
                yield shape


def formula(kind, shape):
    return kernels.attention_config.config.formula(kind, shape)


def rules():
    A = kernels.attention_config
    return [(name, rule) for name in ("RULES", "EXCEPTIONS") for rule in getattr(A, name)]


def test_every_rule_and_exception_changes_an_answer():
    A = kernels.attention_config
    for name, rule in rules():
        assert rule.why and set(rule.kinds) <= set(A.KINDS) and set(rule.gpus) <= set(_gpus.GPUS)
        others = tuple(r for r in getattr(A, name) if r is not rule)
        for arch, kind in itertools.product(rule.gpus or _gpus.GPUS, rule.kinds):
            asked = [s for s in shapes(arch, heads=rule.heads) if rule.holds(kind, s)]
            before = [formula(kind, s) for s in asked]
            with mock.patch.object(A, name, others):
                if before != [formula(kind, s) for s in asked]:
                    break
        else:
            pytest.fail(f"nothing needs the rule {rule.why!r} for {rule.kinds}")


@pytest.mark.parametrize("shared", [48, 64, 99, 163])
def test_shared_memory_holds_the_tiles_of_a_new_gpu(shared):
    """Only a tile of 64 with a single stage may need more, because nothing smaller is tried."""
    A = kernels.attention_config
    size = shared * _gpus.KIB
    new = replace(_gpus.GPUS["sm_80"], name="sm_199", shared_per_block=size)
    smaller = 0
    with mock.patch.dict(_gpus.GPUS, {"sm_199": new}):
        for kind, shape in itertools.product(A.KINDS, shapes("sm_199")):
            chosen = formula(kind, shape)
            smaller += chosen != formula(kind, shape._replace(arch="sm_80"))
            least = max(chosen["BLOCK_M"], chosen["BLOCK_N"]) <= 64 and chosen["num_stages"] == 1
            assert least or A.shared_memory(kind, shape, chosen) <= size, (kind, shape, chosen)
    assert bool(smaller) == (shared < 163)


def test_a_float32_mask_takes_room_of_the_forward():
    """With 16-bit keys and values on a GPU of 99 KiB: the tile of a 16-bit mask was too large."""
    A = kernels.attention_config
    shape = A.Shape(256, 64, 64, 2, "sm_86", masked=True, mask_itemsize=2)
    assert formula("fwd", shape)["BLOCK_M"] == 128
    assert formula("fwd", shape._replace(mask_itemsize=4))["BLOCK_M"] == 64


def test_tiles_can_be_compiled():
    """On every GPU of the table, tiles are powers of two that a tensor core takes, and the warps
    fit into one block."""
    A = kernels.attention_config
    for arch, itemsize, kind in itertools.product((*_gpus.GPUS, "sm_75"), (2, 4), A.KINDS):
        for shape in shapes(arch, itemsize):
            chosen = formula(kind, shape)
            assert chosen["BLOCK_M"] in (16, 32, 64, 128) and chosen["BLOCK_N"] in (16, 32, 64, 128)
            assert chosen["num_warps"] in (4, 8) and chosen["num_stages"] in (1, 2, 3)
            assert chosen.get("maxnreg", 255) == 255
