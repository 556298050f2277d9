"""Stock layers whose `forward` calls `fastnn.functional`. Nothing else about them differs.

The files and their order mirror torch/nn/modules/.
"""

from fastnn.layers.activation import *  # noqa: F403
from fastnn.layers.adaptive import *  # noqa: F403
from fastnn.layers.batchnorm import *  # noqa: F403
from fastnn.layers.channelshuffle import *  # noqa: F403
from fastnn.layers.container import *  # noqa: F403
from fastnn.layers.conv import *  # noqa: F403
from fastnn.layers.distance import *  # noqa: F403
from fastnn.layers.dropout import *  # noqa: F403
from fastnn.layers.fold import *  # noqa: F403
from fastnn.layers.instancenorm import *  # noqa: F403
from fastnn.layers.linear import *  # noqa: F403
from fastnn.layers.linear_cross_entropy import *  # noqa: F403
from fastnn.layers.loss import *  # noqa: F403
from fastnn.layers.normalization import *  # noqa: F403
from fastnn.layers.padding import *  # noqa: F403
from fastnn.layers.pixelshuffle import *  # noqa: F403
from fastnn.layers.pooling import *  # noqa: F403
from fastnn.layers.rnn import *  # noqa: F403
from fastnn.layers.softmax import *  # noqa: F403
from fastnn.layers.sparse import *  # noqa: F403
from fastnn.layers.transformer import *  # noqa: F403
from fastnn.layers.upsampling import *  # noqa: F403
