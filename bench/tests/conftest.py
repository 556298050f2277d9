"""`pytest bench/` compiles kernels: with TRITON_INTERPRET=1 it would time an interpreter."""

import os

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported
