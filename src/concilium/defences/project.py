"""A learnt projection: a 1 x 1 convolution at the site to fewer channels, and one at the receiver back to as many as there were.

Both are layers of the network, trained and averaged as the others: the projection belongs to the front, its counterpart to the
body. A map with no more channels than that passes as it is. Fewer bytes travel. Where fronts are averaged the receiver knows the
projection, so that what it leaves in can be looked for with its help.
"""

from __future__ import annotations

from torch import nn

from concilium.defences import Defence

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def defend(*, n_channels: int, n_axes: int, channels: int = 4) -> Defence:
    """The defence of one map.

    Args:
        channels: of each map that leaves.
    """
    if n_channels <= channels:
        return Defence(nn.Identity(), n_channels)
    convolution = CONVOLUTIONS[n_axes - 1]
    send, receive = convolution(n_channels, channels, 1), convolution(channels, n_channels, 1)
    return Defence(send, channels, receive)
