#!/usr/bin/env bash
# PyTorch 2.13.0, CPU: a dispatch mode that keeps the tensor of a factory function changes the program.
#
# Guess: a TorchDispatchMode that calls the operator and returns its result is an observer. Whether it
# also appends the result to a list makes no difference: `torch.empty(3)` is one operator, and the caller
# gets the tensor that the mode returned.
#
# Seen: without the list, one operator, and the caller gets the very object. With the list, PyTorch calls
# `aten.detach` as a second operator, and the caller gets another tensor on the same memory. (The factory
# makes a variable of the result: in place if nobody else holds it, else of a shallow copy.) `x + 1` does
# not do so. So a tracer that identifies tensors by object, and keeps them alive for that, loses every
# tensor that a factory function made.
#
# Output seen:
#   torch 2.13.0
#   empty      mode keeps the result: False operators ['empty'], same object: True
#   empty      mode keeps the result: True  operators ['empty', 'detach'], same object: False
#   (zeros, rand, empty_like: the same)
#   add        mode keeps the result: True  operators ['add'], same object: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.utils._python_dispatch import TorchDispatchMode

print("torch", torch.__version__.split("+")[0])
x = torch.ones(3)


class Observer(TorchDispatchMode):
    def __init__(self, keeps):
        super().__init__()
        self.keeps, self.kept, self.seen, self.ids = keeps, [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen.append(str(function))
        self.ids.append(id(out))
        if self.keeps:
            self.kept.append(out)
        return out


factories = {
    "empty": lambda: torch.empty(3),
    "zeros": lambda: torch.zeros(3),
    "rand": lambda: torch.rand(3),
    "empty_like": lambda: torch.empty_like(x),
    "add": lambda: x + 1,
}
found = {}
for name, make in factories.items():
    for keeps in (False, True):
        with Observer(keeps) as mode:
            t = make()
        same = mode.ids[0] == id(t)
        operators = [s.split(".")[1] for s in mode.seen]
        found[name, keeps] = operators, same
        print(f"{name:10} mode keeps the result: {keeps!s:5} operators {operators}, same object: {same}")
for name in factories:
    assert found[name, False] == ([name], True), "changed"
    kept = ([name], True) if name == "add" else ([name, "detach"], False)
    assert found[name, True] == kept, "changed"
PY
