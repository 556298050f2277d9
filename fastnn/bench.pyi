"""For checkers run on the source tree, where these files lie outside the package, in kernels/."""

from typing import Any

def __getattr__(name: str) -> Any: ...
