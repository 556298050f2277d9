#!/usr/bin/env bash
# PyTorch 2.13.0, CPU: the backward of batch_norm takes a weight that is a strided view for a dense one.
#
# Guess: the gradient of the input depends on the values of the weight, not on its strides. So a column
# of a (3, 2) table and a copy of that column give the same gradient.
# Seen: the outputs agree. The gradient with the column is multiplied by 1, 100, 2, where the column
# holds 1, 2, 3: the backward reads the first three numbers of the table's memory. It raises nothing.
#
# Output seen:
#   torch 2.13.0
#   outputs agree: True
#   gradient with the column over gradient with its copy, by channel: 1.000 50.000 0.667
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$scratch/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
x, dy = torch.randn(2, 8, 3, dtype=torch.float64)
table = torch.tensor([[1.0, 100.0], [2.0, 100.0], [3.0, 100.0]], dtype=torch.float64)


def run(weight):
    leaf = x.clone().requires_grad_()
    y = F.batch_norm(leaf, None, None, weight, None, training=True)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


(y_column, dx_column), (y_copy, dx_copy) = run(table[:, 0]), run(table[:, 0].contiguous())
ratio = (dx_column / dx_copy)[0]
print("torch", torch.__version__.split("+")[0])
print("outputs agree:", torch.allclose(y_column, y_copy))
told = " ".join(f"{r:.3f}" for r in ratio.tolist())
print("gradient with the column over gradient with its copy, by channel:", told)
assert torch.allclose(y_column, y_copy)
assert torch.allclose(ratio, torch.tensor([1.0, 100 / 2, 2 / 3], dtype=torch.float64)), "changed"
PY
