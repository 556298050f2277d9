"""Bad input: the error that stock raises."""

from collections.abc import Callable

import fastnn
from tests.versions import OLDER


def _raised(call: Callable, *args, **kwargs) -> tuple[type, str] | None:
    try:
        call(*args, **kwargs)
    except Exception as e:
        return type(e), str(e)
    return None


def assert_same_error(ours: Callable, theirs: Callable, *args, mode="triton", **kwargs) -> None:
    """`ours`, called in `mode`, raises the same error as `theirs`, with the same words.

    If an older torch accepts what newer versions reject, `ours` accepts it too.
    """
    want = _raised(theirs, *args, **kwargs)
    assert want is not None or OLDER, "stock takes it"
    with fastnn.backend(mode if want else "auto"):
        assert _raised(ours, *args, **kwargs) == want
