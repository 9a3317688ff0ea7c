"""Any network with a front of its own for each party's channels, whose maps meet in one `fuse` stage (`_fusion.py`).

What `[protocol] name = "vertical"` makes of the study's network; named in a study, it trains in one place, or federated, too.
After Roth et al. 2022, Split-U-Net (arXiv:2208.10553).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from concilium.errors import StudyError
from concilium.messages import PlugIn
from concilium.networks import Stages, make_network
from concilium.networks._fusion import fused


def build(
    *,
    n_channels: int,
    n_labels: int,
    plan: Mapping[str, Any],
    deep_supervision: bool = True,
    of: str = "nnunet",
    options: Mapping[str, bool | int | float | str | tuple[int, ...]] = {},
    parties: Mapping[str, tuple[int, ...]] = {},
    cut: Literal["shallow", "deep"] | tuple[str, ...] = "deep",
    fuse: Literal["concat", "mean", "max"] = "concat",
    tail: Literal["own", "labels"] = "own",
) -> Stages:
    """The network `of`, cut after two stages: a front for each party, `fuse`, and the rest.

    Args:
        n_channels, n_labels, plan, deep_supervision: as every network's.
        of: the network that it is made of.
        options: those of that network.
        parties: name -> places of its channels among the image's; omitted: a party `channelN` for each channel. Channels that
            no party has are not looked at.
        cut: `shallow`, `deep`, or the two stages after which the network is cut; maps meet after the first.
        fuse: `concat`, side by side and mixed by a 1×1 convolution; `mean`; or `max`.
        tail: whether whoever has the labels has all that follows the fronts (`labels`), or what follows the cut (`own`).

    Raises:
        StudyError: a party's channels are not there, or the network cannot be cut so.
    """
    chosen = parties or {f"channel{i}": (i,) for i in range(n_channels)}
    if any(not 0 <= place < n_channels for places in chosen.values() for place in places):
        raise StudyError(
            f"[network] parties = {dict(chosen)} is not possible with {n_channels} channels. Allowed: places 0 to "
            f"{n_channels - 1}. Correct it."
        )
    make = partial(make_network, PlugIn(of, options), n_labels=n_labels, plan=plan, deep_supervision=deep_supervision)
    return fused(
        lambda n: make(n_channels=n),
        chosen,
        cut=(cut,) if isinstance(cut, str) else tuple(cut),
        how=fuse,
        patch_size=plan["patch_size"],
        reveal_labels=tail == "labels",
    )
