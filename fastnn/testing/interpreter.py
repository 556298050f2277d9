"""The repair of Triton's interpreter, which kernels that are interpreted install by themselves.

`install()` does so for a process that interprets kernels of its own, or wraps the interpreter, before
the first of fastnn's is launched. It does nothing where kernels are compiled.
"""

from fastnn.kernels._interpreter import install, narrow, widen

__all__ = ["install", "narrow", "widen"]
