"""Bilinear maps, as a few products: y[n, k] = sum over i, j of x1[n, i] W[k, i, j] x2[n, j] + b[k].

PyTorch goes through the outputs one by one: for each it multiplies x1 by a matrix of W, the product
by x2, and sums: about 4 launches and four passes over N * B numbers for each output. Here:

    forward   T[n, (k, j)] = x1 W, one product; then a product of each T[n] and x2[n]
    backward  P[n, (k, j)] = dy[n, k] x2[n, j];  dx1 = P W;  dW = x1 P;  dx2 = dy[n] T[n]

dx2 has PyTorch's order, in which x1 meets W first: products of x1 and dy alone might overflow. Rows
are taken in chunks, so that T and P stay small. Chunks are added in their order, in float32.
"""

from typing import Any

import torch
import torch.nn.functional as stock
from torch import Tensor

from fastnn._op import Function, Invalid, Stock, Work, op, run, second_order
from fastnn.ops.linear import tf32_setting

_ELEMENTS = 1 << 26  # of T, or of P, at a time


class Bilinear(Function):
    """x1 (N, A), x2 (N, B), w (K, A, B), b (K,) or None -> (N, K)."""

    @staticmethod
    def forward(ctx, x1, x2, w, b, leading):
        K, A, B = w.shape
        table = w.movedim(1, 0).reshape(A, K * B)
        y = x1.new_empty((*leading, K))
        flat = y.view(-1, K)
        for rows in _chunks(x1, K * B):
            t = torch.mm(x1[rows], table).view(-1, K, B)
            torch.bmm(t, x2[rows].unsqueeze(2), out=flat[rows].unsqueeze(2))
        if b is not None:
            y += b
        needs = ctx.needs_input_grad
        ctx.save_for_backward(
            x1 if needs[1] or needs[2] else None,
            x2 if needs[0] or needs[2] else None,
            w if needs[0] or needs[1] else None,
        )
        ctx.shape = K, A, B, b is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        x1, x2, w = ctx.saved_tensors
        K, A, B, biased = ctx.shape
        needs = ctx.needs_input_grad[:4]
        dy = dy.view(-1, K)
        if torch.is_grad_enabled():
            return *_twice(x1, x2, w, dy, ctx.shape, needs), None
        N = dy.shape[0]
        dx1 = dy.new_empty((N, A)) if needs[0] else None
        dx2 = dy.new_empty((N, B)) if needs[1] else None
        dw = None
        table: Any = None
        if needs[0] or needs[1]:
            table = w.movedim(1, 0).reshape(A, K * B)
        many = len(_chunks(dy, K * max(A, B))) > 1
        with torch.autocast(dy.device.type, enabled=False):
            for rows in _chunks(dy, K * max(A, B)):
                if needs[0] or needs[2]:
                    p = (dy[rows].unsqueeze(2) * x2[rows].unsqueeze(1)).view(-1, K * B)
                if dx1 is not None:
                    torch.mm(p, table.t(), out=dx1[rows])
                if dx2 is not None:
                    t = torch.mm(x1[rows], table).view(-1, K, B)
                    torch.bmm(dy[rows].unsqueeze(1), t, out=dx2[rows].unsqueeze(1))
                if needs[2]:
                    part = torch.mm(x1[rows].t(), p)
                    part = part.float() if many else part
                    dw = part if dw is None else dw + part
        if dw is not None:
            dw = dw.to(dy.dtype).view(A, K, B).movedim(0, 1).contiguous()
        db = dy.sum(0) if needs[3] and biased else None
        return dx1, dx2, dw, db, None


def _twice(x1, x2, w, dy, shape, needs):
    """The gradients, with graphs of their own; what was not kept is not needed."""
    K, A, B, biased = shape
    N = dy.shape[0]
    sizes = (N, A), (N, B), (K, A, B)
    made = [
        dy.new_zeros(size, requires_grad=need) if t is None else t
        for t, size, need in zip((x1, x2, w), sizes, needs, strict=False)
    ]
    b = dy.new_zeros(K, requires_grad=True) if biased else None
    return second_order(stock.bilinear, (*made, b), dy, needs)


def _chunks(x, width):
    """Slices of the rows of x, so that `width` numbers for each row of a slice are not too many."""
    size = max(_ELEMENTS // max(width, 1), 1)
    return [slice(start, start + size) for start in range(0, max(x.shape[0], 1), size)]


def _products(input1, input2, weight, *rest, **options):
    """The gate's policy: the elements of the products of the rows and the weight's matrices."""
    rows = input2.numel() // max(input2.shape[-1], 1) if input2.dim() else 0
    return Work(rows * weight.shape[0] * input2.shape[-1])


@op(
    stock=stock.bilinear,
    strided=("input1", "input2", "weight", "bias"),
    policy=_products,
    at_most="input2.numel() * weight.shape[0]",
    settings=tf32_setting,
)
def bilinear(input1, input2, weight, bias=None):
    """Two products forward and four backward, in place of some for each output."""
    tensors = [input1, input2, weight, *(() if bias is None else (bias,))]
    if not all(isinstance(t, Tensor) for t in tensors):
        return Invalid("shape", "an argument that is not a tensor")
    if any(t.dtype != weight.dtype for t in tensors):
        return Invalid("dtype", "tensors in several dtypes")
    if weight.dim() != 3 or not input1.dim() or input1.dim() != input2.dim():
        return Invalid("shape", "a weight that is not (K, A, B), or inputs of different dimensions")
    K, A, B = weight.shape
    fits = input1.shape[-1] == A and input2.shape[-1] == B
    if not fits or input1.shape[:-1] != input2.shape[:-1]:
        return Invalid("shape", f"inputs {tuple(input1.shape)} and {tuple(input2.shape)}")
    if bias is not None and bias.shape != (K,):
        return Invalid("shape", "a bias that is not one value per output")
    if not (input1.numel() and input2.numel() and weight.numel()):
        return Stock("empty", "no rows, features or outputs")
    if torch.is_autocast_enabled(input1.device.type):
        return Stock(
            "autocast",
            "autocast, which gives the products inside the stock op other dtypes on a CPU",
        )
    x1, x2 = input1.reshape(-1, A), input2.reshape(-1, B)
    return run(Bilinear, x1, x2, weight, bias, input1.shape[:-1])
