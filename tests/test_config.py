"""Launch configurations: the formula, the shipped table, and the search that fills the table."""

import json
from collections import Counter

import pytest
import torch

import fastnn
import fastnn.testing.meter
from fastnn import _record, kernels
from fastnn.bench import cases, configs, measure, run
from fastnn.testing import check
from fastnn.testing.cases import CASES
from tests.marks import interpreted
from tests.test_aot import compiling

pytestmark = interpreted
GELU = cases.row("GELU", "tiny", 3, 40)
POINTWISE = "pointwise._config"


def config_of(*args):
    return kernels.pointwise._config(*args)


def test_the_table_changes_what_the_formula_says():
    formula = config_of(4)
    assert formula == kernels.pointwise._config.formula(4)
    with kernels._config.trying({POINTWISE: {"4": {"BLOCK": 64}}}):
        assert config_of(4) == {**formula, "BLOCK": 64}
        assert config_of(2) == kernels.pointwise._config.formula(2)
    assert config_of(4) == formula


def test_an_answer_may_be_written_to():
    config_of(4)["BLOCK"] = 1
    assert config_of(4) == kernels.pointwise._config.formula(4)


def test_sizes_share_an_entry_up_to_the_next_power_of_two():
    key = kernels._rows.row_config.key
    assert key(700, 4) == key(1024, unit=4) == "1024, 4, 4, False" != key(1025, 4)
    assert key(30, 1) == "30, 1, 4, False"  # small numbers are filed as they are
    assert kernels._classes.tiles.key((1, 50257, 8000), True, 1, 2) == (
        "(1, 65536, 8192), True, 1, 2, True"
    )


def test_the_architecture_compiled_for_decides_on_the_table(tmp_path):
    (tmp_path / "sm_90.json").write_text(
        json.dumps({"source": "the test", "configs": {POINTWISE: {"4": {"BLOCK": 2048}}}})
    )
    code = f"""
import pathlib, torch, fastnn
import fastnn.functional as F
from fastnn import _record, kernels
from fastnn.testing.aot import compile_only
kernels._config.FOLDER = pathlib.Path({str(tmp_path)!r})
for target, block in (("cuda:90", 2048), ("cuda:80", 1024), ("cuda:90", 2048)):
    with compile_only(target) as records, fastnn.backend("triton"):
        F.gelu(torch.ones(5000))
    assert records[0].constexprs["BLOCK"] == block, (target, records)
"""
    compiling(["-c", code])


def test_neighbours_are_a_step_away():
    linear = kernels.linear._config
    config = {"BLOCK_M": 64, "BLOCK_N": 1, "BLOCK_K": 32, "GROUP_M": 8}
    config |= {"num_warps": 16, "num_stages": 1}
    found = [linear.changes(n, config) for n in linear.neighbours(config)]
    assert found == [
        {"BLOCK_M": 128},
        {"BLOCK_M": 32},
        {"BLOCK_N": 2},
        {"BLOCK_K": 64},
        {"BLOCK_K": 16},
        {"num_warps": 8},
        {"num_stages": 2},
        {"BLOCK_M": 32, "num_warps": 8},
        {"BLOCK_K": 16, "num_warps": 8},
    ]


def asked_by_rows():
    """A question for each function, and a row that asks it."""
    found = {}
    number = Counter()
    for case in CASES:
        if case.stock is not None or torch.bfloat16 not in case.dtypes or number[case.name] > 2:
            continue
        # Only cheap rows, because large rows repeat their shapes.
        inputs = [t for t in case.make(torch.float32, "cpu") if isinstance(t, torch.Tensor)]
        if sum(t.numel() for t in inputs) > 1500:
            continue
        number[case.name] += 1
        # A call that a plan answers, which another test made, asks nothing.
        with _record.hidden(), kernels._config.heard() as heard:
            check(case, torch.bfloat16)
        for function, key, formula in heard:
            question = (function.name, key)
            if question not in found and not number[function.name]:
                number[function.name] += 1
                found[question] = function, key, formula, case
    return list(found.values())


def test_no_neighbour_of_a_configuration_is_wrong():
    """Results are right for all answers that a search can find. test_parity runs the formula's."""
    functions = set()
    for function, key, formula, case in asked_by_rows():
        functions.add(function.name)
        for config in function.neighbours(formula):
            changes = function.changes(config, formula)
            with kernels._config.trying({function.name: {key: changes}}):
                found = check(case, torch.bfloat16)
            assert not found.failures, (function, key, changes, case, found.failures)
    assert functions == set(kernels._config.TUNABLES)


# ---- The search ---------------------------------------------------------------------------------


def question(monkeypatch, microseconds):
    """A question about the tile of GELU; `microseconds` returns the time of a configuration."""

    def faster(question, ahead, behind, *rest):
        return microseconds(behind) / microseconds(ahead)

    monkeypatch.setattr(configs, "faster", faster)
    (found,) = configs.plan(cases.matching(rows=[GELU]), configs.on(measure.Cpu()))
    assert found.key == f"{POINTWISE}(2)" and found.rows == [(GELU, torch.bfloat16)]
    return found


def test_the_search_climbs_to_the_best(monkeypatch):
    best = {"BLOCK": 4096, "num_warps": 8}

    def cost(config):
        return 10 + 5 * sum(abs(config[k].bit_length() - v.bit_length()) for k, v in best.items())

    found = configs.answer(question(monkeypatch, cost), measure.Cpu())
    assert found["changes"] == best and found["gain"] == pytest.approx(25 / 10)


def test_a_gain_below_the_margin_changes_nothing(monkeypatch):
    asked = question(monkeypatch, lambda config: 100 - 2 * (config["BLOCK"] == 2048))
    found = configs.answer(asked, measure.Cpu())
    assert found["changes"] == {} and len(found["tried"]) == 6


def test_what_does_not_compile_or_is_wrong_changes_nothing(monkeypatch):
    def cost(config):
        if config["BLOCK"] > 1024:
            raise RuntimeError("out of shared memory")
        return config["BLOCK"]

    monkeypatch.setattr(configs, "right", lambda *args: False)
    found = configs.answer(question(monkeypatch, cost), measure.Cpu())
    assert found["changes"] == {}
    assert sum("out of shared memory" in t.get("error", "") for t in found["tried"]) == 2


def test_a_configuration_that_loses_one_row_is_out():
    (asked,) = configs.plan(cases.matching(rows=[GELU]), configs.on(measure.Cpu()))

    class Slow(measure.Cpu):
        def executed(self, call, repeats):
            return [10.0 if config_of(2)["BLOCK"] == 1024 else 30.0] * repeats

    ahead = {**asked.formula, "BLOCK": 2048}
    assert configs.faster(asked, ahead, asked.formula, Slow(), 3) == 0
    assert configs.faster(asked, asked.formula, ahead, Slow(), 3) == pytest.approx(3)


def test_the_table_is_written_and_gone_on_with(tmp_path, monkeypatch):
    asked = question(monkeypatch, lambda config: 100 if config["BLOCK"] == 1024 else 50)
    results = run.Results(tmp_path / "tune.jsonl")
    path = tmp_path / "configs" / "sm_90.json"
    old = {POINTWISE: {"2": {"BLOCK": 1}, "4": {"BLOCK": 8}}, "glu._config": {"1, 2": {}}}
    path.parent.mkdir()
    path.write_text(json.dumps({"source": "before", "configs": old}))
    assert not configs.run([asked], results, measure.Cpu(), out_of_time=lambda: True)
    assert configs.run([asked], results, measure.Cpu())
    monkeypatch.setattr(configs, "answer", None)  # nothing is done twice
    assert configs.run([asked], results, measure.Cpu(), out_of_time=lambda: True)
    configs.write(path, results)
    written = json.loads(path.read_text())
    assert written["source"].startswith("measured on cpu")
    assert written["source"].endswith("other entries before")
    table = configs.read(path)
    assert table[POINTWISE]["4"] == {"BLOCK": 8} and table[POINTWISE]["2"] != {"BLOCK": 1}
    with kernels._config.trying(table):
        assert config_of(4)["BLOCK"] == 8
    assert configs.read(tmp_path / "none.json") == {}


def test_the_plan_is_made_without_a_gpu():
    code = """
from fastnn.bench import cases, configs
rows = cases.matching(rows=[cases.row("GELU", "", 8192, 4096), cases.linear("", 64, 64, 64)])
with configs.without_a_gpu() as make:
    questions = configs.plan(rows, make)
print(*configs.describe(questions), sep="\\n")
"""
    lines = compiling(["-c", code]).splitlines()
    assert (
        lines[0].startswith("pointwise._config(2): {'BLOCK': 1024") and "6 neighbours" in lines[0]
    )
    assert lines[1].startswith("linear._config(64, 64, 2") and "sm_90" in lines[1]


def test_a_row_runs_by_a_tried_configuration():
    """The search times the configuration that it names."""
    with (
        kernels._config.trying({POINTWISE: {"4": {"BLOCK": 16}}}),
        fastnn.testing.meter.traffic() as log,
        fastnn.backend("triton"),
    ):
        fastnn.functional.gelu(torch.ones(64))
    assert log[0].grid == (4, 1, 1)
