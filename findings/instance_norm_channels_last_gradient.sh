#!/usr/bin/env bash
# PyTorch 2.13.0, CPU: a channels-last incoming gradient makes the gradient of instance_norm wrong.
#
# Guess: the memory format of an incoming gradient is a matter of speed. `instance_norm` gives the same
# gradient of its input for `g` and for `g.contiguous(memory_format=torch.channels_last)`.
#
# Seen: for one sample, in float32 and in float64, elements are off by as much as they are large. For two
# samples the gradients agree. A convolution in channels last behind the norm gives such gradients.
#
# Output seen:
#   torch 2.13.0
#   torch.float32 samples 1: wrong if contiguous: False, if channels last: True
#   torch.float32 samples 2: wrong if contiguous: False, if channels last: False
#   torch.float64 samples 1: wrong if contiguous: False, if channels last: True
#   torch.float64 samples 2: wrong if contiguous: False, if channels last: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.nn.functional import instance_norm

print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)


def wrong(x, g):
    """Whether the gradient is far from that of the definition, in float64."""
    (found,) = torch.autograd.grad(instance_norm(x), x, g)
    z = x.detach().double().requires_grad_()
    mean, var = z.mean((2, 3), keepdim=True), z.var((2, 3), keepdim=True, correction=0)
    (exact,) = torch.autograd.grad((z - mean) / (var + 1e-5).sqrt(), z, g.double())
    return not torch.allclose(found.double(), exact, atol=1e-4)


for dtype in (torch.float32, torch.float64):
    for samples in (1, 2):
        x = torch.randn(samples, 3, 8, 8, dtype=dtype, requires_grad=True)
        g = torch.randn(samples, 3, 8, 8, dtype=dtype)
        seen = wrong(x, g), wrong(x, g.contiguous(memory_format=torch.channels_last))
        print(dtype, f"samples {samples}: wrong if contiguous: {seen[0]}, if channels last: {seen[1]}")
        assert seen == (False, samples == 1)
PY
