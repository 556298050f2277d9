#!/usr/bin/env bash
# PyTorch 2.13.0, CPU: antialiased interpolation to one column repeats the first row in all rows.
#
# Guess: `interpolate(x, (3, 1), antialias=True)` of a column gives what it gives to the same numbers as a
# row, transposed; and what it gives as a column of a wider result.
#
# Seen: if the result has a width of 1 and x is contiguous, every row of the result is the first row, in
# float32 and in float64, bilinear and bicubic. A channels-last x of two channels gives the right rows.
#
# Output seen:
#   torch 2.13.0
#   bilinear torch.float32: to (3, 1): 0.714 0.714 0.714; as a row: 0.714 2.500 4.286
#   bilinear torch.float64: to (3, 1): 0.714 0.714 0.714; as a row: 0.714 2.500 4.286
#   bicubic torch.float32: to (3, 1): 0.544 0.544 0.544; as a row: 0.544 2.500 4.456
#   bicubic torch.float64: to (3, 1): 0.544 0.544 0.544; as a row: 0.544 2.500 4.456
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F

print("torch", torch.__version__.split("+")[0])
for mode in ("bilinear", "bicubic"):
    for dtype in (torch.float32, torch.float64):
        x = torch.arange(6, dtype=dtype).view(1, 1, 6, 1)
        column = F.interpolate(x, (3, 1), mode=mode, antialias=True).flatten()
        row = F.interpolate(x.mT, (1, 3), mode=mode, antialias=True).flatten()
        told = ["".join(f" {v:.3f}" for v in t.tolist()) for t in (column, row)]
        print(f"{mode} {dtype}: to (3, 1):{told[0]}; as a row:{told[1]}")
        assert (column == column[0]).all(), "changed: the rows differ now"
        assert torch.allclose(row, F.interpolate(x, (3, 2), mode=mode, antialias=True)[0, 0, :, 0])
PY
