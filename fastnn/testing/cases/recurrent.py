"""Recurrent cells and layers: one hidden unit, one past a block, no bias, unbatched, states or
none, projections, recurrent weights that do not fit one block, packed sequences.
"""

import torch

from fastnn.testing import Case, randn


def pair(*shape):
    """Maker of a tuple of two states."""
    one = randn(*shape)
    return lambda dtype, device: (one(dtype, device), one(dtype, device))


F32 = (torch.float32,)
BF16 = (torch.bfloat16,)


def each(*shapes):
    """Maker of a tuple of tensors of these shapes."""
    return lambda dtype, device: tuple(randn(*shape)(dtype, device) for shape in shapes)


def counts(*values):
    """Maker of the numbers of rows of the steps of a packed sequence, which stay on the CPU."""
    return lambda dtype, device: torch.tensor(values)


def sizes(inputs, hidden, **options):
    return {"input_size": inputs, "hidden_size": hidden, **options}


CASES: list[Case] = [
    Case("RNNCell", (randn(5, 3), randn(5, 17)), sizes(3, 17)),
    Case("RNNCell", (randn(4, 6), randn(4, 5)), sizes(6, 5, nonlinearity="relu")),
    Case("RNNCell", (randn(2, 3),), sizes(3, 1, bias=False), dtypes=F32),
    Case("RNNCell", (randn(3), randn(5)), sizes(3, 5), dtypes=F32),
    Case("RNNCell", (randn(2, 3), randn(2, 513)), sizes(3, 513), dtypes=BF16),
    Case("RNNCell", (randn(2, 3), randn(2, 4)), sizes(3, 4), autocast=torch.bfloat16),
    Case("RNNCell", (randn(0, 3),), sizes(3, 4), stock="empty", dtypes=F32),
    Case("LSTMCell", (randn(5, 3), pair(5, 17)), sizes(3, 17)),
    Case("LSTMCell", (randn(3, 2),), sizes(2, 6, bias=False)),
    Case("LSTMCell", (randn(3), pair(5)), sizes(3, 5), dtypes=F32),
    Case("LSTMCell", (randn(7, 1), pair(7, 1)), sizes(1, 1), dtypes=F32),
    Case("LSTMCell", (randn(2, 3), pair(2, 513)), sizes(3, 513), dtypes=BF16),
    Case("LSTMCell", (randn(0, 3),), sizes(3, 4), stock="empty", dtypes=F32),
    Case(
        "LSTMCell",
        (randn(2, 3),),
        sizes(3, 4),
        autocast=torch.bfloat16,
        stock="autocast",
        dtypes=F32,
    ),
    Case("GRUCell", (randn(5, 3), randn(5, 17)), sizes(3, 17)),
    Case("GRUCell", (randn(3, 2),), sizes(2, 6, bias=False)),
    Case("GRUCell", (randn(3), randn(5)), sizes(3, 5), dtypes=F32),
    Case("GRUCell", (randn(7, 1), randn(7, 1)), sizes(1, 1), dtypes=F32),
    Case("GRUCell", (randn(2, 3), randn(2, 513)), sizes(3, 513), dtypes=BF16),
    Case("GRUCell", (randn(0, 3),), sizes(3, 4), stock="empty", dtypes=F32),
    Case(
        "GRUCell",
        (randn(2, 3),),
        sizes(3, 4),
        autocast=torch.bfloat16,
        stock="autocast",
        dtypes=F32,
    ),
    Case("rnn_tanh_cell", (randn(4, 3), randn(4, 5), randn(5, 3), randn(5, 5)), dtypes=F32),
    Case("LSTM", (randn(5, 3, 4), pair(1, 3, 6)), sizes(4, 6)),
    Case("LSTM", (randn(2, 3, 3),), sizes(3, 5, bidirectional=True, num_layers=2), dtypes=F32),
    Case("LSTM", (randn(2, 3, 3),), sizes(3, 5, bias=False, batch_first=True)),
    Case("LSTM", (randn(1, 2, 1),), sizes(1, 65), dtypes=BF16),
    Case("LSTM", (randn(3, 4), pair(1, 5)), sizes(4, 5), dtypes=F32),
    Case(
        "LSTM",
        (randn(3, 2, 4),),
        sizes(4, 5),
        autocast=torch.bfloat16,
        stock="autocast",
        dtypes=F32,
    ),
    Case("LSTM", (randn(4, 2, 3),), sizes(3, 5, num_layers=2, dropout=0.5), dtypes=F32),
    Case("LSTM", (randn(3, 2, 3),), sizes(3, 5, proj_size=2)),
    Case(
        "LSTM",
        (randn(2, 17, 3), lambda *at: (randn(4, 17, 2)(*at), randn(4, 17, 18)(*at))),
        sizes(3, 18, proj_size=2, num_layers=2, bidirectional=True, bias=False),
        dtypes=F32,
    ),
    Case("LSTM", (randn(2, 1, 3),), sizes(3, 66, proj_size=65), dtypes=BF16),
    Case("LSTM", (randn(4, 0, 3),), sizes(3, 5), dtypes=F32, stock="empty"),
    Case("GRU", (randn(5, 3, 4), randn(1, 3, 6)), sizes(4, 6)),
    Case("GRU", (randn(2, 17, 3),), sizes(3, 17, bidirectional=True), dtypes=F32),
    Case("GRU", (randn(2, 3, 3),), sizes(3, 5, bias=False, batch_first=True)),
    Case("GRU", (randn(1, 2, 1),), sizes(1, 65), dtypes=BF16),
    Case("GRU", (randn(3, 4),), sizes(4, 5), dtypes=F32),
    Case(
        "GRU", (randn(3, 2, 4),), sizes(4, 5), autocast=torch.bfloat16, stock="autocast", dtypes=F32
    ),
    Case("RNN", (randn(5, 3, 4), randn(1, 3, 6)), sizes(4, 6)),
    Case("RNN", (randn(2, 17, 3),), sizes(3, 17, bidirectional=True), dtypes=F32),
    Case("RNN", (randn(3, 3, 3),), sizes(3, 5, nonlinearity="relu", batch_first=True)),
    Case("RNN", (randn(3, 2, 4),), sizes(4, 5, bias=False), autocast=torch.bfloat16),
    Case("RNN", (randn(2, 2, 3),), sizes(3, 211), dtypes=F32),
    Case(
        "lstm",
        (randn(6, 3), counts(3, 2, 1), pair(2, 3, 5), each(*2 * [(20, 3), (20, 5), (20,), (20,)]),
         True, 1, 0.0, True, True),
    ),
    Case(
        "lstm",
        (randn(23, 2), counts(18, 4, 1),
         lambda *at: (randn(1, 18, 2)(*at), randn(1, 18, 5)(*at)),
         each((20, 2), (20, 2), (2, 5)), False, 1, 0.0, False, False),
        dtypes=F32,
    ),
    Case(
        "gru",
        (randn(6, 3), counts(3, 2, 1), randn(2, 3, 5), each(*2 * [(15, 3), (15, 5), (15,), (15,)]),
         True, 1, 0.0, True, True),
    ),
    Case(
        "rnn_tanh",
        (randn(6, 3), counts(3, 2, 1), randn(2, 3, 5), each(*2 * [(5, 3), (5, 5), (5,), (5,)]),
         True, 1, 0.0, True, True),
    ),
    Case(
        "rnn_relu",
        (randn(3, 3), counts(1, 1, 1), randn(1, 1, 5), each((5, 3), (5, 5)), False, 1, 0.0, True,
         False),
        dtypes=F32,
    ),
]  # fmt: skip
