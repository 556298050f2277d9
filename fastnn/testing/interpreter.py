"""The repair of Triton's interpreter. fastnn installs it before its first interpreted launch.

Call `install()` in a process that interprets its own kernels, or that wraps the interpreter, before
the first kernel of fastnn is launched. It does nothing if kernels are compiled.
"""

from fastnn.kernels._interpreter import (  # type: ignore[import-not-found]
    install,
    narrow,
    widen,
)

__all__ = ["install", "narrow", "widen"]
