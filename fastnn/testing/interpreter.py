"""The repair of Triton's interpreter, which kernels that are interpreted install by themselves.

`install()` does so for a process that interprets kernels of its own, or that wraps the interpreter,
before the first kernel of fastnn is launched. It does nothing where kernels are compiled.
"""

from fastnn.kernels._interpreter import (  # type: ignore[import-not-found]
    install,
    narrow,
    widen,
)

__all__ = ["install", "narrow", "widen"]
