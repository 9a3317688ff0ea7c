"""What a site says of a study that cannot be trained in micro-batches, where it holds no whole batch."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from concilium.errors import DataError
from concilium.local_updates import is_more_than_a_step
from concilium.networks import Stages


def must_be_divisible(micro_batch: int | None, batch_size: int, local_update: str, network: Stages) -> None:
    """Check that steps in micro-batches are those of the whole batch.

    Raises:
        DataError: a trainer of nnU-Net takes the steps, or a layer looks at the whole batch.
    """
    if micro_batch is None or micro_batch >= batch_size:
        return
    if is_more_than_a_step(local_update):
        raise DataError(
            f"micro_batch = {micro_batch} is not allowed with [local_update] name = {local_update!r}, whose trainer runs a whole "
            f"batch of {batch_size}. Allowed: another local update, or a smaller [training] batch_size. Ask for one.",
            code="micro_batch",
        )
    if mixing := layers_that_mix(network):
        raise DataError(
            f"micro_batch = {micro_batch} is not allowed with a network of which {len(mixing)} layers, such as {mixing[0]}, look "
            f"at a whole batch, here of {batch_size}: in parts they see less. Allowed: instance or group norm. Ask for one.",
            code="micro_batch",
        )


def layers_that_mix(network: nn.Module) -> list[str]:
    """The layers whose result for a patch depends on the others of its batch, or that keep statistics of what they see."""
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, _BatchNorm) or (isinstance(layer, _NormBase) and layer.track_running_stats)
    ]


def must_be_whole(micro_batch: int | None, batch_size: int, model: str) -> None:
    """Check that the site holds a whole batch, as split training needs: the body sees it in one piece.

    Raises:
        DataError: it does not.
    """
    if micro_batch is not None and micro_batch < batch_size:
        raise DataError(
            f"micro_batch = {micro_batch} is not allowed in split training, where {model} is trained on whole batches of "
            f"{batch_size}. Allowed: another protocol, or a smaller [training] batch_size. Ask for one.",
            code="micro_batch",
        )
