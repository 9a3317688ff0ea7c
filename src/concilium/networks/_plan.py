"""What nnU-Net's plan says of its network, checked before anything of it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from concilium.errors import StudyError
from concilium.nnunet_parts import PlainConvUNet, ResidualEncoderUNet

LAYERS = ("conv_op", "norm_op", "dropout_op", "nonlin")
"""Arguments that name what nnU-Net imports."""
_ALLOWED = {f"{c.__module__}.{c.__qualname__}" for c in (PlainConvUNet, ResidualEncoderUNet)}
_MAX_FEATURES = {2: 512, 3: 320}


def arguments_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's arguments for the network. A plan may come over the wire, so its layers are torch's and nothing else.

    nnU-Net imports and calls whatever a plan names (`nonlin: os.system`, with arguments).
    """
    if "architecture" not in plan:
        raise StudyError(
            f"The plan's configuration holds {', '.join(plan) or 'nothing'}. It must hold architecture. "
            "Fill in what it inherits (inherits_from), or plan again."
        )
    architecture = plan["architecture"]
    if architecture["network_class_name"] not in _ALLOWED:
        raise StudyError(
            f"The plan's network is {architecture['network_class_name']}. Allowed are {' and '.join(sorted(_ALLOWED))}. "
            "Plan again with nnU-Net's default or residual encoder planner."
        )
    if unknown := sorted(set(architecture["_kw_requires_import"]) - set(LAYERS)):
        raise StudyError(
            f"The plan wants {', '.join(unknown)} imported. Only {', '.join(LAYERS)} may be. Plan again with nnU-Net's planner."
        )
    arguments = dict(architecture["arch_kwargs"])
    if arguments["n_stages"] < 2:
        raise StudyError(
            f"The plan has {arguments['n_stages']} resolution. At least 2 are needed. Plan with larger patches."
        )
    return arguments | {key: _layer(key, arguments[key]) for key in LAYERS if arguments.get(key) is not None}


def check_plan(plan: Mapping[str, Any], base_features: int | None = None) -> None:
    """Raise StudyError where the plan asks for another network or layer, or for another width than `base_features`."""
    arguments = arguments_of(plan)
    if base_features is None:
        return
    planned = list(arguments["features_per_stage"])
    most = _MAX_FEATURES[2 if arguments["conv_op"].endswith("2d") else 3]
    if planned != [min(most, base_features * 2**i) for i in range(arguments["n_stages"])]:
        raise StudyError(
            f"base_features {base_features} disagrees with the plan, whose stages have {', '.join(map(str, planned))} features. "
            f"Each stage doubles base_features, up to {most}. Plan again with it, or leave it out."
        )


def _layer(key: str, name: str) -> str:
    found = getattr(nn, str(name).rpartition(".")[2], None)
    if not str(name).startswith("torch.nn.") or not isinstance(found, type) or not issubclass(found, nn.Module):
        raise StudyError(
            f"The plan's {key} is {name}. It must be a layer of torch.nn. Plan again with nnU-Net's planner."
        )
    return f"torch.nn.{found.__name__}"
