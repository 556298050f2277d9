#!/usr/bin/env bash
# PyTorch 2.13.0, CPU: nll_loss takes a channels_last input forward and refuses it backward, while
# cross_entropy, which computes the same loss from logits, takes it both ways.
#
# Guess: what the forward accepts, the backward accepts. The output of log_softmax over the channels is
# what both losses read, so both treat a memory format alike.
# Seen: nll_loss of a (2, 3, 4, 5) channels_last leaf gives its value, and backward() raises
# RuntimeError. The same call on a contiguous leaf, and cross_entropy on either, have gradients.
#
# Output seen:
#   torch 2.13.0
#   nll_loss contiguous: gradient
#   nll_loss channels_last: RuntimeError: grad_input must be contiguous
#   cross_entropy contiguous: gradient
#   cross_entropy channels_last: gradient
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$scratch/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F

print("torch", torch.__version__.split("+")[0])
target = torch.zeros(2, 4, 5, dtype=torch.int64)
found = {}
for name in ("nll_loss", "cross_entropy"):
    for layout in ("contiguous", "channels_last"):
        format = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
        x = torch.ones(2, 3, 4, 5).to(memory_format=format).requires_grad_()
        loss = getattr(F, name)(x, target)
        assert loss.isfinite()
        try:
            loss.backward()
            found[name, layout] = "gradient"
        except RuntimeError as e:
            found[name, layout] = f"RuntimeError: {str(e).splitlines()[0]}"
        print(f"{name} {layout}: {found[name, layout]}")
raised = found.pop(("nll_loss", "channels_last"))
assert raised == "RuntimeError: grad_input must be contiguous", "changed"
assert set(found.values()) == {"gradient"}, "changed"
PY
