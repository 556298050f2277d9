"""Tools of other people that ask for the class of a layer, or replace functions.

Each row runs one tool on a stock model and on the same model converted, imported and converted, and
built in a `patch`. All must answer alike. The tools of torch itself always run. Those of other
packages (`pip install -e '.[guests]'`) are the slow tier, and are skipped where the package is
absent.
"""

import copy
import importlib
import importlib.metadata
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn as stock

import fastnn

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()
PINNED = dict(re.findall(r'^    "([\w-]+)==([\w.]+)",$', PYPROJECT, re.MULTILINE))


def mlp(nn):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn(nn):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def images():
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def rows_of_four():
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def variants(build):
    """The model, stock and in the three ways to run it on fastnn, with the same parameters."""
    made = {}
    for name in ("stock", "convert", "import", "patch"):
        torch.manual_seed(0)
        if name == "patch":
            with fastnn.patch():
                made[name] = build(stock)
        else:
            made[name] = build(fastnn if name == "import" else stock)
        if name in ("convert", "import"):
            fastnn.convert(made[name])
    return made


def kinds(model):
    return [(n, type(m)) for n, m in model.named_modules()]


# ---- Tools of torch -----------------------------------------------------------------------------


def quantize_dynamic(model):
    done = torch.ao.quantization.quantize_dynamic(model, {stock.Linear})
    return kinds(done), done(rows_of_four())


def prepare_qat(model):
    model.train().qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return kinds(torch.ao.quantization.prepare_qat(model))


def fuse_modules(model):
    done = torch.ao.quantization.fuse_modules(model.eval(), [["0", "1", "2"]])
    return kinds(done), done(images())


def fx_fuse(model):
    from torch.fx.experimental.optimization import fuse

    done = fuse(model.eval())
    return done.code, done(images())


def prepare_fx(model):
    from torch.ao.quantization.quantize_fx import prepare_fx

    mapping = torch.ao.quantization.get_default_qconfig_mapping("fbgemm")
    done = prepare_fx(model.eval(), mapping, (rows_of_four(),))
    inside = [kind for _, kind in kinds(done) if "GraphModule" not in kind.__name__]
    return done.code, inside


def optimize_for_inference(model):
    with torch.no_grad():
        done = torch.jit.optimize_for_inference(torch.jit.script(model.eval()))
        return [n.kind() for n in done.graph.nodes()], done(images())


def partitions(model):
    from torch.fx.passes.utils.source_matcher_utils import get_source_partitions

    graph = torch.export.export(model, (rows_of_four(),)).module().graph
    found = get_source_partitions(graph, [stock.Linear, stock.ReLU])
    return {kind: [[str(n) for n in p.nodes] for p in parts] for kind, parts in found.items()}


def exact_types(model):
    done = [n for n, m in model.named_modules() if type(m) is stock.Linear]
    with torch.no_grad():
        for m in model.modules():
            if type(m) is stock.Linear:
                m.weight.fill_(0.5)
    return done, model(rows_of_four())


def function_replaced(model):
    seen, original = [], stock.functional.relu

    def wrapper(*args, **kwargs):
        seen.append((len(args), sorted(kwargs)))
        return original(*args, **kwargs)

    stock.functional.relu = wrapper
    try:
        return model(rows_of_four()), seen
    finally:
        stock.functional.relu = original


def layer_norm_replaced(model):
    seen, original = [], stock.functional.layer_norm

    def wrapper(*args, **kwargs):
        seen.append((len(args), sorted(kwargs)))
        return original(*args, **kwargs)

    stock.functional.layer_norm = wrapper
    try:
        return stock.Sequential(model, *norms(model))(rows_of_four()), seen
    finally:
        stock.functional.layer_norm = original


def norms(model):
    """A LayerNorm that runs as the model does."""
    norm = (fastnn if type(model) is fastnn.Sequential else stock).LayerNorm(3)
    return [fastnn.convert(norm) if "_fastnn" in model.__dict__ else norm]


def swap_by_name(model):
    """As many tools do: a table of classes, and `setattr` in the parent."""
    for name, child in model.named_children():
        if child.__class__ in {stock.Linear: 1}:
            setattr(model, name, stock.Identity())
    return kinds(model)


TORCH = [
    (quantize_dynamic, mlp),
    (prepare_qat, mlp),
    (fuse_modules, cnn),
    (fx_fuse, cnn),
    (prepare_fx, mlp),
    (optimize_for_inference, cnn),
    (partitions, mlp),
    (exact_types, mlp),
    (function_replaced, mlp),
    (layer_norm_replaced, mlp),
    (swap_by_name, mlp),
]


def answers(run, build):
    told = {}
    for name, model in variants(build).items():
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tools themselves
            told[name] = run(copy.deepcopy(model))
    return told


def agree(told):
    want = told.pop("stock")
    for name, got in told.items():
        if isinstance(want, tuple):
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, (name, a, b)
        else:
            assert got == want, name
    return want


@pytest.mark.parametrize(("run", "build"), TORCH, ids=[run.__name__ for run, _ in TORCH])
def test_a_tool_of_torch_answers_as_on_stock(run, build):
    assert agree(answers(run, build))


# ---- Tools of other packages --------------------------------------------------------------------


def captum(model):
    from captum.attr import DeepLift

    x = rows_of_four()
    given, delta = DeepLift(model).attribute(
        x, torch.zeros_like(x), target=0, return_convergence_delta=True
    )
    assert delta.abs().max() < 1e-5
    return given, delta


def thop(model):
    from thop import profile

    return list(profile(model, inputs=(rows_of_four(),), verbose=False))


def ptflops(model):
    from ptflops import get_model_complexity_info

    return [
        get_model_complexity_info(
            model, (4,), as_strings=False, print_per_layer_stat=False, backend=backend
        )
        for backend in ("pytorch", "aten")
    ]


def opacus(model):
    from opacus.validators import ModuleValidator

    errors = ModuleValidator.validate(model, strict=False)
    return [str(e) for e in errors], kinds(ModuleValidator.fix(model))


def opacus_gradients(model):
    from opacus import GradSampleModule

    model = GradSampleModule(model)
    model(rows_of_four()).sum().backward()
    return tuple(p.grad_sample for p in model.parameters())


def backpack(model):
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model, loss = extend(model), extend(stock.CrossEntropyLoss())
    with backpack(BatchGrad()):
        loss(model(rows_of_four()), torch.tensor([0, 1])).backward()
    return tuple(p.grad_batch for p in model.parameters())


def torchao(model):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    x = (rows_of_four(),)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model.eval(), x).module(), quantizer)
    prepared(*x)
    nodes = [str(n.target) for n in convert_pt2e(prepared).graph.nodes]
    assert sum("quantize" in n for n in nodes) == 6
    return nodes


def torchao_tensors(model):
    with fastnn.patch():
        importlib.import_module("torchao")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    quantize_(model, Int8WeightOnlyConfig())
    return [type(model[0].weight)], model(rows_of_four())


def bitsandbytes(model):
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    done = replace_with_bnb_linear(
        stock.ModuleDict({"net": model}), [], BitsAndBytesConfig(load_in_8bit=True)
    )
    assert [kind.__name__ for _, kind in kinds(done)].count("Linear8bitLt") == 2
    return kinds(done)


def fvcore(model):
    from fvcore.nn import FlopCountAnalysis

    count = FlopCountAnalysis(model, rows_of_four()).unsupported_ops_warnings(False)
    return count.total(), dict(count.by_module())


def torchinfo(model):
    from torchinfo import summary

    told = summary(model, input_data=rows_of_four(), verbose=0)
    return str(told), told.total_mult_adds


def peft(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    out = adapted(rows_of_four())
    out.sum().backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None]
    return kinds(adapted), trained, out, adapted.merge_and_unload()(rows_of_four())


def torch_pruning(model):
    import torch_pruning

    net = stock.Sequential(model, stock.Conv2d(4, 5, 1))
    torch_pruning.pruner.MagnitudePruner(
        net,
        images(),
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[net[1]],
    ).step()
    shapes = [(n, tuple(p.shape)) for n, p in net.named_parameters()]
    return kinds(net), shapes, net.eval()(images())


GUESTS = [
    ("bitsandbytes", bitsandbytes, mlp),
    ("fvcore", fvcore, mlp),
    ("peft", peft, mlp),
    ("torch-pruning", torch_pruning, cnn),
    ("torchinfo", torchinfo, mlp),
    ("captum", captum, mlp),
    ("thop", thop, mlp),
    ("ptflops", ptflops, mlp),
    ("opacus", opacus, cnn),
    ("opacus", opacus, mlp),
    ("opacus", opacus_gradients, mlp),
    ("backpack-for-pytorch", backpack, mlp),
    ("torchao", torchao_tensors, mlp),
    ("torchao", torchao, mlp),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "run", "build"), GUESTS, ids=[f"{r.__name__}-{b.__name__}" for _, r, b in GUESTS]
)
def test_a_tool_of_another_package_answers_as_on_stock(package, run, build):
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed; the extra `guests` has it")
    if version.replace("-", ".post") != PINNED[package]:
        pytest.skip(f"{package} {version} is installed; the row holds for {PINNED[package]}")
    assert agree(answers(run, build))
