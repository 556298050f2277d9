#!/usr/bin/env bash
# PyTorch 2.13.0, CPU: under a dispatch mode, in-place foreach operators do not count versions.
#
# Guess: a TorchDispatchMode sits below autograd and only sees what is called. Autograd's version
# counters, by which it notices that a saved tensor was overwritten, count as without the mode. What
# holds for `b.add_(1)` holds for `torch._foreach_add_([b], 1)`, which does the same.
#
# Seen: without a mode, both count one version, and a backward that needs the old value raises. Under a
# mode that does nothing but call the operator, `add_` counts, and the foreach operators count nothing.
# So the backward runs with the overwritten values, and its gradient is another, without an error.
# Optimizers step by foreach operators. A tool that works by a dispatch mode (a counter of operations, a
# recorder) therefore hides the error that the same program has without it, and cannot learn from
# versions which tensors an operator wrote; the schema of the operator tells.
#
# Output seen:
#   torch 2.13.0
#   add_             no mode: versions +1, backward raises
#   add_             mode:    versions +1, backward raises
#   _foreach_add_    no mode: versions +1, backward raises
#   _foreach_add_    mode:    versions +0, gradient 2.0 (1.0 was saved)
#   (_foreach_mul_ and _foreach_zero_ as _foreach_add_, with gradients of what they wrote)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

print("torch", torch.__version__.split("+")[0])


class Observer(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


writes = {
    "add_": lambda b: b.add_(1),
    "_foreach_add_": lambda b: torch._foreach_add_([b], 1),
    "_foreach_mul_": lambda b: torch._foreach_mul_([b], 2),
    "_foreach_zero_": lambda b: torch._foreach_zero_([b]),
}
found = {}
for name, write in writes.items():
    for told, mode in (("no mode:", nullcontext), ("mode:", Observer)):
        a, b = torch.ones(3, requires_grad=True), torch.ones(3)
        y = a * b  # the backward needs b
        version = b._version
        with mode():
            write(b)
        counted = b._version - version
        try:
            y.sum().backward()
            ends = f"gradient {a.grad[0].item()} (1.0 was saved)"
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            ends = "backward raises"
        found[name, told] = counted, ends
        print(f"{name:16} {told:8} versions +{counted}, {ends}")
for (name, told), (counted, ends) in found.items():
    silent = name != "add_" and told == "mode:"
    assert counted == (0 if silent else 1), "changed"
    assert ends.startswith("gradient") == silent, "changed"
PY
