"""What the autograd functions of op files share: the base class, `run`, and `second_order`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from fastnn._batches import one_by_one
from fastnn._plan import active
from fastnn._shards import last_hooks
from fastnn._strides import in_layout, not_strided, with_dense_gradients


class Function(torch.autograd.Function):
    """Base class of the autograd functions in op files: `backward` gets plain, dense gradients.

    The exceptions are the parameters of `backward` that the class names in `strided`: these
    gradients may have any strides.
    """

    strided: tuple[str, ...] = ()

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        backward = cls.__dict__["backward"].__func__
        at, names = not_strided(backward, cls.strided, 1)
        if len(at) < len(names):
            raise TypeError(
                f"{cls.__name__}.backward: *gradients are taken as they are; call them strided"
            )
        cls.backward = staticmethod(one_by_one(with_dense_gradients(backward, at)))  # type: ignore
        if _may_have_one_result(backward):
            forward = cls.__dict__["forward"].__func__
            cls.forward = staticmethod(_without_zeros(forward))  # type: ignore


def _may_have_one_result(backward: Callable) -> bool:
    """Whether all gradients but the first one are optional: they have defaults."""
    _, _, *others = inspect.signature(backward).parameters.values()
    return all(p.default is not p.empty for p in others)


def _without_zeros(forward: Callable) -> Callable:
    """The forward of a function, so that without a gradient of its one result the inputs have none.

    By default autograd makes zeros of it, and then the inputs have gradients that are zero. Where
    the function returns several results, the default stays.
    """

    @functools.wraps(forward)
    def call(ctx, *args):
        result = forward(ctx, *args)
        if not isinstance(result, tuple):
            ctx.set_materialize_grads(False)
        return result

    return call


class _NoGraph:
    """Stands for an autograd context where no gradient is wanted. It keeps nothing."""

    needs_input_grad = (False,) * 32

    def __setattr__(self, name, value):
        pass

    def _ignore(self, *args):
        pass

    save_for_backward = mark_non_differentiable = set_materialize_grads = _ignore

    def mark_dirty(self, *tensors):
        for t in tensors:
            if not t.is_inference():  # inference tensors count no versions
                torch.autograd.graph.increment_version(t)  # as `apply` does


_NO_GRAPH = _NoGraph()


def _apply(function: type[torch.autograd.Function], args: tuple):
    """`function.apply(*args)`. A backward gets what it kept in the layout in which it kept it.

    Kernels of a backward rely on that, and the hooks of a user may give a tensor of other strides
    back (`torch.autograd.graph.saved_tensors_hooks`).
    """
    hooks = None if torch.compiler.is_compiling() else last_hooks(False)
    if hooks is None:
        return function.apply(*args)
    pack, unpack = hooks[:2]

    def keep(t: Tensor):
        return pack(t), t.stride()

    def give(kept):
        packed, strides = kept
        return in_layout(unpack(packed), strides)

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        return function.apply(*args)


def run(function: type[torch.autograd.Function], *args):
    """`function.apply(*args)`, or only its forward if autograd has nothing to record."""
    if active.recorder is not None:
        result = active.recorder.run(function, args)
        if result is not None:
            return result
    if torch.is_grad_enabled():
        for value in args:
            if isinstance(value, Tensor) and value.requires_grad:
                return _apply(function, args)
    if torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(_NO_GRAPH, *args)


def second_order(formula: Callable, inputs: tuple, grad_outputs, needed: tuple[bool, ...]):
    """Gradients of the stock `formula(*inputs)` that have a graph of their own.

    For a backward under `create_graph=True`: the result of a kernel could not be differentiated
    again. Entries of `inputs` that are None or not `needed` get None.
    """
    with torch.enable_grad():
        # With aliases, a tensor that is two of the inputs gets a separate gradient for each.
        aliases = [t if t is None else t.view_as(t) for t in inputs]
        devices = {t.device.type for t in aliases if t is not None}
        with torch.autocast(devices.pop(), enabled=False):
            outputs = formula(*aliases)
        wanted = [t for t, need in zip(aliases, needed, strict=False) if need and t is not None]
        grads = iter(
            torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True, allow_unused=True)
            if wanted
            else ()
        )
    return tuple(
        next(grads) if need and t is not None else None
        for t, need in zip(aliases, needed, strict=False)
    )
