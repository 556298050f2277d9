#!/usr/bin/env bash
# Triton 3.7.1: a constant -0.0 in a kernel is +0.0, compiled and interpreted.
#
# Guess: the literal `-0.0`, `tl.full((), -0.0, ...)` and a constexpr argument of -0.0 give minus zero, as
# in Python and in C. A kernel can therefore start a sum at -0.0, or write `tl.where(x > 0, x, -0.0)`, to
# keep the sign of a zero.
#
# Seen: all three give plus zero. Triton makes every constant that equals 0 by one function, "the null
# value of the type", and -0.0 == 0. A minus zero that is computed, such as 0.0 * -1.0 of a loaded value,
# keeps its sign. So `tl.where(x > 0, x, -0.0)` and `x * 0.0` of a negative x differ in a bit.
#
# Output seen:
#   triton 3.7.1
#   interpreted: sign bits of literal, full, constexpr, computed: [0, 0, 0, 1]
#   compiled for sm_90: float constants stored: ['0.000000e+00']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.7.1 numpy==2.4.6
cat > "$folder/interpreted.py" <<'PY'
import os

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl


@triton.jit
def zeros(Y, C: tl.constexpr):
    tl.store(Y, -0.0)
    tl.store(Y + 1, tl.full((), -0.0, tl.float32))
    tl.store(Y + 2, C)
    tl.store(Y + 3, tl.load(Y + 3) * -1.0)


y = torch.zeros(4)
zeros[(1,)](y, -0.0)
signs = torch.signbit(y).int().tolist()
print("triton", triton.__version__)
print("interpreted: sign bits of literal, full, constexpr, computed:", signs)
assert signs == [0, 0, 0, 1], signs
PY
cat > "$folder/compiled.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def zeros(Y, C: tl.constexpr):
    tl.store(Y, -0.0)
    tl.store(Y + 1, tl.full((), -0.0, tl.float32))
    tl.store(Y + 2, C)


source = ASTSource(zeros, {"Y": "*fp32", "C": "constexpr"}, constexprs={"C": -0.0})
text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
constants = re.findall(r"arith\.constant (\S+) : f32", text)
print("compiled for sm_90: float constants stored:", constants)
assert constants == ["0.000000e+00"], constants
PY
"$folder/venv/bin/python" "$folder/interpreted.py"
"$folder/venv/bin/python" "$folder/compiled.py"
