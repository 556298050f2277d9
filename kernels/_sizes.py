"""Arithmetic of sizes on the host. Triton's `cdiv` and `next_power_of_2` can be called there, too,
but are device functions first, at 1.7 us a call."""


def cdiv(n: int, by: int) -> int:
    return -(-n // by)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0
