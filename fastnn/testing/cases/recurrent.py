"""Recurrent cells: one hidden unit, one past a block, no bias, unbatched, states or none."""

import torch

from fastnn.testing import Case, randn


def pair(*shape):
    """Maker of a tuple of two states."""
    one = randn(*shape)
    return lambda dtype, device: (one(dtype, device), one(dtype, device))


F32 = (torch.float32,)
BF16 = (torch.bfloat16,)


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
    Case("LSTM", (randn(4, 2, 3),), sizes(3, 5, proj_size=2), dtypes=F32, stock="option"),
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
]
