"""Launch a kernel cheaply: the compiled kernel is found once per signature, then called.

`triton.JITFunction` binds, specialises and hashes its arguments again at each launch, which takes 4
to 12 us of Python. A `Kernel` makes a key of everything that can change the compiled code (device,
dtypes, 16-byte alignment, the classes of the specialised integers, constexprs, options). For each
key it keeps the compiled kernel's own launcher. A generated function makes the key. That function
has no loop, because it is written for the types of the arguments.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_HIP = torch.version.hip is not None
# constexprs of these types are keyed by value
_VALUES = frozenset((int, bool, float, str, type(None)))


def triton_version() -> str:
    return triton.__version__


def _hooked(hook) -> bool:
    """Whether a profiler listens to launches. If so, Triton's own path must run."""
    return hook is not None and bool(getattr(hook, "calls", True))


class _Listeners(threading.local):
    log: Any = None


listeners = _Listeners()  # `listeners.log` is told about the launches of this thread


def listened() -> bool:
    """Whether a profiler listens to launches."""
    runtime = knobs.runtime
    return _hooked(runtime.launch_enter_hook) or _hooked(runtime.launch_exit_hook)


def direct(compiled):
    """(function, the arguments after packed_metadata) by which `compiled.run` launches; or None.

    The function is written in C. It takes: the grid, the stream, the kernel, whether the grid is
    cooperative, whether launches overlap, packed_metadata, and these arguments, of which the last
    is the tuple of the kernel's arguments. None if this Triton launches in another way.
    """
    run = compiled.run
    if not triton.__version__.startswith("3.7.") or type(run).__name__ != "CudaLauncher":
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None  # memory must be allocated
    flags = run.launch_cooperative_grid, run.launch_pdl
    return run.launch, flags, (None,) * 5 + (run.arg_annotations, run.kernel_signature)


def current_stream():
    """The function that gives the current stream of a device, as Triton asks for it."""
    return driver.active.get_current_stream


class Kernel:
    """An entry kernel, called as `kernel(grid, *args, **meta)`.

    grid: a tuple of 1 to 3 ints. If one of them is 0, nothing is launched.
    args: the run-time arguments, by position. The first is a tensor, whose device and current
        stream are used.
    meta: every constexpr parameter and the compile options (`num_warps`, `num_stages`, ...), by
        name. `maxnreg` is for NVIDIA GPUs, and is left out elsewhere.

    Constexpr parameters come last in the kernel's signature.
    """

    def __init__(self, fn):
        self.fn = fn
        self.__name__ = fn.__name__
        self.__doc__ = fn.__doc__
        self._interpreted = not isinstance(fn, JITFunction)
        # types of the arguments: (function that makes the key, {key: compiled})
        self._known: dict[tuple, tuple[Any, dict]] = {}
        if not self._interpreted:
            runtime = [p for p in fn.params if not p.is_constexpr]
            self._consts = [p.name for p in fn.params if p.is_constexpr]
            if [p.name for p in fn.params] != [p.name for p in runtime] + self._consts:
                raise TypeError(f"{fn.__name__}: constexpr parameters must come last")
            self._specialised = tuple(not p.do_not_specialize for p in runtime)

    def __repr__(self):
        return f"Kernel({self.__name__})"

    def _keyer(self, args, meta):
        """A function (device, args, the values of meta) -> key, for arguments of these types."""
        parts = ["device"]
        pointers = []
        for i, (arg, specialised) in enumerate(zip(args, self._specialised, strict=True)):
            kind, a = type(arg), f"a{i}"
            if kind is int:
                # True: it fits 32 bits; 3: it fits 64 bits; 2: it needs more.
                parts.append(f"-{2**31} <= {a} < {2**31} or ({a} < {2**63}) + 2")
                parts += [f"{a} == 1", f"{a} & 15 == 0"] if specialised else []
            elif kind is bool:
                parts += [a] if specialised else []
            elif kind is not float and arg is not None:
                pointers.append(i)
                parts += [f"{a}.dtype", f"p{i} & 15 == 0"]
                if _HIP:  # the size of the storage decides whether buffer instructions are used
                    parts.append(f"{a}.untyped_storage().nbytes() < {2**31}")
        # A jit function or a tl.dtype hashes in Python, which is slow. So the key has its id. The
        # resolved entry keeps the object alive, so the id stays unique.
        parts += [
            f"m{i}" if type(value) in _VALUES else f"id(m{i})"
            for i, value in enumerate(meta.values())
        ]
        lines = [
            "def keyer(device, args, meta):",
            f"    {''.join(f'a{i}, ' for i in range(len(args)))} = args",
            f"    {''.join(f'm{i}, ' for i in range(len(meta)))} = meta" if meta else "",
            *(f"    p{i} = a{i}.data_ptr()" for i in pointers),
            f"    if not ({' and '.join(f'p{i}' for i in pointers)}):",
            "        check(args)",
            f"    return {', '.join(parts)},",
        ]
        scope = {"check": self._check_memory}
        exec("\n".join(lines), scope)
        return scope["keyer"]

    def _check_memory(self, args):
        for arg in args:
            if isinstance(arg, torch.Tensor) and not arg.data_ptr() and arg.numel():
                raise RuntimeError(f"{self.__name__}: a tensor without memory (a zero tensor?)")

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters."""
        return list(inspect.signature(self.fn.fn).parameters)

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernel."""
        return self._interpreted

    def compiled(self, args, meta):
        """What Triton compiled for a launch that was made, and the launcher's constants.

        None if the kernel is interpreted, or if Triton did not return what it compiled.
        """
        if self._interpreted:
            return None
        known = self._known.get((*map(type, args), *map(type, meta.values()), *meta))
        if known is None:
            return None
        keyer, resolved = known
        device = args[0].get_device()
        if device < 0:
            device = driver.active.get_current_device()
        return resolved.get(keyer(device, args, meta.values()))

    def __call__(self, grid, *args, **meta):
        if 0 in grid:
            return
        log = listeners.log
        if log is None:
            self._run(grid, args, meta)
            return
        before, log.paused = log.paused, True
        try:
            self._run(grid, args, meta)
        finally:
            log.paused = before
        log.launched(self, grid, args, meta)

    def _run(self, grid, args, meta):
        if self._interpreted:
            self._interpret(grid, args, meta)
            return
        device = args[0].get_device()
        active = driver.active
        current = active.get_current_device()
        if device >= 0 and device != current:
            with torch.cuda.device(device):
                self._launch(active, device, grid, args, meta)
        else:
            self._launch(active, current, grid, args, meta)

    def _interpret(self, grid, args, meta):
        from fastnn.kernels import _interpreter  # imports NumPy and Triton's interpreter

        with _interpreter.lock:
            _interpreter.repair()
            self.fn[grid](*args, **meta)

    def _launch(self, active, device, grid, args, meta):
        kinds = (*map(type, args), *map(type, meta.values()), *meta)
        known = self._known.get(kinds)
        if known is None:
            known = self._known[kinds] = self._keyer(args, meta), {}
        keyer, resolved = known
        key = keyer(device, args, meta.values())
        ready = resolved.get(key)
        if ready is None or listened():
            # Triton's own path compiles on first use, and launches.
            options = meta
            if "maxnreg" in meta and active.get_current_target().backend != "cuda":
                options = {name: v for name, v in meta.items() if name != "maxnreg"}
            compiled = self.fn[grid](*args, **options)
            if compiled is not None and hasattr(compiled, "packed_metadata"):
                consts = tuple(meta[name] for name in self._consts)
                resolved[key] = compiled, consts
            return
        compiled, consts = ready
        compiled.run(
            grid[0],
            grid[1] if len(grid) > 1 else 1,
            grid[2] if len(grid) > 2 else 1,
            active.get_current_stream(device),
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *args,
            *consts,
        )


def kernel(fn=None, *, do_not_specialize=()):
    """`triton.jit` for entry kernels: decorates a function and returns a `Kernel`.

    `do_not_specialize` names the integers whose divisibility by 16 does not matter to the code.
    They then never cause a second compile. Seeds and 64-bit counts also need a `tl.int64`
    annotation.
    """
    if fn is None:
        return lambda fn: kernel(fn, do_not_specialize=do_not_specialize)
    return Kernel(triton.jit(fn, do_not_specialize=list(do_not_specialize)))
