"""Benchmarks: predictions, results and their resumption, the tuning plan, the one GPU command.

No test asserts a figure that only a GPU can give, because the times here are the interpreter's.
"""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn as stock
from torch.utils._pytree import tree_leaves

import fastnn
from fastnn import _gate, _mode
from fastnn.__main__ import main
from fastnn.bench import (
    beside,
    cases,
    gates,
    gpu,
    host,
    liger,
    measure,
    memory,
    models,
    pool,
    predict,
    report,
    roofs,
    run,
    tune,
)  # fmt: skip
from fastnn.ops import REGISTRY
from fastnn.testing.meter import AtenTraffic, Cost, as_on_cuda, nbytes, traffic
from tests.marks import interpreted
from tests.test_aot import compiling
from tools import calibrate

pytestmark = interpreted
BF16, FP32 = torch.bfloat16, torch.float32

GELU = cases.row("GELU", "tiny", 3, 40)
NORM = cases.layer_norm("tiny", 4, 48)
LOSS = cases.cross_entropy("tiny", 4, 33)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, so that small operators do not wait for a second core that others use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- Rows -------------------------------------------------------------------------------------


def test_every_op_has_a_row_and_a_sweep():
    held = set()
    for case in cases.CASES:
        held |= {op for op, _ in tune.gate_work(case.at(1))}
    assert held == set(REGISTRY)
    assert tune.without_rows() == []


def test_rows_have_keys_of_their_own():
    """A result is filed under its row's key. If two rows had one key, the second would not be
    timed."""
    keys = [case.key(dtype) for case, dtype in cases.matching()]
    assert len(set(keys)) == len(keys) >= len(cases.CASES)


def test_a_row_at_another_size_is_the_same_row():
    for case in cases.CASES:
        small, given = (tree_leaves(c.make(FP32, "meta")) for c in (case.at(2), case))
        assert [t.shape[1:] for t in small] == [t.shape[1:] for t in given]
        assert small[0].shape[0] == 2
        # A vector without rows is a parameter, and is the same at every size.
        for one, other in zip(small, given, strict=True):
            assert one.shape[0] == 2 or one.shape == other.shape == one.shape[-1:]


def test_least_bytes_are_those_of_a_copy_for_a_streaming_row():
    x = GELU.make(BF16, "cpu")
    found = run.least_bytes(GELU, GELU.side(stock, BF16, "cpu"), x)
    assert found == {"forward": 2 * nbytes(*x), "forward+backward": 5 * nbytes(*x)}


# ---- Predictions --------------------------------------------------------------------------------


def metered(case, dtype):
    """Bytes of our kernels, forward and backward, every program executed."""
    call = case.side(fastnn, dtype, "cpu")
    with traffic() as log, fastnn.backend("triton"):
        run.both_passes(case, call, case.make(dtype, "cpu"))()
    return log


@pytest.mark.parametrize(
    ("case", "slack"),
    [(cases.row("GELU", "", 300, 200), 0.02), (cases.cross_entropy("", 64, 33), 0.02)],
    ids=str,
)
def test_sampled_programs_account_for_the_whole_grid(case, slack):
    with predict.as_on_the_gpu():
        log = metered(case, BF16)
        forward = (
            len(log) // 3
        )  # `both_passes` calls it once to shape its gradient, before the two passes
        whole = log.cost + Cost(-sum(x.distinct.total() for x in log[:forward]), -forward)
        costs, _ = predict.our_costs(case, BF16)
    counted = sum(costs, Cost(0, 0))
    assert counted.bytes == pytest.approx(whole.bytes, rel=slack)


def test_stock_is_counted_at_the_real_size_without_computing():
    case = cases.row("GELU", "", 1 << 20, 1 << 14)  # 32 GiB
    forward, backward = predict.stock_costs(case, BF16)
    size = 2 << 34
    assert (forward, backward) == (Cost(2 * size, 1), Cost(3 * size, 1))


def test_stock_is_counted_as_on_cuda():
    dropout = predict.stock_costs(cases.dropout("Dropout", "", 64, 64), FP32)
    e, mask = 64 * 64 * 4, 64 * 64
    assert dropout == [Cost(2 * e + mask, 1), Cost(2 * e + mask, 1)]
    assert [c.launches for c in predict.stock_costs(cases.rms_norm("", 64, 64), FP32)] == [1, 2]
    for name in ("Mish", "LogSigmoid"):
        assert predict.stock_costs(cases.row(name, "", 64, 64), FP32) == [
            Cost(2 * e, 1),
            Cost(3 * e, 1),
        ]
    x, costs = torch.ones(64, 64), []
    for rows in (x, x.t()):  # a norm copies rows that are not contiguous
        with AtenTraffic() as counted:
            stock.functional.layer_norm(rows, (64,))
        costs.append(counted.cost)
    assert (costs[1].bytes - costs[0].bytes, costs[1].launches) == (2 * e, costs[0].launches + 1)
    with as_on_cuda(), AtenTraffic() as counted:
        stock.functional.dropout(x, 0.0)  # PyTorch launches nothing
    assert counted.ops == []
    with AtenTraffic() as counted:  # the function itself is unchanged
        stock.functional.dropout(torch.ones(4), 0.5)
    assert len(counted.ops) > 1


# Rows that move more bytes than a kernel that reads once, and that are large enough for bytes to
# count: by which factor, and why.
MOVES_MORE = {
    r"Tanhshrink": (6 / 5, "stock keeps tanh(x), so that x may be written to; so do we"),
    r"GaussianNLLLoss": (1.25, "stock keeps input - target, so that these may be written to"),
    r"TripletMarginLoss\(.*swap=True": (1.3, "stock keeps three differences; so do we"),
    r"TripletMargin(WithDistance)?Loss": (
        1.1,
        "stock keeps two differences, so that inputs may be written to",
    ),
    r"LayerNorm\(.*(12288|4099|1048576|56\))": (2, "rows that no registers hold are read again"),
    r"Softmax\(.*(32000|128256|262144)": (8 / 5, "rows that no registers hold are read again"),
    r"MaxPool1d": (7 / 6, "a byte of each window says where its maximum was"),
    r"(Adaptive)?MaxPool": (11 / 10, "a byte of each window says where its maximum was"),
    r"FractionalMaxPool": (7 / 6, "a byte of each window says where its maximum was"),
    r"gumbel_softmax": (
        9 / 5,
        "PyTorch draws the noise; the softmax reads logits and noise as one",
    ),
    r"CrossEntropyLoss\(16x21x": (1.07, "lse in fp32 beside only 21 classes"),
    r"(Sequential\[)?(Batch|Group|Instance)Norm": (
        8 / 5,
        "statistics of more than a program holds: read for them, then again, both ways",
    ),
}


@pytest.mark.parametrize(
    "case", [c for c in cases.CASES if predict.why_not(c, c.dtypes[0]) is None], ids=str
)
def test_kernels_move_hardly_more_than_they_must(case):
    dtype = min(case.dtypes, key=lambda t: t.itemsize)  # fp32 partial sums weigh most beside it
    with predict.as_on_the_gpu():
        ours, _ = predict.our_costs(case, dtype)
    least = predict.least(case, dtype)
    ratio = sum(c.bytes for c in ours) / sum(least)
    passes = next((p for row, (p, _) in MOVES_MORE.items() if re.match(row, str(case))), 1)
    if sum(least) > 16e6:  # the cost of a smaller row is its launches
        assert ratio <= 1.05 * passes


def test_prediction_of_two_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cases, "CASES", [GELU, cases.linear("tiny", 4, 8, 8)])
    out = tmp_path / "out"
    assert main(["bench", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "PREDICTED" in printed and "No GPU here" in printed
    lines = [json.loads(s) for s in (out / "bench.jsonl").read_text().splitlines()]
    assert [x["kind"] for x in lines] == ["environment", "prediction", "prediction"]
    environment, gelu, linear = lines
    assert {"device", "commit", "torch", "triton", "python", "time"} <= environment.keys()
    size = 3 * 40 * 2
    assert gelu["stock"] == [
        {"bytes": 2 * size, "launches": 1},
        {"bytes": 3 * size, "launches": 1},
    ]
    assert gelu["ours"] == gelu["stock"]
    assert gelu["kernels"] == [["_pointwise_fwd_kernel"], ["_pointwise_bwd_kernel"]]
    assert gelu["speedup"] == pytest.approx(1.0)  # the same bytes and launches
    assert linear["speedup"] is None and "matrix products" in linear["why"]
    assert "Nothing here was measured" in (out / "summary.md").read_text()
    assert (out / "predicted.png").read_bytes().startswith(b"\x89PNG")

    written = (out / "bench.jsonl").read_text()  # a second run does nothing twice
    monkeypatch.setattr(predict, "predicted", None)
    assert main(["bench", "--out", str(out)]) == 0
    assert (out / "bench.jsonl").read_text() == written


def test_unknown_row_and_other_results(tmp_path, capsys, monkeypatch):
    assert main(["bench", "--only", "nonsense"]) == 2
    assert "no row has 'nonsense'" in capsys.readouterr().err
    (tmp_path / "bench.jsonl").write_text(
        json.dumps({"kind": "environment", **dict.fromkeys(run.IDENTITY, "other")}) + "\n"
    )
    assert main(["bench", "--only", "GELU", "--out", str(tmp_path)]) == 2
    assert "choose another folder" in capsys.readouterr().err


# ---- Timing, by the CPU's clock -----------------------------------------------------------------


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    results = run.Results(tmp_path_factory.mktemp("bench") / "bench.jsonl")
    rows = cases.matching(rows=[GELU, LOSS])
    results.add({"kind": "ceilings", **measure.ceilings(measure.Cpu(), 1 << 12, 8)})
    assert run.run_rows(rows, results, measure.Cpu(), compiled=False, repeats=3)
    return results


def test_a_timed_row_says_all(timed):
    gelu, loss = timed.of("row")
    assert (gelu["path"], gelu["failures"], gelu["ops"]) == ("kernel", [], ["gelu"])
    assert gelu["auto"]["gelu"] != "kernel" and gelu["error_ratio"] <= 2
    assert set(gelu["sides"]) == {"stock", "ours", "auto"}
    for line in (gelu, loss):
        for side in line["sides"].values():
            assert list(side) == ["forward", "forward+backward"]
            for times in side.values():
                assert times["executed"]["n"] >= 3
                low, mid, high = (times["executed"][k] for k in ("q25", "median", "q75"))
                assert 0 < low <= mid <= high
    assert run.speedup(gelu, "ours") == run.took(gelu, "stock") / run.took(gelu, "ours")


def test_results_go_on_where_they_stopped(timed, tmp_path):
    path = tmp_path / "bench.jsonl"
    text = timed.path.read_text()
    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote the last line
    results = run.Results(path)
    assert [x["key"] for x in results.of("row")] == [GELU.key(BF16)]
    seen = []
    rows = cases.matching(rows=[GELU, LOSS])
    left = iter([False, True])
    done = run.run_rows(
        [*rows, *cases.matching(rows=[NORM])], results, measure.Cpu(), compiled=False, repeats=3,
        on_row=seen.append, out_of_time=lambda: next(left),
    )  # fmt: skip
    assert not done and [x["key"] for x in seen] == [LOSS.key(BF16)]
    assert len(run.Results(path).of("row")) == 2


def test_a_row_with_a_pair_of_states_is_timed_and_fits():
    case = cases.cell("LSTMCell", "tiny", 2, 4)
    line = run.run_row(case, FP32, measure.Cpu(), 3)
    assert (line["path"], line["failures"], line["ops"]) == ("kernel", [], ["lstm_cell"])
    assert line["least_bytes"]["forward"] == 4 * (5 * 2 * 4 + 2 * 16 * 4 + 2 * 16)
    assert predict.too_large(case, FP32) is None
    with predict.as_on_the_gpu():
        costs, _ = predict.our_costs(case, FP32)
    assert len(costs) == 2


def test_a_wrong_row_has_no_speedup(monkeypatch):
    record = vars(REGISTRY["gelu"])
    fused = record["fused"]
    monkeypatch.setitem(record, "fused", lambda x, **k: fused(x, **k) * 1.5)
    line = run.run_row(GELU, BF16, measure.Cpu(), 3)
    assert line["failures"] and run.speedup(line, "ours") is None
    assert "ours" not in line["sides"]
    monkeypatch.setitem(record, "fused", lambda x, **k: _mode.Stock("option", "not today"))
    line = run.run_row(GELU, BF16, measure.Cpu(), 3)
    assert line["path"] == "stock" and run.speedup(line, "ours") is None
    assert "not today" in report.measured_table([line], {})


def test_a_row_that_raises_does_not_end_the_run(tmp_path, monkeypatch):
    results = run.Results(tmp_path / "bench.jsonl")
    monkeypatch.setattr(run, "compare_row", lambda case, *rest: 1 / 0)
    run.run_rows(cases.matching(rows=[GELU]), results, measure.Cpu(), compiled=False, repeats=3)
    (line,) = results.of("row")
    assert "ZeroDivisionError" in line["error"] and "wrong" in report.measured_table([line], {})


def test_compiled_side_joins_its_row(timed, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)  # no compiler is needed
    line = run.run_compiled(GELU, BF16, measure.Cpu(), 3)
    (row,) = [x for x in run.with_compiled([*timed.lines, line]) if x["key"] == line["key"]]
    assert run.speedup(row, "compiled") > 0


def test_plots_and_tables(timed, tmp_path):
    written = report.write(timed, tmp_path)
    assert [p.name for p in written] == ["summary.md", "speedup.png", "roofline.png"]
    assert "GELU(3x40) bfloat16" in written[0].read_text()
    summary = report.verdict(timed.lines)
    assert summary["rows"] == 2 and not summary["wrong"]
    assert summary["compiled"]["geometric_mean"] is None


# ---- Tuning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 10, 9), (2, 10, 9), (4, 10, 9)], 1),
        ([(1, 10, 20), (2, 10, 9), (4, 10, 9)], 2),
        ([(1, 10, 9), (2, 10, 11), (4, 10, 9)], 4),  # must keep winning
        ([(1, 10, 9), (2, 10, 9.9), (4, 10, 9)], 4),  # by the margin
        ([(1, 10, 9), (2, 10, 9), (4, 10, 9.9)], None),
        ([], None),
    ],
)
def test_threshold(points, expected):
    assert tune.threshold(points) == expected


def test_sweep_writes_the_entry_that_the_gate_reads(tmp_path, monkeypatch):
    results = run.Results(tmp_path / "tune.jsonl")
    sweeps = [tune.Sweep("gelu", GELU, dtype, most=700) for dtype in (BF16, FP32)]
    assert [case.rows for case in sweeps[0].points()] == [1, 4, 16]
    times = iter([(9.0, 10.0), *[(10.0, 9.0)] * 5])
    monkeypatch.setattr(tune, "contest", lambda *args: next(times))
    assert tune.run(sweeps, results, measure.Cpu())
    assert tune.run(sweeps, results, measure.Cpu())  # `times` is empty: nothing is done twice
    entry = tune.entry(results)
    assert entry["crossovers"] == [{"op": "gelu", "variant": "", "least": 160, "unit": "elements"}]
    assert entry["source"].startswith("measured on cpu")
    table = tmp_path / "crossover.json"
    lines = [{"op": "relu", "least": 7}, {"op": "gelu", "least": 1}]
    table.write_text(json.dumps({"cpu": {"source": "before", "crossovers": lines}}))
    tune.write(table, "cpu", entry)
    with gpu._table(table):
        source = f"{entry['source']}; other functions before"
        assert _gate.crossover("gelu", "cpu")[:3] == (160, source, "elements")
        assert _gate.crossover("relu", "cpu").least == 7
    assert _gate.crossover("gelu", "cpu").least == math.inf


def test_contest_times_both_sides():
    stock_us, ours_us = tune.contest(GELU, FP32, measure.Cpu(), 3)
    assert 0 < stock_us < ours_us  # the interpreter


def test_tune_without_a_gpu(tmp_path, capsys):
    table = tmp_path / "table.json"
    assert main(["tune", "--only", "gelu", "--out", str(table)]) == 2
    said = capsys.readouterr()
    assert "measures on a GPU" in said.err and "--dry-run" in said.err and not table.exists()
    assert main(["tune", "--only", "nonsense"]) == 2
    assert "no such op" in capsys.readouterr().err


def test_tune_dry_run_prints_the_plan(capsys):
    assert main(["tune", "--dry-run", "--only", "layer_norm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6 sweeps of 1 op,")
    assert sum(line.startswith("layer_norm: LayerNorm 1x768") for line in lines) == 2


# ---- The one command for a GPU ------------------------------------------------------------------


def test_gpu_without_one(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out"), "--budget", "1m"]) == 2
    assert "no GPU here" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--budget", "soon"])


def test_gpu_dry_run(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out"), "--dry-run", "--budget", "2h"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu.STAGES)
    assert "7200 s" in lines[0] and not (tmp_path / "out").exists()


def test_gpu_every_stage_at_toy_sizes(tmp_path, capsys):
    argv = ["--out", str(tmp_path), "--tiny", "--budget", "1h"]
    assert gpu.main(argv) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert all(f"{name}: done" in printed for name in gpu.STAGES)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    kinds = {json.loads(line)["kind"] for line in lines}
    wanted = {"environment", "parity", "ceilings", "row", "config", "sweep", "tuned-row", "step"}
    assert wanted | {"huge", "determinism", "sanitizer"} == kinds
    # The files must be easy to copy: few files, none large, none in a deep folder.
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) <= 8 and all(p.parent == tmp_path for p in files)
    assert gpu.main(argv) == 0  # it goes on where it stopped, with nothing left
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(lines)


def test_gpu_out_of_budget_is_unfinished(tmp_path, capsys):
    argv = ["--out", str(tmp_path), "--tiny", "--stage", "bench"]
    assert gpu.main([*argv, "--budget", "0s"]) == 1
    assert "unfinished: bench; the same command goes on" in capsys.readouterr().out


def test_gpu_stops_where_the_device_is_lost_and_goes_on_after_it(tmp_path, monkeypatch, capsys):
    """As after an illegal access: every later call in the process fails."""
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")

    def fails(*args, **kwargs):
        raise lost

    argv = ["--out", str(tmp_path), "--tiny", "--stage", "bench", "--stage", "huge"]
    with monkeypatch.context() as patch:
        patch.setattr(run, "run_row", fails)
        patch.setattr(measure.Cpu, "clear", fails)
        assert gpu.main(argv) == 1
    assert "bench: stopped by RuntimeError: CUDA error" in capsys.readouterr().out
    lines = list(map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines()))
    assert [line["kind"] for line in lines] == ["environment", "row"]
    assert "illegal memory access" in lines[1]["error"]
    assert "bench: stopped" in (tmp_path / "summary.md").read_text()
    assert gpu.main(argv) == 1  # because an error was recorded
    printed = capsys.readouterr().out
    assert "bench: done" in printed and "huge: done" in printed
    assert "illegal memory access" in printed


def _prepare_pool(path):
    """The items "fail", "end" and "break" (the device) do what they say. For any other item the
    result is its length and the id of the process."""
    Path(path, str(os.getpid())).touch()
    broken = []
    pool._usable = lambda: not broken

    def work(item):
        if item == "end":
            os._exit(7)
        if item == "break":
            broken.append(item)
        return len(item), os.getpid()

    return work


def test_pool_gives_every_item_a_result_and_replaces_processes(tmp_path):
    items = ["a", "end", "bb", "break", "ccc", "dddd"]
    found = dict(pool.spread(_prepare_pool, str(tmp_path), items, workers=1))
    assert list(found) == items
    assert str(found.pop("end")) == "its process ended with code 7"
    assert [n for n, _ in found.values()] == [1, 2, 5, 3, 4]
    pids = [pid for _, pid in found.values()]
    assert pids[1] == pids[2] and pids[3] == pids[4] and len(set(pids)) == 3
    assert len(list(tmp_path.iterdir())) == 3  # prepared once each


def test_pool_of_two_and_out_of_time(tmp_path):
    items = [str(i) for i in range(40)]
    found = list(pool.spread(_prepare_pool, str(tmp_path), items, workers=2))
    assert sorted(item for item, _ in found) == sorted(items)
    some = list(pool.spread(_prepare_pool, str(tmp_path), items, 2, lambda: True))
    assert some == []


def test_gpu_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_huge", lambda *args: ["output rows 0 to 8 differ"])
    assert gpu.main(["--out", str(tmp_path), "--tiny", "--stage", "huge"]) == 1
    assert "output rows 0 to 8 differ" in capsys.readouterr().out
    assert "output rows 0 to 8 differ" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("step", models.TINY, ids=lambda s: s.name)
def test_models_are_the_same_from_both_namespaces(step):
    torch.manual_seed(0)
    theirs, ours = step.build(stock), step.build(fastnn)
    ours.load_state_dict(theirs.state_dict())
    data = step.data("cpu")
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        with fastnn.backend("torch"):
            losses.append(model(*data))
        losses[-1].backward()
    assert torch.equal(*losses)


# ---- Memory -------------------------------------------------------------------------------------


# By published timings, stock is far below the speed of memory here. Bytes do not show that.
PUBLISHED = ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm")


def test_auto_runs_no_kernel_that_is_predicted_to_lose():
    """The prediction is read from the table of docs/benchmarks.md."""
    page = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    rows = re.findall(r"^\| `(.*)` \|.*\| (\d+\.\d\d) \| [\w ,.]*\| (kernel|stock) \|$", page, re.M)
    assert len(rows) > 100
    ran = [(row, float(gain)) for row, gain, runs in rows if runs == "kernel"]
    assert len(ran) > 50
    lost = [row for row, gain in ran if gain < 1 and not row.startswith(PUBLISHED)]
    assert lost == []


def test_auto_runs_no_kernel_whose_instructions_take_longer_than_the_bytes_of_pytorch():
    """Bytes are read from the table of docs/benchmarks.md, instructions from bench/roofs.json."""
    page = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    row = r"^\| `(.*)` \|.*\| ([\d.]+) \| [\d.]+ \| [\d.]+ \| (\d+) \| (\d+) \| .* \| kernel \|$"
    rows = re.findall(row, page, re.M)
    compared, lost = 0, []
    for name, stock_mb, stock_launches, launches in rows:
        ours = roofs.least_us(name)
        if ours is None or name.startswith(PUBLISHED):
            continue
        compared += 1
        stock = float(stock_mb) * 1e12 / gates.BANDWIDTH + gates.LAUNCH * int(stock_launches)
        if ours + gates.LAUNCH * int(launches) > stock:
            lost.append(name)
    assert compared > 50
    assert lost == []


def test_kernels_beside_those_of_liger():
    """Runs in another process, because this process interprets and that one compiles."""
    if liger.version() is None:
        pytest.skip("Liger is not installed (extra bench)")
    table = compiling(["-m", "bench.beside", "RMSNorm(16x4096"])
    figures = re.findall(r"\| (forward|backward|both) \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", table)
    assert figures == ["forward", "backward", "both"]


def test_table_beside_liger():
    """A row has a line for each pass and for both, or the reason why it has no figures."""

    def passes(*figures):
        return [{"us": us, "launches": n, "spilled": bytes_} for us, n, bytes_ in figures]

    ours = passes((8.0, 1, 0), (5.0, 2, 0))
    records = [
        {"row": "A", "from": "x", "ours": ours, "liger": passes((10.0, 1, 0), (20.0, 4, 3e6))},
        {"row": "B", "from": "y", "ours": ours, "liger": passes((26.0, 3, 0), (0.0, 1, 0))},
        {"row": "C", "from": "z", "why": "liger: atomics"},
    ]
    assert beside.table(records).splitlines()[2:] == [
        "| `A` | x | forward | 8.0 | 10.0 | 0.80 | 1 | 1 |  |",
        "| `A` | x | backward | 5.0 | 20.0 | 0.25 | 2 | 4 | 3 |",
        "| `A` | x | both | 13.0 | 30.0 | 0.43 | 3 | 5 | 3 |",
        "| `B` | y | both | 13.0 | 26.0 | 0.50 | 3 | 4 |  |",  # its gradient is made in the forward
        "| `C` | z | liger: atomics |  |  |  |  |  |  |",
    ]


def test_table_of_published_times():
    """Times that a constant was read off are marked, and are not among those that count."""
    one = {"commit": "0123456789", "mode": "forward"}
    rows = [
        {**one, "kernel": "a", "fitted": True, "us": 100.0, "bytes_us": 100.0, "roofs_us": 100.0},
        {**one, "kernel": "b", "fitted": False, "us": 100.0, "bytes_us": 50.0, "roofs_us": 96.0},
        {**one, "kernel": "b", "fitted": False, "us": 200.0, "bytes_us": 220.0, "roofs_us": 220.0},
    ]
    page = calibrate.table(rows)
    assert "| a forward (fitted) | 01234567 | 100 to 100 | 1.00, 1.00 | 1.00, 1.00 |" in page
    assert "| b forward | 01234567 | 100 to 200 | 0.80, 0.50 | 1.03, 1.10 |" in page
    assert "bytes: within 5 % 0 of 2, within 15 % 1 of 2" in page
    assert "roofs: within 5 % 1 of 2, within 15 % 2 of 2" in page


def test_what_calls_cost_the_host(tmp_path):
    """Runs in another process, because this process interprets and that one compiles."""
    code = ["-m", "bench.host", "--only", "MSELoss", "--rounds", "4", "--no-models", "--out"]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- host -->\nold\n<!-- /host -->\nafter\n")
    compiling([*code, str(tmp_path), "--into", str(page)])
    assert re.search(r"^\| `MSELoss\(.*\)` \|( [\d.-]+ \|){7}$", page.read_text(), re.M)
    assert "old" not in page.read_text() and page.read_text().endswith("after\n")
    found = json.loads((tmp_path / "host.json").read_text())
    (row,) = found["rows"]
    assert (row["name"], row["ours_launches"], row["stock_launches"]) == ("MSELoss", 3, 4)
    assert 0 < row["python_us"] < row["without_plans_us"] and row["declined_us"] > 0
    assert 0 < row.get("native_us", 1) < row["without_plans_us"]
    assert row["stock_us"] > 0 and found["environment"]["cpu"]
    assert host.main(["--out", str(tmp_path)]) == 2  # kernels are interpreted here


@pytest.mark.slow
def test_what_a_step_of_a_recurrent_layer_costs_the_host(tmp_path):
    """At most half of what PyTorch's cell costs in a loop; some hundredths were measured."""
    compiling(
        ["-m", "bench.host", "--steps", "--only", "LSTM", "--rounds", "2", "--out", str(tmp_path)]
    )
    found = json.loads((tmp_path / "host.json").read_text())
    (step,) = found["steps"]
    assert found["rows"] == found["models"] == [] and step["name"] == "LSTM"
    for way in ("python", "native"):
        assert step.get(f"{way}_us", 0) <= 0.5 * step["stock_us"]


# Instructions of one more call over those of stock: a little above what was counted when the line
# was written. Lower them when fewer are needed.
RATCHET = {
    "LayerNorm": {"declined": 0.95, "python": 1.45, "native": 0.87},
    "GELU": {"declined": 1.12, "python": 2.14, "native": 1.02},
    "cross_entropy": {"declined": 1.07, "python": 1.33, "native": 0.68},
}


@pytest.mark.slow
def test_instructions_of_a_call():
    """Counted by callgrind, which neither the load nor the machine changes by much."""
    code = (
        "import json, warnings, torch; warnings.simplefilter('ignore'); torch.set_num_threads(1)\n"
        "from fastnn.bench import host\n"
        "why = host.can_count() or ('no C++ runner' if host.runner() is None else None)\n"
        "found = {} if why else host.instructions(%r)\n"
        "print(json.dumps([why, {k: host.ratios(v) for k, v in found.items()}]))"
    )
    why, found = json.loads(compiling(["-c", code % list(RATCHET)]).splitlines()[-1])
    if why is not None:
        pytest.skip(why)
    assert len(found) == len(RATCHET)
    over = []
    for label, counted in found.items():
        limits = RATCHET[re.split(r"\(", label)[0]]
        over += [(label, way, counted[way], n) for way, n in limits.items() if counted[way] > n]
    assert not over


def test_a_simulated_step_is_never_slower_where_the_gate_weighs_the_host():
    from fastnn.bench import steps

    work = _gate.Work(1 << 30, "elements", "")
    counted = steps.Counted(1e5, 100, [("layer_norm", work), ("gelu", None)])
    for speed in steps.SPEEDS:
        norm = "layer_norm", ""
        of = steps.Costs({"m": 1e3}, {"m": 1.0}, {norm[0]: 10.0}, {norm: 1.5}, {norm: 1 << 20})
        found = steps.simulate("m", counted, of, speed)
        assert found.kernels == 1 and found.speedup > 1
        assert found.ours_us == pytest.approx(1e5 - 1.5 * 1073.741824)
    bound = steps.simulate("m", counted._replace(gpu_us=1.0), of, 1)  # the host is the limit
    assert bound.ours_us - bound.stock_us == pytest.approx(10.5)


def test_peak_memory_against_length(tmp_path):
    assert memory.main(["--out", str(tmp_path), "--lengths", "16", "32"]) == 0
    data = json.loads((tmp_path / "attention-memory.json").read_text())
    short, long = data["peak_bytes"]
    assert [short["length"], long["length"]] == [16, 32] and data["shape"]["heads"] == 16
    # Stock holds several tensors of weights, so its peak grows with them. Ours holds none.
    assert long["stock"] > 2.5 * short["stock"] and long["stock"] > 3 * long["weights"]
    assert long["ours"] < 2.5 * short["ours"]
    assert (tmp_path / "attention-memory.png").read_bytes().startswith(b"\x89PNG")
