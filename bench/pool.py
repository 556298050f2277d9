"""Work spread over processes: kernels compile side by side, and a fault costs only one item.

After a CUDA error that a kernel causes, every later call of its process fails. A process in that
state is replaced, and so is a process that ended.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch


@dataclass(frozen=True)
class Ended:
    """Stands for a missing result: the process ended before it had the result."""

    exitcode: int | None

    def __str__(self):
        return f"its process ended with code {self.exitcode}"


def _usable() -> bool:
    """Whether this process can go on. It cannot after an error of a kernel on the device."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


def _serve(connection: Connection, prepare: Callable[[Any], Callable], argument: Any) -> None:
    work = prepare(argument)
    usable = True
    while usable:
        try:
            item = connection.recv()
        except EOFError:
            return
        result = work(item)
        usable = _usable()
        connection.send((result, usable))


def spread(
    prepare: Callable[[Any], Callable],
    argument: Any,
    items: Iterable,
    workers: int,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Any, Any]]:
    """Yields (item, `prepare(argument)(item)`) in the order of completion. The result is `Ended` if
    the process ended. Stops early once `out_of_time()`.

    Each of the `workers` processes calls `prepare` once. `prepare` must be importable by its name.
    Arguments, items and results are pickled.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(items)
    idle: list[tuple[Connection, Any]] = []
    busy: dict[Connection, tuple[Any, Any]] = {}
    processes = []
    try:
        while (waiting or busy) and not out_of_time():
            while waiting and len(busy) < workers:
                if not idle:
                    connection, theirs = context.Pipe()
                    process = context.Process(
                        target=_serve, args=(theirs, prepare, argument), daemon=True
                    )
                    process.start()
                    theirs.close()
                    processes.append(process)
                    idle.append((connection, process))
                connection, process = idle.pop()
                item = waiting.popleft()
                busy[connection] = item, process
                with contextlib.suppress(OSError):  # the process has ended; the wait notices that
                    connection.send(item)
            for ready in wait(busy, timeout=1.0):
                connection = cast(Connection, ready)  # all given objects are connections
                item, process = busy.pop(connection)
                try:
                    result, usable = connection.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    result, usable = Ended(process.exitcode), False
                if usable:
                    idle.append((connection, process))
                yield item, result
    finally:
        for process in processes:
            process.terminate()
            process.join()
