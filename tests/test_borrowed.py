"""PyTorch's own samples for every layer and function we override, on kernels and in auto.

The summary at the end of the run counts the calls that ran stock, with their reasons.
"""

import copy
import itertools
import math
import random
import statistics
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.testing._internal import common_utils
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import fastnn
from fastnn.kernels import _launch
from fastnn.layers._layer import OURS
from fastnn.ops import FUNCTIONS
from fastnn.testing import FLOATS, Side, compare_sides, compare_tensors
from fastnn.testing.noise import recording, replaying
from tests.errors import assert_same_error
from tests.versions import OLDER

# Each list of samples looks through the sources of the whole stack for a unittest, to tell it the
# sample. There is none here.
common_utils.extract_test_fn = lambda: None

RANDOM = {"rrelu"}  # whose values in training are compared in its own test file

# Stock warns about some of the samples.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}:UserWarning")
    for text in (
        "dropout2d. Received a 3D input",
        "enable_nested_tensor is True",
        "Using a target size",
        "reduction. .mean. divides the total loss",
        "linear_cross_entropy. ..options.. ignored",
        "Using padding='same' with even kernel",
    )
]

# These have norms of four features, one after the other. A row of nearly equal features multiplies
# rounding errors by a hundred, in stock and in fastnn. The largest error of all samples is luck.
# So it is with gates of inputs as large as 9: a gradient has the factor 1 - y * y of a y near 1.
ILL_CONDITIONED = {"Transformer", "RNN", "LSTM", "GRU"}

COMPOSED = (
    torch.nn.MultiheadAttention,
    torch.nn.Transformer,
    torch.nn.TransformerEncoder,
    torch.nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer,
    torch.nn.RNNBase,
    torch.nn.CTCLoss,
)

MODULES = [m for m in module_db if m.module_cls in OURS]
ALIASES = {"softmax": "softmax", "log_softmax": "log_softmax", "sigmoid": "sigmoid", "tanh": "tanh"}
FUNCTION_SAMPLES = [
    (o, name)
    for o in op_db
    for name in [ALIASES.get(o.name, o.name.removeprefix("nn.functional."))]
    if name in FUNCTIONS and (o.name.startswith("nn.functional.") or o.name in ALIASES)
]


def arguments(name, sample):
    """A sample's positional arguments, in the order of `torch.nn.functional`."""
    args = (sample.input, *sample.args)
    return [*args[1::-1], *args[2:]] if name in ("embedding", "embedding_bag") else args


MOST_PRODUCTS = 8000  # of a convolution, because its taps are slow in the interpreter


def slow(name, sample):
    if not name.startswith("conv"):
        return False
    function = FUNCTIONS[name].op.stock
    with torch.no_grad():
        y = function(sample.input, *sample.args, **sample.kwargs)
    return y.numel() * sample.args[0][0, 0].numel() > MOST_PRODUCTS


def op_id(pair):
    info, name = pair
    return f"{name}-{info.variant_test_name}" if info.variant_test_name else name


# `auto` runs the same kernels. A quarter of the samples of one dtype shows that it chooses them.
each_mode = pytest.mark.parametrize(
    ("dtype", "mode"),
    [*((d, "triton") for d in FLOATS), (torch.float32, "auto")],
    ids=lambda v: str(v).removeprefix("torch."),
)


@pytest.fixture(autouse=True)
def no_size_gate(simulate):
    simulate(least=0, source="the test")


@pytest.fixture
def account(record_property):
    """Adds up the paths taken, and fails at the end with every difference.

    Many samples have only a few numbers, and stock may be exact on them by luck. The error of stock
    is therefore taken as its largest error over all tensors compared in the test, in units in the
    last place at the scale of each tensor. As in the rows, our error may be twice that, plus one.
    """
    failures, ours, stock, elements = [], [], [], []

    def add(what, result):
        record_property("path", (what, result.path, result.reason))
        for c in result.comparisons:
            unit = c.bound - 2 * c.stock
            if unit > 0 and c.ours < float("inf"):
                ours.append((c.ours / unit, what, c.what))
                stock.append(c.stock / unit)
                elements.append(c.elements)
        failures.extend(f"{what}: {f}" for f in result.failures if " from float64, bound " not in f)

    def enough():
        """Whether more samples would say nothing new: there are many, or all errors are equal to
        those of stock, as where values are only copied or compared."""
        equal = all(error == its for (error, *_), its in zip(ours, stock, strict=True))
        return len(ours) >= 60 or sum(elements) >= 20000 or (bool(ours) and equal)

    add.enough = enough
    yield add
    if ours and ours[0][1] in ILL_CONDITIONED:
        typical = [
            statistics.fmean(map(math.log1p, errors)) for errors in ([o[0] for o in ours], stock)
        ]
        if typical[0] > typical[1] + math.log(2):
            failures.append(
                f"typically {typical[0]} from float64, in logarithms; stock {typical[1]}"
            )
    elif ours and max(ours)[0] > 2 * max(stock) + 1:
        failures.append(f"{max(ours)} units in the last place from float64; stock {max(stock)}")
    assert not failures, "\n".join(failures)


def share(samples, seed):
    """All samples, or 32 of more than 140, in their order: max_pool2d alone has 1440, which are all
    combinations of its options. Each dtype has other ones."""
    if len(samples) <= 140:
        return samples
    chosen = random.Random(seed).sample(range(len(samples)), 32)
    return [samples[i] for i in sorted(chosen)]


def lacks(name, dtype, device):
    """Whether an older torch lists this sample, but raises in its backward."""
    half = device == "cpu" and dtype == torch.float16
    return OLDER and half and name in ("SmoothL1Loss", "smooth_l1_loss")


def test_there_are_samples():
    assert len(MODULES) >= 2
    assert len(FUNCTION_SAMPLES) >= 2


# Layers take turns in the two 16-bit dtypes: a layer only calls functions, whose own samples and
# rows have both.
MODULE_RUNS = [
    pytest.param(
        info, dtype, mode, id=f"{info.module_cls.__name__}-{dtype}-{mode}".replace("torch.", "")
    )
    for i, info in enumerate(MODULES)
    for dtype, mode in (
        (torch.float32, "triton"),
        (torch.float32, "auto"),
        ((torch.float16, torch.bfloat16)[i % 2], "triton"),
    )
]


@pytest.mark.parametrize(("info", "dtype", "mode"), MODULE_RUNS)
def test_module_samples(info, dtype, mode, device, account):
    if lacks(info.module_cls.__name__, dtype, device):
        pytest.skip(f"stock {info.module_cls.__name__} has no {dtype} on {device}")
    modes = (True, False) if info.train_and_eval_differ else (True,)
    name = info.module_cls.__name__
    # the interpreter is slow where an element has many taps or windows
    few = device == "cpu" and ("Conv" in name or name == "FractionalMaxPool3d")
    steps = torch.nn.RNNBase, torch.nn.CTCLoss
    recurrent = device == "cpu" and issubclass(info.module_cls, steps)
    for seed, training in itertools.product(range(8), modes):
        if seed and (few or recurrent or account.enough()):
            break
        torch.manual_seed(seed)
        samples = info.module_inputs_func(
            info, device=device, dtype=dtype, requires_grad=True, training=training
        )
        # If a layer has hundreds of samples (LinearCrossEntropyLoss has 857), an even share runs.
        # So it does for layers that hold others, because the samples of those run their kernels,
        # and for recurrent layers, which have many steps.
        most = 8 if issubclass(info.module_cls, COMPOSED) else 100
        share = samples[:: len(samples) // most + 1]
        if dtype != torch.float32 and len(share) > 4:  # each of the two dtypes has its half
            share = share[dtype == torch.bfloat16 :: 2]
        for i, sample in enumerate(share[:: len(share) - 1] if few else share):
            if i % 4 and mode == "auto":
                continue
            if sample.forward_input is None:
                continue
            made = sample.constructor_input
            torch.manual_seed(0)
            stock = info.module_cls(*made.args, **made.kwargs).to(device, dtype).train(training)
            try:
                copy.deepcopy(stock)(*sample.forward_input.args, **sample.forward_input.kwargs)
            except NotImplementedError:  # as LocalResponseNorm's pooling, in 16 bits on the CPU
                continue
            ours = OURS[info.module_cls](*made.args, **made.kwargs).to(device, dtype)
            ours.train(training).load_state_dict(stock.state_dict())
            exact = copy.deepcopy(stock).double()
            result = compare_sides(
                *(Side(m, dict(m.named_parameters())) for m in (ours, stock, exact)),
                sample.forward_input.args,
                sample.forward_input.kwargs,
                device=device,
                mode=mode,
                inplace=bool(getattr(stock, "inplace", False)),
                twice=i % 8 == 0,
            )
            account(info.module_cls.__name__, result)


@each_mode
@pytest.mark.parametrize("pair", FUNCTION_SAMPLES, ids=op_id)
def test_function_samples(pair, dtype, mode, device, account):
    info, name = pair
    if dtype not in info.supported_dtypes(torch.device(device).type) or lacks(name, dtype, device):
        pytest.skip(f"stock {name} has no {dtype} on {device}")
    function = FUNCTIONS[name]
    torch.manual_seed(0)
    samples = share(list(info.sample_inputs(device, dtype, requires_grad=True)), str(dtype))
    if dtype != torch.float32 and len(samples) > 20:  # each of the two dtypes has its half
        samples = samples[dtype == torch.bfloat16 :: 2]
    if device == "cpu" and name == "ctc_loss":  # 50 steps, which the interpreter takes slowly
        samples = samples[::5] if mode == "triton" else samples[-1:]
    for i, sample in enumerate(samples):
        if i % 4 and mode == "auto":
            continue
        if name in RANDOM and sample.kwargs.get("training", sample.args[1:2] != (False,)):
            continue
        if device == "cpu" and name.startswith("conv"):
            # the three dtypes share the samples
            if slow(name, sample) or (mode == "triton" and i % 3 != FLOATS.index(dtype)):
                continue
        result = compare_sides(
            Side(function),
            Side(function.op.stock),
            Side(function.op.stock),
            arguments(name, sample),
            sample.kwargs,
            device=device,
            mode=mode,
            inplace=bool(sample.kwargs.get("inplace")),
            twice=i % 8 == 0,
        )
        account(name, result)


def narrow(value):
    double = isinstance(value, torch.Tensor) and value.dtype == torch.float64
    return value.float() if double else value


@pytest.mark.parametrize("mode", ["triton", "auto"])
@pytest.mark.parametrize("pair", [p for p in FUNCTION_SAMPLES if p[0].error_inputs_func], ids=op_id)
def test_function_errors(pair, mode, device):
    """Bad input raises what stock raises: the same type, with the same words."""
    info, name = pair
    function = FUNCTIONS[name]
    known = (*function.op.dtypes, *function.op.integers)
    for error in info.error_inputs(device):
        sample = error.sample_input
        if mode == "triton" and name.startswith("conv"):  # whose error samples are in float64
            sample = sample.transform(narrow)
            tensors = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
            if any(t.dtype not in known for t in tensors):
                continue  # a forced call of this dtype is declined before stock sees it
        given = arguments(name, sample)
        assert_same_error(function, function.op.stock, *given, mode=mode, **sample.kwargs)


def second_derivatives(call, args, kwargs, noise):
    """Gradients of a sum of squared gradients, for all tensors that require grad. None if there is
    nothing to derive."""
    given = (*args, *kwargs.values())
    tensors = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.manual_seed(0)
    with warnings.catch_warnings(), noise:
        warnings.simplefilter("ignore")
        out = call(*args, **kwargs)
    if isinstance(out, tuple):  # attention, and its weights
        out = torch.cat([t.flatten() for t in out if t is not None])
    if not out.requires_grad or not out.numel():
        return None
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    weights.requires_grad_()
    first = torch.autograd.grad(
        (out * weights).sum(), tensors, create_graph=True, allow_unused=True
    )
    first = [g for g in first if g is not None and g.requires_grad]
    if not first:
        return None
    total = sum((g * g).sum() for g in first)
    return torch.autograd.grad(total, [*tensors, weights], allow_unused=True)


def wide(value):
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def test_function_samples_survive_second_derivatives(device):
    """With `create_graph=True` second derivatives are as near to float64 as those of stock."""
    for info, name in FUNCTION_SAMPLES:
        # PyTorch has no second derivative of ctc_loss.
        if name in (*RANDOM, "ctc_loss") or not info.supports_gradgrad:
            continue
        far: list = []  # units in the last place, (ours, stock), where these differ
        for sample in list(info.sample_inputs(device, torch.float32, requires_grad=True))[:6]:
            if sample.kwargs.get("options") is not None:
                continue  # PyTorch's chunks have no second derivative
            if device == "cpu" and slow(name, sample):
                continue
            args, kwargs = arguments(name, sample), sample.kwargs
            stock = FUNCTIONS[name].op.stock
            noise = recording()
            with noise as draws:
                ours = second_derivatives(FUNCTIONS[name], args, kwargs, nullcontext())

            def same():
                return replaying(draws) if draws and device == "cpu" else nullcontext()

            theirs = second_derivatives(stock, args, kwargs, same())
            exact = second_derivatives(
                stock, [wide(a) for a in args], {k: wide(v) for k, v in kwargs.items()}, same()
            )
            if ours is None:
                assert theirs is None, name
                continue
            for a, b, e in zip(ours, theirs, exact, strict=True):
                assert (a is None) == (b is None), name
                # Where all terms cancel, there is no scale for a comparison with float64.
                if a is not None and not torch.allclose(a, b, rtol=1.3e-6, atol=1e-5):
                    found, wrong = compare_tensors(name, a, b, e)
                    assert found is not None, wrong
                    unit = torch.finfo(a.dtype).eps * e.abs().max().item()
                    far.append((found.ours / unit, found.stock / unit))
        if far:
            ours, theirs = (max(errors) for errors in zip(*far, strict=True))
            assert ours <= 2 * theirs + 1, f"{name}: {ours} from float64; stock {theirs}"


def test_most_samples_run_on_kernels(device, monkeypatch):
    """At least four of five samples run when forced onto kernels, in each dtype."""
    if device == "cpu":  # the path does not depend on what a kernel computes
        monkeypatch.setattr(_launch.Kernel, "__call__", lambda *args, **kwargs: None)
    for dtype in FLOATS:
        taken = []
        for info, name in FUNCTION_SAMPLES:
            if dtype not in info.supported_dtypes(torch.device(device).type):
                continue
            for sample in share(list(info.sample_inputs(device, dtype)), str(dtype)):
                if sample.kwargs.get("options") is not None:
                    continue  # of linear_cross_entropy, for an algorithm of PyTorch
                try:
                    with fastnn.backend("triton"), torch.no_grad():
                        FUNCTIONS[name](*arguments(name, sample), **sample.kwargs)
                    taken.append(True)
                except fastnn.BackendError:
                    taken.append(False)
        assert sum(taken) >= 0.8 * len(taken), f"{dtype}: {sum(taken)} of {len(taken)}"
