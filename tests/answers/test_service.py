"""What a party shows of a case when a finished model is at work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from concilium.answers.service import Windows
from concilium.data.windows import Some
from concilium.errors import PrivacyError
from concilium.networks import Stack, Stage, Stages


class Filter(Stage):
    """A convolution; one that copies, if a server sends such weights."""

    takes = leaves = 1

    def __init__(self, *, copies: bool) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        if copies:
            nn.init.dirac_(self.layer.weight)

    def forward(self, *maps: Tensor) -> Stack:
        return (self.layer(maps[0]),)


def test_weights_that_copy_the_image_show_it_to_nobody() -> None:
    """A front is sent by the server: as in training, a site looks at what would leave."""
    image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fine = Windows(Stages({"first": Filter(copies=False)}), Some(0, 1), 2)
        assert fine(image).shape == (1, 2, 8, 8)
        assert len(fine.maps) == 1
        with pytest.raises(PrivacyError, match="first"):
            Windows(Stages({"first": Filter(copies=True)}), Some(0, 1), 2)(image)
