"""Tensors of several processes: kernels on the shards of a `DTensor`, and pending collectives.

A `DTensor` tells for each dimension of a mesh of processes where its values are: split along one
of its dimensions (`Shard`), whole in each process (`Replicate`), or as terms of a sum (`Partial`).
An op declares the ways to split a call (`split=` of its record). If the placements of all arguments
are one of these ways, in each dimension of the mesh, the kernel runs on the local tensors and needs
no communication. Else PyTorch runs the call, and moves what has to be moved.

All processes have to decide alike, because a collective waits for all of them. So the decision
looks only at what is equal in all processes: placements, whole shapes, and shards of equal size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """A way to split a call among processes.

    along: the arguments that are split, each along one dimension. All other tensors are whole.
    result: the dimension along which the result is split; None: the results have to be summed.
    once: whole arguments that are a term of that sum, such as a bias. One process adds them.
    """

    along: dict[str, int]
    result: int | None
    once: tuple[str, ...] = ()


Rule = Callable[..., Iterable[Split]]  # of the arguments of the public function, by name


def elements(input: Tensor, inplace: bool = False, **others: Any) -> list[Split]:
    """Every element of the result depends on the same element of `input`."""
    if inplace:
        return []
    return [Split({"input": d}, d) for d in range(input.dim())]


def _module(name: str) -> Any:
    return sys.modules.get(f"torch.distributed.{name}")


def _is_dtensor(kind: type) -> bool:
    return kind.__name__ == "DTensor" and kind is getattr(_module("tensor"), "DTensor", None)


def _is_pending(kind: type) -> bool:
    """Whether a tensor of this class is the result of a collective that may not be complete."""
    name = "AsyncCollectiveTensor"
    return kind.__name__ == name and kind is getattr(_module("_functional_collectives"), name, None)


def is_wrapped(kind: type) -> bool:
    """Whether `local` may find plain tensors inside tensors of this class."""
    return _is_dtensor(kind) or _is_pending(kind)


class _Complete(torch.autograd.Function):
    """The values of a collective, when it is complete."""

    @staticmethod
    def forward(ctx, pending):
        complete = pending.trigger_wait()
        return complete.view_as(complete)

    @staticmethod
    def backward(ctx, grad):
        return grad


class _InOneProcess(torch.autograd.Function):
    """Zeros in all processes but one. The gradient belongs to the whole tensor in each process."""

    @staticmethod
    def forward(ctx, whole, here):
        return whole.view_as(whole) if here else torch.zeros_like(whole)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _complete(t: Tensor) -> Tensor:
    return _Complete.apply(t) if _is_pending(type(t)) else t


def plain_gradient(grad: Tensor) -> Tensor:
    """The gradient as a tensor with memory. Raises TypeError for a subclass that has none.

    The backward of `redistribute(async_op=True)` gives a gradient whose collective is not complete.
    """
    kind: Any = type(grad)
    if _is_pending(kind):
        return _complete(grad)
    plain: Any = torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]
    if kind.__torch_dispatch__ is not plain and not torch._C._len_torch_dispatch_stack():
        raise TypeError(
            f"the gradient is a {kind.__name__}, and kernels read plain tensors. Convert it, or "
            "run the forward in `with fastnn.backend('torch')`."
        )
    return grad


_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]


class _Watch:
    """Notices edits of DTensors between forward and backward, as autograd does for other tensors.

    An edit counts in the version of the DTensor, and not in that of the local tensor, which is what
    our function saves. So the hooks of saved tensors note which DTensor a saved tensor belongs to.
    """

    def __init__(self, owners: dict[int, Any]):
        self.owners = owners  # address -> DTensor
        self.kept: list[tuple[int, list]] = []
        # Only the last hooks are called, so ours call those of the user.
        self.hooks = _hooks(False)

    def pack(self, t: Tensor) -> list:
        entry = [t if self.hooks is None else self.hooks[0](t), None, 0]
        self.own(entry, self.owners.get(t.data_ptr()))
        if entry[1] is None and t.numel():
            self.kept.append((t.data_ptr(), entry))
        return entry

    @staticmethod
    def own(entry: list, owner: Any) -> None:
        if owner is not None:
            # It shares the version and has no graph, which would be a cycle.
            entry[1:] = [owner.detach(), owner._version]

    def unpack(self, entry: list) -> Tensor:
        packed, owner, version = entry
        if owner is not None and owner._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [DTensor {[*owner.shape]}] is at version {owner._version}; "
                f"expected version {version} instead."
            )
        return packed if self.hooks is None else self.hooks[1](packed)

    def returns(self, local: Tensor, result: Any) -> None:
        """The result may be among the saved tensors."""
        for address, entry in self.kept:
            if address == local.data_ptr():
                self.own(entry, result)
        self.kept.clear()
        self.owners = {}


class Local(NamedTuple):
    """A call on the tensors of this process. `whole` makes the result of its result."""

    args: tuple
    kwargs: dict
    whole: Callable[[Tensor], Tensor]
    watch: _Watch | None = None

    def run(self, call: Callable[[tuple, dict], Any]) -> Any:
        """The result of `call(args, kwargs)`, not yet whole."""
        if self.watch is None or not torch.is_grad_enabled():
            return call(self.args, self.kwargs)
        with torch.autograd.graph.saved_tensors_hooks(self.watch.pack, self.watch.unpack):
            return call(self.args, self.kwargs)


def local(names: tuple[str, ...], rule: Rule | None, args: tuple, kwargs: dict) -> Local | str:
    """The call on local tensors, or why there is none, in words.

    names: of the parameters. rule: of the op's record. Each tensor of a class that `is_wrapped` is
    an argument by itself, and not in a tuple or list.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors = {n: v for n, v in given.items() if isinstance(v, Tensor)}
    if any(type(v) in (tuple, list) and any(isinstance(t, Tensor) for t in v) for v in args):
        return "a list of tensors"
    spread = {n: t for n, t in tensors.items() if _is_dtensor(type(t))}
    if not spread:
        found = {n: _complete(t) for n, t in tensors.items()}
        return _with(found, names, args, kwargs, lambda result: result)
    if len(spread) < len(tensors):
        return "some tensors are DTensors, and some are not"
    if rule is None:
        return "an argument is a DTensor, and the op has no rule for shards"
    ways = _ways(spread, [*rule(**given)])
    if isinstance(ways, str):
        return ways
    shards = {n: _shard(n, t, ways) for n, t in spread.items()}
    watch = _Watch({s.data_ptr(): spread[n] for n, s in shards.items() if s.numel()})

    def whole(result: Tensor) -> Tensor:
        joined = _joined(result, spread, shards, ways)
        watch.returns(result, joined)
        return joined

    return _with(shards, names, args, kwargs, whole)._replace(watch=watch)


def _with(found: dict, names: tuple[str, ...], args: tuple, kwargs: dict, whole: Callable) -> Local:
    """The call with the tensors `found` in place of those of the same names."""
    given = tuple([found.get(n, v) for n, v in zip(names, args, strict=False)])
    return Local(given, {n: found.get(n, v) for n, v in kwargs.items()}, whole)


def _ways(spread: dict[str, Any], splits: list[Split]) -> list[Split | None] | str:
    """How each dimension of the mesh splits the call; None: it does not, all tensors are whole."""
    first: Any = next(iter(spread.values()))
    mesh = first.device_mesh
    if any(t.device_mesh != mesh for t in spread.values()):
        return "the DTensors are on several meshes"
    if mesh.get_coordinate() is None:
        return "this process is not in the mesh of the DTensors"
    kinds = _module("tensor")
    ways: list[Split | None] = []
    parts: dict[tuple[str, int], int] = {}
    for i in range(mesh.ndim):
        placed = {n: t.placements[i] for n, t in spread.items()}
        if any(type(p) not in (kinds.Shard, kinds.Replicate) for p in placed.values()):
            return f"DTensors are placed as {placed}"
        at = {n: p.dim for n, p in placed.items() if type(p) is kinds.Shard}
        way = None
        if at:
            fits = (s for s in splits if {n: d for n, d in s.along.items() if n in spread} == at)
            way = next(fits, None)
            if way is None:
                return f"DTensors are placed as {placed}"
        ways.append(way)
        for n, d in at.items():
            parts[n, d] = parts.get((n, d), 1) * mesh.size(i)
    for (n, d), number in parts.items():
        if not spread[n].shape[d] or spread[n].shape[d] % number:
            return f"dimension {d} of {n} ({spread[n].shape[d]}) is not split into equal shards"
    return ways


def _shard(name: str, t: Any, ways: list[Split | None]) -> Tensor:
    """The local tensor, of which the gradient is placed as it is computed."""
    kinds = _module("tensor")
    here = t.device_mesh.get_coordinate()
    placed, adds = [], True
    for i, (way, p) in enumerate(zip(ways, t.placements, strict=True)):
        whole = way is not None and type(p) is kinds.Replicate
        if whole and way is not None and name in way.once:
            adds = adds and here[i] == 0
        elif whole:
            p = kinds.Partial()  # each process computes a term of the gradient
        placed.append(p)
    found = _complete(t.to_local(grad_placements=tuple(placed)))
    if any(way is not None and name in way.once for way in ways):
        found = _InOneProcess.apply(found, adds)
    return found


def _joined(
    result: Tensor, spread: dict[str, Any], shards: dict[str, Tensor], ways: list[Split | None]
) -> Tensor:
    """The DTensor of which `result` is the part of this process."""
    kinds = _module("tensor")
    mesh: Any = next(iter(spread.values())).device_mesh
    placed: list[Any] = []
    shape = [*result.shape]
    for i, way in enumerate(ways):
        if way is None:
            placed.append(kinds.Replicate())
        elif way.result is None:
            placed.append(kinds.Partial())
        else:
            placed.append(kinds.Shard(way.result))
            shape[way.result] *= mesh.size(i)
    # those of an argument of the same layout, else of a dense tensor with dimensions in this order
    stride, step = [0] * len(shape), 1
    order = sorted(range(len(shape)), key=lambda d: (result.stride(d), result.shape[d], -d))
    for d in order if not result.is_contiguous() else reversed(range(len(shape))):
        stride[d] = step
        step *= max(shape[d], 1)
    for n, t in spread.items():
        if [*t.shape] == shape and shards[n].stride() == result.stride():
            stride = [*t.stride()]
            break
    return kinds.DTensor.from_local(
        result, mesh, placed, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )
