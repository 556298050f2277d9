"""Data sizes are not constexprs: fifty shapes share a few compiled kernels."""

import collections
import os
import subprocess
import sys

# The most compiles per kernel: a size may be divisible by 8 or not. A tile depends on a row's
# length, and all shapes below have their lengths in one bucket.
PROGRAM = """
import torch, fastnn, fastnn.functional as F
from fastnn.testing.aot import compile_only

shapes = [(3 + i, 769 + 8 * i if i % 2 else 776 + 8 * (i % 20)) for i in range(50)]
calls = {
    "gelu": lambda x, M, N: F.gelu(x),
    "layer_norm": lambda x, M, N: F.layer_norm(x, (N,)),
    "softmax": lambda x, M, N: F.softmax(x, -1),
    "dropout": lambda x, M, N: F.dropout(x, 0.1 + M / 1000),
    "cross_entropy": lambda x, M, N: F.cross_entropy(x, torch.arange(M) % N),
    "linear": lambda x, M, N: F.linear(x, torch.empty(64, N)),
    "embedding": lambda x, M, N: F.embedding(torch.arange(M), x),
}
for op, call in calls.items():
    with compile_only("cuda:90") as records, fastnn.backend("triton"):
        for M, N in shapes:
            x = torch.empty(M, N, requires_grad=True)
            call(x, M, N).sum().backward()
    for r in records:
        print(op, r.kernel)
"""


def test_fifty_shapes_share_their_compiles():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiles = collections.Counter(done.stdout.splitlines())
    assert len({line.split()[0] for line in compiles}) == 7  # every op
    assert max(compiles.values()) <= 8, compiles
