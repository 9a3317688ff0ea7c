"""Plans and fingerprints where channels of the same patients lie at several sites.

No site sees the union of channels, so nothing is cropped (nnU-Net crops to where any channel is not zero). Geometry, and what is
foreground, is told by whoever has the labels; intensities by each of its own channels, of whole images where there are no labels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from concilium.data.plan import Plan
from concilium.messages import Fingerprint
from concilium.nnunet_parts import PlansManager

CROP = "crop"
"""In a plan's configurations, beside nnU-Net's own keys: false where images are not cropped."""
_NO_NORMALIZATION = "NoNormalization"


def joined(fingerprints: Mapping[str, Fingerprint], labelled: str) -> Fingerprint:
    """The fingerprint of all channels, those of each site after the other; `labelled`: whose geometry it is."""
    own = fingerprints[labelled]
    channels = []
    for site, fingerprint in fingerprints.items():
        theirs = fingerprint.n_foreground
        for channel in fingerprint.channels:
            sums = (channel.mean_sum, channel.square_sum)
            if site != labelled:  # means over their cases, in the units of ours
                sums = (sums[0] * own.n_foreground // theirs, sums[1] * own.n_foreground // theirs)
            channels.append(replace(channel, mean_sum=sums[0], square_sum=sums[1]))
    return replace(own, channels=tuple(channels))


def uncropped(plans: str) -> str:
    """The plan, by which nothing is cropped."""
    found = json.loads(plans)
    for configuration in found["configurations"].values():
        configuration[CROP] = False
    return json.dumps(found, indent=2, allow_nan=False)


def of_channels(plans: str, places: Sequence[int]) -> str:
    """The plan of these of its channels."""
    found = json.loads(plans)
    _choose(found, places)
    return json.dumps(found, indent=2, allow_nan=False)


def crops(plan: Plan) -> bool:
    """Whether images are cropped to where any channel is not zero."""
    return bool(plan.configuration.configuration.get(CROP, True))


def with_channel(plan: Plan) -> tuple[Any, Any]:
    """nnU-Net's managers of plan and configuration, for images with a channel more, which is left as it is."""
    found = json.loads(json.dumps(plan.manager.plans))
    for configuration in found["configurations"].values():
        if "normalization_schemes" in configuration:
            configuration["normalization_schemes"].append(_NO_NORMALIZATION)
            configuration["use_mask_for_norm"].append(False)
    told = found["foreground_intensity_properties_per_channel"]
    told[str(len(told))] = dict.fromkeys(next(iter(told.values()), {"mean": 0.0}), 0.0)
    manager = PlansManager(found)
    return manager, manager.get_configuration(plan.configuration_name)


def _choose(plans: dict[str, Any], places: Sequence[int]) -> None:
    for configuration in plans["configurations"].values():
        for key in ("normalization_schemes", "use_mask_for_norm"):
            if key in configuration:
                configuration[key] = [configuration[key][i] for i in places]
    told = plans["foreground_intensity_properties_per_channel"]
    plans["foreground_intensity_properties_per_channel"] = {str(n): told[str(i)] for n, i in enumerate(places)}
