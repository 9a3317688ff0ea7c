"""What a study asks for, tried once before anything trains: an error after a night of training would have been one before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from concilium import catalog
from concilium.aggregation import compares_updates
from concilium.data.draws import drawn_from
from concilium.data.labels import Labels, has_regions, ignored, n_heads
from concilium.errors import ContractError, StudyError
from concilium.freezing import frozen_of
from concilium.local_updates import is_more_than_a_step
from concilium.local_updates._besides import check_network
from concilium.networks import Stages
from concilium.sharing import kept_of, named, named_statistics
from concilium.study import Study


def try_network(study: Study, network: Callable[..., Stages]) -> None:
    """Build the network once, and let the protocol say whether it can train it.

    Raises:
        StudyError: it cannot be built by this plan, or not trained so.
    """
    p = study.protocol
    check = getattr(inspect.getmodule(catalog.load("protocols", p.name)), "check", None)
    with drawn_from("check"):  # the weights are thrown away, and nothing else is to draw from here
        built = network()
    if check is not None:
        check(built, **p.options)
    check_network(study.local_update, built)


def try_tensors(study: Study, network: Callable[..., Stages], image: Sequence[int]) -> None:
    """Look for the tensors that the study names in its network, which takes images of this shape (B, C, *patch).

    Raises:
        StudyError: it has none of them, none that trains or that the loss depends on, or no running statistics that could be
            estimated anew.
    """
    with drawn_from("check"):
        built = network()
        if frozen_of(built):
            _try_loss_reaches(study, network, image)
    if study.personalize.tensors:
        _try_fine_tuning(built, study.personalize.tensors)
    if study.sharing.keep:
        kept_of(built, study.sharing.keep)
    if study.sharing.unseen == "reestimate" and not named_statistics(built):
        raise StudyError(
            f"[sharing] unseen = 'reestimate' is not possible with network {study.network.name!r}: its norms have no running "
            "statistics. Allowed: 'none', 'mean'. Choose one, or norms that have, such as norm = 'batch' of unet."
        )


def _try_loss_reaches(study: Study, network: Callable[..., Stages], image: Sequence[int]) -> None:
    try:
        with FakeTensorMode(), torch.device("cpu"):
            reached = any(m.requires_grad for m in network()(torch.empty(image)))
    except Exception:  # a network from outside need not run on shapes alone; then the first step of training says so
        return
    if not reached:
        raise StudyError(
            f"[training] tensors = {list(study.training.tensors)} is not possible: the network's logits depend on none of them, "
            "so the loss could not train them. Allowed: tensors between image and logits, such as 'heads'. Name some."
        )


def _try_fine_tuning(network: Stages, tensors: Sequence[str]) -> None:
    chosen = named(network, tensors, where="[personalize] tensors")
    if not any(p.requires_grad for name, p in network.named_parameters(remove_duplicate=False) if name in chosen):
        raise StudyError(
            f"[personalize] tensors = {list(tensors)} is not possible: none of these {len(chosen)} tensors trains. Allowed: "
            "roles or patterns with weights or biases, such as 'norms' or 'heads'. Choose one, or take tensors out to train all."
        )


def try_loss(study: Study, labels: Labels) -> None:
    """Ask the loss once for that of a patch of which only some labels are annotated.

    Raises:
        StudyError: it says that it needs all, or the local update brings a loss of its own.
    """
    loss, update = study.loss, study.local_update.name
    if is_more_than_a_step(update):
        others = [name for name in catalog.names("local_updates") if not is_more_than_a_step(name)]
        raise StudyError(
            f"[local_update] name = {update!r} is not allowed where only some labels are annotated: its own loss and batches "
            f"need all, in every case. Allowed: {', '.join(others)}. Choose another local update, with a [loss] such as marginal."
        )
    n, ignore = n_heads(labels), ignored(labels)
    told: dict[str, Any] = {} if ignore is None else {"ignore": ignore}
    target = torch.zeros(1, 1, 4, 4)
    if has_regions(labels):
        told["regions"] = True
        target = torch.zeros(1, n + (ignore is not None), 4, 4, dtype=torch.bool)
    mask = torch.tensor([[True] * (n - 1) + [False]])
    try:
        catalog.load("losses", loss.name)(
            torch.zeros(1, n, 4, 4), target, mask, batch_dice=False, **told, **loss.options
        )
    except ContractError as e:
        raise StudyError(
            f"[loss] name = {loss.name!r} is not allowed where sites annotate some labels only"
            f", or do in some cases ({e}). Choose one that is, such as marginal."
        ) from e


def try_rule(rule: str, annotated: Mapping[str, frozenset[str]]) -> None:
    """Look whether the rule of aggregation goes with the labels that each site annotates.

    Raises:
        StudyError: it compares sites, and they annotate different ones.
    """
    if len(set(annotated.values())) < 2 or not compares_updates(rule):
        return
    told = "; ".join(f"{site}: {', '.join(sorted(labels)) or 'nothing'}" for site, labels in annotated.items())
    fine = ", ".join(repr(name) for name in catalog.names("aggregation") if not compares_updates(name))
    raise StudyError(
        f"[aggregation] name = {rule!r} is not allowed where sites annotate different labels ({told}): it would take the only "
        f"site that knows a label for one that is wrong. Allowed: {fine}. Choose one of these."
    )
