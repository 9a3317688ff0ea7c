"""Which tensors of a network train. What is frozen is none of its tensors to whoever trains, sends, averages or saves them.

`freezing` builds a network whose frozen tensors are hidden: its `state_dict` does not have them, in whole or in parts, and its
parameters that do not train have no gradient. So they are in no message, no optimiser and no snapshot. Server and sites have
them from the same place, the study's seed or a file (`answers/frozen.py`), and compare digests before anything trains. Norms
whose running statistics are frozen run as in evaluation, so that these do not move.

Houlsby et al. 2019 (arXiv:1902.00751) train adapters alone, Hu et al. 2021 (arXiv:2106.09685) matrices of low rank, Ben Zaken et
al. 2022 (arXiv:2106.10199) biases; Liu et al. 2024 (FedFMS, arXiv:2403.05408) average what trains, and freeze the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from concilium.data.draws import drawn_from
from concilium.errors import ContractError, StudyError
from concilium.messages import Tensors
from concilium.networks import Stages
from concilium.sharing import HIDDEN, STATISTICS, named

WHERE = "[training] tensors"


def freezing(
    build: Callable[..., Stages], wanted: Sequence[str], values: Tensors | None = None
) -> Callable[..., Stages]:
    """What builds the network with all tensors frozen but those `wanted` (roles or patterns; none: as the network itself says).

    Args:
        values: of the frozen tensors; omitted: as they are drawn.

    Raises:
        StudyError: when it builds, a role or pattern fits nothing, or nothing would train.
    """
    found: list[frozenset[str]] = []

    def built(**how: Any) -> Stages:
        network = build(**how)
        if not (wanted or network.trains):
            return network
        if not found:  # by the network as the study has it: a part of it may lack what is named
            with drawn_from("look"):
                found.append(frozen_names(build() if how else network, wanted or network.trains))
        freeze(network, found[0], values)
        return network

    return built


def frozen_names(network: Stages, wanted: Sequence[str]) -> frozenset[str]:
    """The tensors that are frozen where those `wanted` train.

    Raises:
        StudyError: a role or pattern fits nothing, or no parameter is among them.
    """
    trains = named(network, wanted, where=WHERE)
    if not any(p.requires_grad for n, p in network.named_parameters(remove_duplicate=False) if n in trains):
        raise StudyError(
            f"{WHERE} = {list(wanted)} is not possible: none of these {len(trains)} tensors trains, so nothing would. Allowed: "
            "roles or patterns with weights or biases, such as 'decoder' or 'norms'. Add one, or take tensors out to train all."
        )
    return frozenset(network.state_dict().keys() - trains)


def freeze(network: nn.Module, names: Collection[str], values: Tensors | None = None) -> None:
    """Freeze these tensors of the network, as far as it has them, and hide them.

    Raises:
        ContractError: `values` lack one, or one has another shape there.
    """
    tensors = {n: t for n, t in network.state_dict(keep_vars=True).items() if n in names}
    if values is not None:
        _fill(tensors, values)
    ids = {id(t) for t in tensors.values()}  # a network may know a tensor by more names than one
    for module in network.modules():
        own = {n: t for n, t in (module._parameters | module._buffers).items() if t is not None and id(t) in ids}
        if not own:
            continue
        for tensor in own.values():
            tensor.requires_grad_(False)
        setattr(module, HIDDEN, tuple(own))
        module.register_state_dict_post_hook(_hide)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_keep)  # type: ignore[no-untyped-call]
        if STATISTICS[0] in own:
            pin(module, training=False)


def _fill(tensors: Tensors, values: Tensors) -> None:
    for name, tensor in tensors.items():
        if name not in values or values[name].shape != tensor.shape:
            raise ContractError(
                f"The frozen tensor {name} {tuple(tensor.shape)} is not among the {len(values)} that are there. Expected all "
                "that do not train. Use one version of Concilium everywhere."
            )
        if not isinstance(tensor, FakeTensor):  # which has no values, where costs are forecast
            with torch.no_grad():
                tensor.copy_(values[name])


def pin(module: nn.Module, *, training: bool) -> None:
    """Put a module into a mode in which it stays, whatever is done to the network around it."""
    module.train(training)
    module.train = lambda mode=True: module  # type: ignore[method-assign]


def frozen_of(network: nn.Module) -> dict[str, Tensor]:
    """The frozen tensors of a network, each once; none of one that trains as a whole."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in _frozen(network):
        if id(tensor) not in seen:
            found[name] = tensor.detach()
        seen.add(id(tensor))
    return found


def trained_of(network: nn.Module, weights: Tensors) -> dict[str, Tensor]:
    """Of all weights of a network those that train."""
    frozen = frozen_of(network)
    return {n: t for n, t in weights.items() if n not in frozen}


def digest_of(tensors: Tensors) -> str:
    """SHA-256 over names, types, shapes and bytes; nothing of no tensor."""
    if not tensors:
        return ""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _frozen(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in network.named_modules():
        for name in getattr(module, HIDDEN, ()):
            yield f"{prefix}.{name}" if prefix else name, _own(module, name)


def _own(module: nn.Module, name: str) -> Tensor:
    own = module._parameters.get(name)
    return cast(Tensor, module._buffers[name] if own is None else own)


def _hide(module: nn.Module, tensors: dict[str, Any], prefix: str, _: Any) -> None:
    for name in getattr(module, HIDDEN):
        tensors.pop(prefix + name, None)


def _keep(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    """What is frozen stays as it is; where weights have it too, it must be the same."""
    for name in getattr(module, HIDDEN):
        own = _own(module, name)
        given = tensors.setdefault(prefix + name, own)
        if given is not own and not (given.shape == own.shape and torch.equal(given.to(own), own)):
            raise ContractError(
                f"{prefix}{name} is frozen, and these weights have another {tuple(given.shape)}. Expected the same tensor, or "
                "none. Use weights of this run."
            )


def _changes(module: nn.Module) -> bool:
    """Whether training changes a tensor of this module: a parameter, or the running statistics of a norm."""
    measures = getattr(module, STATISTICS[0], None) is not None and STATISTICS[0] not in getattr(module, HIDDEN, ())
    return measures or any(p.requires_grad for p in module.parameters(recurse=False))


def front_of(network: nn.Module) -> tuple[Stages, Stages] | None:
    """The stages at the beginning that train nothing, and the rest; `None` where the network cannot be cut after any."""
    if not isinstance(network, Stages):
        return None
    last = ""
    for name in network.names:
        if any(_changes(module) for module in network[name].modules()):
            break
        if name in network.split_points:
            last = name
    if not last:
        return None
    front, rest = network.split(last)
    return front, rest
