"""What a study may not say of what is shared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from concilium.errors import StudyError
from concilium.local_updates import exchanges, is_more_than_a_step
from concilium.sharing import ENDS


def spelled_out(found: Mapping[str, Any]) -> Any:
    """`[sharing]` with what `[protocol] variant = "v3"` says in short: front and tail stay."""
    p, s = found["protocol"], found["sharing"]
    short = p and s and p.options.get("variant") == "v3" and ENDS not in s.keep
    return dataclasses.replace(s, keep=(*s.keep, ENDS)) if short else s


def misshared(found: Mapping[str, Any]) -> list[str]:
    """What is wrong between `[sharing]`, `[plan] fingerprint` and the other tables."""
    p, plan, s, v = (found[table] for table in ("protocol", "plan", "sharing", "validation"))
    if not (p and plan and s and v):
        return []
    by_site = plan.fingerprint == "site"
    problems = [*(_plans_by_site(found) if by_site else []), *_unpersonal(found), *_untaught(found), *_unfrozen(found)]
    if not by_site and s.match != "resolution":
        problems.append(
            f"[sharing] match = {s.match!r} is not used with one plan. Used there: none. Remove it, or set [plan] fingerprint = "
            "'site'."
        )
    if not s.keep and not by_site:
        if s.unseen != "none":
            problems.append(
                f"[sharing] unseen = {s.unseen!r} is not used where nothing stays at a site. Used there: none. Remove it, or "
                "say what to keep."
            )
        return problems
    what = f"[sharing] keep = {list(s.keep)}" if s.keep else "[plan] fingerprint = 'site'"
    if p.name in ("local", "centralized"):
        problems.append(
            f"{what} is not allowed with protocol {p.name!r}, which shares no tensors. Allowed: 'federated'. Choose it, or take "
            "the setting out."
        )
    elif ENDS in s.keep and p.name != "splitfed":
        problems.append(
            f"{what} is not allowed with protocol {p.name!r}: 'ends' are front and tail of a network whose body is the server's. "
            "Allowed: 'splitfed'. Choose it, or keep less."
        )
    if found["collect"].name == "judged":
        problems.append(
            f"{what} is not allowed with [collect] name = 'judged': an update that lacks tensors cannot be judged elsewhere. "
            "Allowed: 'plain'. Take one of the two out."
        )
    if v.select == "best" and s.unseen != "none":
        problems.append(
            f"[sharing] unseen = {s.unseen!r} is not allowed with [validation] select = 'best': each site keeps the round that "
            "was best there, and the model for sites elsewhere would be of the last. Allowed: select = 'last', or "
            "unseen = 'none'. Choose one of the two."
        )
    if v.leave_one_site_out and s.unseen == "none":
        problems.append(
            f"{what} is not allowed with leave_one_site_out and unseen = 'none': the site that is left out would lack tensors. "
            "Allowed: unseen = 'mean' or 'reestimate', where there is one plan. Say which."
        )
    return problems


def _untaught(found: Mapping[str, Any]) -> list[str]:
    """Losses and local updates for partial labels that the shared tensors leave without sense."""
    loss, update, keep = found["loss"], found["local_update"], found["sharing"].keep
    problems = []
    if loss.name == "own_labels" and found["protocol"].name != "local" and not _own_heads(keep):
        problems.append(
            f"[loss] name = 'own_labels' is not allowed with [sharing] keep = {list(keep)}: shared heads would be told by each "
            "site that what only others annotate is background. Allowed: keep = ['heads']. Say so, or choose 'marginal' for one "
            "network of all labels."
        )
    if update.name != "condistfl":
        return problems
    given = "[local_update] name = 'condistfl' is not allowed with"
    if _own_heads(keep):
        problems.append(
            f"{given} [sharing] keep = {list(keep)}: heads that stay were taught by nobody what their site does not annotate. "
            "Allowed: shared heads. Take them out of keep, or choose 'plain'."
        )
    if loss.name == "own_labels":
        problems.append(
            f"{given} [loss] name = 'own_labels': to it there are no labels but a site's own. Allowed: 'marginal'. Choose it, or "
            "'plain' as the update."
        )
    if loss.name == "dice_ce" and loss.options.get("unannotated") == "background":
        problems.append(
            f"{given} [loss] unannotated = 'background': the one teaches that the labels are there, the other that they are not. "
            "Allowed: [loss] name = 'marginal'. Choose it, or 'plain' as the update."
        )
    return problems


def _own_heads(keep: Sequence[str]) -> bool:
    """Whether the layers that make logits stay at the sites, by their role or by a pattern that starts with their name."""
    return any(
        one in ("heads", "decoder", ENDS) or one.startswith("head") or fnmatchcase("head0.weight", one) for one in keep
    )


def _plans_by_site(found: Mapping[str, Any]) -> list[str]:
    """What does not go together with networks that differ."""
    given = "[plan] fingerprint = 'site' is not allowed with"
    problems = []
    p, s, start = found["protocol"], found["sharing"], found["start"]
    if p.name == "splitfed":
        problems.append(f"{given} protocol {p.name!r}: its body is one network. Allowed: 'federated'. Choose it.")
    if s.unseen != "none":
        problems.append(
            f"{given} [sharing] unseen = {s.unseen!r}: a site that did not train has no network. Allowed: 'none'. Take it out."
        )
    if start and start.weights is not None:
        problems.append(
            f"{given} [network] weights = '{start.weights}': they fit one network. Allowed: one plan. Take one of the two out."
        )
    if _exchanges(found["local_update"].name):
        problems.append(
            f"{given} [local_update] name = {found['local_update'].name!r}, which exchanges more than weights. Allowed: 'plain', "
            "'proximal', 'ditto' and others that do not. Choose one of these."
        )
    return problems


def _unpersonal(found: Mapping[str, Any]) -> list[str]:
    """What fine-tuning at the sites does not go together with."""
    own, p = found["personalize"], found["protocol"]
    problems = []
    if own and own.steps is None and own != type(own)():
        given = f"tensors = {list(own.tensors)}, learning_rate = {own.learning_rate}"
        problems.append(
            f"[personalize] {given} is not used without steps. Allowed: steps of 1 or more. Add steps, or take the table out."
        )
    if own and own.steps and p.name == "local":
        problems.append(
            f"[personalize] steps = {own.steps} is not allowed with protocol 'local', whose models are the sites' own already. "
            "Allowed: a protocol that shares weights. Take it out."
        )
    if own and own.steps and _brings(found["local_update"].name):
        problems.append(
            f"[personalize] steps = {own.steps} is not allowed with [local_update] name = {found['local_update'].name!r}, which "
            "brings batches and optimiser of its own. Allowed: the others. Take one of the two out."
        )
    return problems


def _unfrozen(found: Mapping[str, Any]) -> list[str]:
    """Tensors that are to be frozen where whoever trains them knows nothing of it."""
    t, name = found["training"], found["local_update"].name
    if not t or not t.tensors or not _brings(name):
        return []
    return [
        f"[training] tensors = {list(t.tensors)} is not allowed with [local_update] name = {name!r}, which brings a network "
        "and an optimiser of its own. Allowed: the others. Take one of the two out."
    ]


def _brings(name: str) -> bool:
    try:
        return is_more_than_a_step(name)
    except StudyError:
        return False


def _exchanges(name: str) -> bool:
    try:
        return exchanges(name)
    except StudyError:  # there is no such update, which is told elsewhere
        return False
