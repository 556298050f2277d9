"""Compares the roofs of kernels with times that others published, without a GPU.

    python -m tools.calibrate CLONE [--only NAME] [--json FILE]

CLONE is a clone of https://github.com/linkedin/Liger-Kernel with its history. Its contributors
measured their Triton kernels on GPUs and keep the times in benchmark/data/all_benchmark_data.csv.
`FIGURES` has some of these times, of an H100 SXM, and for each the commit that added it. The script
takes the kernels of that commit out of the clone, compiles what the published benchmark calls, and
counts (`fastnn.testing.roof`). No kernel runs. What the call runs in PyTorch's own operators counts
by its bytes on both sides of the comparison.

Two predictions are compared with each time:

- bytes: the bytes of all launches at 3.05 TB/s, and 6 us for each launch;
- roofs: for each launch the part of the GPU that needs longest, and 6 us.

The 3.05 TB/s and the 6 us were read off two of these kernels, which are marked. Their agreement
shows nothing. The published times of one kernel are not independent of each other.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

DATA = "benchmark/data/all_benchmark_data.csv"


class Figure(NamedTuple):
    """Published times of one kernel: the median of the row with `kernel`, `mode` and `time`."""

    kernel: str
    mode: str
    commit: str
    time: str
    """The timestamp of the first row."""
    us: dict[int, float]
    """Size on the horizontal axis -> microseconds."""
    fitted: bool = False
    """Whether a constant of the model was read off these times."""


# Times of less than 25 us are left out: the host and the launch are most of them. So are kernels
# that add by atomics (the backward of layer_norm), which the emulator does not know.
FIGURES = (
    Figure(
        "layer_norm", "forward", "6a2c49130ed2464bdcb45ec7d3091e0a384115ee", "2025-07-17 18:18:11",
        {2048: 29.2, 4096: 51.0, 8192: 94.8, 16384: 184.8}, fitted=True,
    ),
    Figure(
        "relu_squared", "forward", "39a1f454f36a0271754913d8cb05e984b00f2026",
        "2026-03-27 06:09:27", {4096: 27.9, 8192: 50.2, 16384: 94.4}, fitted=True,
    ),
    Figure(
        "relu_squared", "backward", "39a1f454f36a0271754913d8cb05e984b00f2026",
        "2026-03-27 06:09:42", {4096: 39.4, 8192: 72.4, 16384: 137.1},
    ),
    Figure(
        "megatron_rms_norm", "forward", "27fe47e2ee4eec6aca68e1637e7aec0574e41308",
        "2026-06-10 21:03:37", {4096: 29.2, 8192: 50.9, 16384: 95.0},
    ),
    Figure(
        "megatron_cross_entropy", "forward", "80f19ad741142749515ff30440adf2918f5530ce",
        "2026-06-15 22:13:03", {4096: 138.6, 8192: 262.6, 16384: 415.8, 32768: 809.8},
    ),
    Figure(
        "megatron_swiglu", "forward", "2120862ba532c9449e72d603ba6324310ae756e7",
        "2026-07-26 00:09:43",
        {2048: 39.6, 4096: 72.5, 8192: 137.1, 16384: 267.0, 32768: 527.5},
    ),
    Figure(
        "tvd", "forward", "5c9cecc85c20473aaf2c00b789c6804469319960", "2026-03-03 23:02:50",
        {4096: 275.7, 8192: 533.9, 16384: 1051.2, 32768: 2098.7},
    ),
    Figure(
        "llama4_rope", "forward", "10b6cdec8f2dd899aa2d1548ee8956d0ff64403d",
        "2025-08-07 21:42:10", {8192: 216.5, 16384: 417.6},
    ),
)  # fmt: skip


# ---- what the published benchmarks call ---------------------------------------------------------


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).requires_grad_(grad)


def _layer_norm(n: int) -> Callable:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    x = _empty(4096, n, dtype=torch.float32)
    weight, bias = (_empty(n, dtype=torch.float32) for _ in range(2))
    return lambda: LigerLayerNormFunction.apply(x, weight, bias, 1e-6)


def _relu_squared(n: int) -> Callable:
    from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction

    x = _empty(4096, n)
    return lambda: LigerReLUSquaredFunction.apply(x)


def _megatron_rms_norm(n: int) -> Callable:
    from liger_kernel.megatron import LigerMegatronRMSNorm

    config = SimpleNamespace(
        normalization="RMSNorm", sequence_parallel=False, layernorm_zero_centered_gamma=False
    )
    layer = LigerMegatronRMSNorm(config=config, hidden_size=n, eps=1e-6).to(torch.bfloat16)
    x = _empty(4096, 1, n)
    return lambda: layer(x)


def _megatron_cross_entropy(n: int) -> Callable:
    from liger_kernel.megatron import LigerMegatronCrossEntropy

    loss = LigerMegatronCrossEntropy()
    logits, target = _empty(2048, 4, n), torch.zeros(2048, 4, dtype=torch.int64)
    return lambda: loss(logits, target, tp_group=None)


def _megatron_swiglu(n: int) -> Callable:
    from liger_kernel.megatron import LigerMegatronSwiGLU

    layer = LigerMegatronSwiGLU()
    x = _empty(2048, 4, 2 * n)
    return lambda: layer(x, None, False, False)


def _tvd(n: int) -> Callable:
    from liger_kernel.ops.tvd import LigerTVDLossFunction

    p = _empty(8 * 2048, n, dtype=torch.float32)
    q = _empty(8 * 2048, n, dtype=torch.float32, grad=False)
    return lambda: LigerTVDLossFunction.apply(p, q, None, "batchmean", -100)


def _llama4_rope(n: int) -> Callable:
    from liger_kernel.ops.llama4_rope import LigerLlama4RopeFunction

    width = 8192 // 32
    q, k = _empty(1, n, 32, width), _empty(1, n, 8, width)
    turns = torch.empty(1, n, width // 2, dtype=torch.complex64)
    return lambda: LigerLlama4RopeFunction.apply(q, k, turns)


CALLS: dict[str, Callable[[int], Callable]] = {
    "layer_norm": _layer_norm,
    "relu_squared": _relu_squared,
    "megatron_rms_norm": _megatron_rms_norm,
    "megatron_cross_entropy": _megatron_cross_entropy,
    "megatron_swiglu": _megatron_swiglu,
    "tvd": _tvd,
    "llama4_rope": _llama4_rope,
}


# ---- one figure, in a process of its own --------------------------------------------------------


def counted(kernel: str, mode: str, size: int) -> dict[str, Any]:
    """The launches of a call, and the bytes of PyTorch's operators in it."""
    from fastnn.testing.meter import AtenTraffic
    from fastnn.testing.roof import CompiledLaunch, capture_any, roof

    launches: list[CompiledLaunch] = []
    call = CALLS[kernel](size)
    if mode == "forward":
        with capture_any(launches), AtenTraffic() as aten:
            call()
    else:
        with capture_any([]):
            result = call()
            given = torch.empty_like(result)
        with capture_any(launches), AtenTraffic() as aten:
            result.backward(given)
    roofs = [roof(x) for x in launches]
    return {
        "launches": [{"kernel": r.kernel, "us": r.us, "worst": r.worst} for r in roofs],
        "aten_bytes": aten.cost.bytes,
        "aten_launches": aten.cost.launches,
        "aten": [op.name for op in aten.ops],
    }


# ---- the comparison -----------------------------------------------------------------------------


def _extracted(clone: Path, commit: str, into: Path) -> Path:
    """The sources of Liger at `commit`."""
    found = subprocess.run(
        ["git", "-C", str(clone), "archive", commit, "src/liger_kernel"],
        check=True,
        capture_output=True,
    )
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(into, filter="data")
    return into / "src"


def _counted_apart(source: Path, figure: Figure, size: int) -> dict[str, Any]:
    path = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = subprocess.run(
        [sys.executable, "-m", "tools.calibrate", "--count", figure.kernel, figure.mode, str(size)],
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise RuntimeError(f"{figure.kernel} of {size}:\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def compared(clone: Path, only: str = "") -> list[dict[str, Any]]:
    """A record for each published time: what was published, and what both predictions say."""
    from fastnn.kernels import _gpus
    from fastnn.testing.meter import LAUNCH_US

    rows = []
    for figure in FIGURES:
        if only not in figure.kernel:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = _extracted(clone, figure.commit, Path(folder))
            for size, published in figure.us.items():
                found = _counted_apart(source, figure, size)
                launches = found["launches"]
                rest = found["aten_bytes"] / _gpus.GPUS["sm_90"].reached * 1e6
                rest += LAUNCH_US * (found["aten_launches"] + len(launches))
                rows.append(
                    {
                        **figure._asdict(),
                        "size": size,
                        "us": published,
                        "bytes_us": sum(x["us"]["dram"] for x in launches) + rest,
                        "roofs_us": sum(max(x["us"].values()) for x in launches) + rest,
                        "worst": launches[0]["worst"] if launches else "",
                        "aten": found["aten"],
                    }
                )
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _share(values: list[float], within: float) -> str:
    return f"{sum(abs(v - 1) <= within for v in values)} of {len(values)}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each kernel, and one for all whose times fitted no constant."""
    lines = [
        "| kernel | commit | published us | bytes: median, worst | roofs: median, worst |",
        "| --- | --- | ---: | ---: | ---: |",
    ]

    def cells(chosen: list[dict[str, Any]]) -> list[str]:
        found = []
        for way in ("bytes_us", "roofs_us"):
            ratios = [r[way] / r["us"] for r in chosen]
            worst = max(ratios, key=lambda v: max(v, 1 / v))
            found.append(f"{statistics.median(ratios):.2f}, {worst:.2f}")
        return found

    for kernel, mode in dict.fromkeys((r["kernel"], r["mode"]) for r in rows):
        chosen = [r for r in rows if (r["kernel"], r["mode"]) == (kernel, mode)]
        mark = " (fitted)" if chosen[0]["fitted"] else ""
        spread = f"{min(r['us'] for r in chosen):.0f} to {max(r['us'] for r in chosen):.0f}"
        name = f"{kernel} {mode}{mark}"
        lines.append(
            "| " + " | ".join([name, chosen[0]["commit"][:8], spread, *cells(chosen)]) + " |"
        )
    held = [r for r in rows if not r["fitted"]]
    if held:
        name = f"all that fitted nothing, {len(held)} times"
        lines.append("| " + " | ".join([name, "", "", *cells(held)]) + " |")
        for way in ("bytes", "roofs"):
            ratios = [r[f"{way}_us"] / r["us"] for r in held]
            lines.append(f"\n{way}: within 5 % {_share(ratios, 0.05)}, ")
            lines[-1] += f"within 15 % {_share(ratios, 0.15)}"
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("clone", type=Path, nargs="?", help="a clone of Liger-Kernel")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--count", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.count:
        kernel, mode, size = chosen.count
        print(json.dumps(counted(kernel, mode, int(size))))
        return 0
    if chosen.clone is None:
        parser.error("CLONE is missing: a clone of https://github.com/linkedin/Liger-Kernel")
    rows = compared(chosen.clone, chosen.only)
    if chosen.json:
        chosen.json.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    print(table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
