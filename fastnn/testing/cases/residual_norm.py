"""Dropout, residual and norm: row widths, layouts of branch and residual, noise, dtypes."""

import torch

from fastnn.testing import Case, randn

F32 = (torch.float32,)


def layer(shape, view=None, stock=None, **options):
    n = shape[-1]
    inputs = (randn(*shape), randn(*shape), (n,), randn(n), randn(n))
    return Case("dropout_add_layer_norm", inputs, options, view=view, stock=stock)


def rms(shape, **options):
    n = shape[-1]
    return Case("dropout_add_rms_norm", (randn(*shape), randn(*shape), (n,), randn(n)), options)


def swapped(*shape):
    """A residual whose rows are in the other order."""

    def make(dtype, device):
        x = randn(*shape)(dtype, device).detach().transpose(0, 1).contiguous()
        return x.transpose(0, 1).requires_grad_()

    return make


def over(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


DROPS = {"p": 0.3, "training": True}

CASES: list[Case] = [
    *(
        family(shape, prenorm=prenorm, **options)
        for family in (layer, rms)
        for prenorm in (False, True)
        for shape, options in (
            ((3, 40), {}),
            ((130, 24), DROPS),  # several rows in a tile, several tiles in a program
            ((2, 3, 33), DROPS),  # words one by one
        )
    ),
    layer((2, 3, 768), **DROPS),
    layer((3, 1025), **DROPS),
    # The result twice, and the gradient of a bias that the branch contains.
    *(
        family(shape, prenorm=prenorm, twice=twice, input_bias=randn(shape[-1]), **options)
        for family, shape, prenorm, twice, options in (
            (layer, (130, 24), False, True, DROPS),
            (layer, (2, 90, 40), True, False, {}),
            (rms, (2, 3, 33), True, True, DROPS),
            (rms, (5, 16), False, False, {}),
        )
    ),
    layer((3, 5, 16), over, twice=True, input_bias=randn(16), **DROPS),
    Case(  # only the bias of the branch requires a gradient
        "dropout_add_layer_norm",
        (randn(40, 9, grad=False), randn(40, 9, grad=False), (9,)),
        {"input_bias": randn(9), **DROPS},
    ),
    layer((5, 6), input_bias=randn(5, 6), stock="shape"),
    layer((1, 1), **DROPS),
    layer((7,), **DROPS),
    layer((2, 2, 3, 8), prenorm=True, **DROPS),
    layer((5, 6), p=1.0, training=True),
    layer((5, 6), p=0.4),
    layer((5, 6), eps=0.1),
    # The branch in the order (L, B, N), as attention leaves it with `batch_first`.
    layer((3, 5, 16), over, **DROPS),
    layer((3, 5, 16), over, prenorm=True, **DROPS),
    layer((3, 5, 16), over, prenorm=True),
    layer((30, 5, 12), over),
    *(
        Case(
            "dropout_add_layer_norm",
            (randn(3, 5, 16), swapped(3, 5, 16), (16,), randn(16), randn(16)),
            {"prenorm": prenorm, **DROPS},
            view=view,
        )
        for prenorm in (False, True)
        for view in (None, over)
    ),
    Case(  # rows apart
        "dropout_add_layer_norm",
        (randn(9, 16), lambda t, d: randn(9, 32)(t, d).detach()[:, 8:24].requires_grad_(), (16,)),
        DROPS,
    ),
    # Only some inputs require a gradient.
    *(
        Case(
            "dropout_add_layer_norm",
            (
                randn(40, 9, grad=z),
                randn(40, 9, grad=x),
                (9,),
                randn(9, grad=w),
                randn(9, grad=b),
            ),
            {"prenorm": prenorm, **DROPS},
        )
        for prenorm in (False, True)
        for z, x, w, b in (
            (True, False, False, False),
            (False, True, False, True),
            (False, False, True, False),
        )
    ),
    Case("dropout_add_layer_norm", (randn(3, 9), randn(3, 9), (9,), None, randn(9)), DROPS),
    # |mean| >> std.
    Case("dropout_add_layer_norm", (randn(4, 300), randn(4, 300, shift=1e3), (300,)), {}),
    Case("dropout_add", (randn(5, 40), randn(5, 40)), {"p": 0.3}),
    Case("dropout_add", (randn(3, 5, 16), randn(3, 5, 16)), {"p": 0.3}, view=over),
    Case("dropout_add", (randn(5, 7), randn(5, 7)), {"p": 1.0}),
    Case("dropout_add", (randn(5, 7), randn(5, 7)), {"training": False}),
    Case("dropout_add", (randn(5, 7), randn(7)), {"p": 0.3}, stock="shape"),
    # Calls that run stock.
    Case(
        "dropout_add_layer_norm",
        (randn(0, 4), randn(0, 4), (4,)),
        stock="empty",
    ),
    Case(
        "dropout_add_layer_norm",
        (randn(2, 9000), randn(2, 9000), (9000,)),
        stock="size",
        dtypes=F32,
    ),
    Case(
        "dropout_add_layer_norm",
        (randn(2, 3, 4), randn(2, 3, 4), (3, 4)),
        stock="shape",
    ),
    Case(
        "dropout_add_layer_norm",
        (randn(4, 6), randn(6, 4), (4,)),
        view=lambda z: z.t(),
        stock="layout",
    ),
]
