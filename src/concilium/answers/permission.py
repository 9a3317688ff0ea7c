"""What a site checks of a request before it does anything: the names in it, and its own policy."""

from __future__ import annotations

import re
from typing import TypeAlias

from concilium import catalog
from concilium.answers import Job, Policy
from concilium.answers.new_patients import NEW
from concilium.errors import ContractError, PrivacyError
from concilium.messages import (
    Align,
    Blind,
    Evaluate,
    Fetch,
    Front,
    Hand,
    Hold,
    Keep,
    Look,
    Offer,
    Pass,
    Personalize,
    Prepare,
    Request,
    Take,
    Train,
    Where,
)

Splitting: TypeAlias = Front | Look | Offer | Blind | Align | Where
"""Requests whose answers are activations, or show which cases or patches there are to make some of."""


def check_names(request: Request) -> None:
    """Check the names of models in a request: they name files here, and come from outside."""
    names = [getattr(request, "model", "none"), *getattr(request, "members", ())]
    if isinstance(request, Keep):
        names += [name for name in (request.source, request.personal) if name]
    if isinstance(request, Personalize):
        names.append(request.source)
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ContractError(f"A model is called {name!r}. Allowed: letters, digits, - . and _. Rename it.")


def _opens(request: Request) -> bool:
    """Whether the answer would hold weights as they are."""
    match request:
        case Train():
            return request.send_weights
        case Hand():
            return request.to is None
    return isinstance(request, Front | Fetch)


def _keeps_all(request: Request, job: Job | None) -> bool:
    """Whether it is about a party's front, which stays."""
    return isinstance(request, Front) and request.party and job is not None and job.sends_no_weights


def _check_split(request: Splitting, policy: Policy) -> None:
    if not policy.split:
        raise PrivacyError(
            f"{type(request).__name__} has to do with activations. This site's policy does not let any leave. Allow split "
            "training in its own settings, or run another protocol.",
            rule="split",
        )
    if isinstance(request, Front) and request.reveal_labels and not policy.labels:
        raise PrivacyError(
            f"{request.model} would let the server compute labels. This site's policy does not allow it. Take reveal_labels "
            "out of the study, or allow it in the site's own settings.",
            rule="labels",
        )
    if isinstance(request, Offer | Align | Look) and request.subset == NEW and not policy.new_patients:
        raise PrivacyError(
            f"{type(request).__name__} asks for new patients, those in imagesTs. This site's policy does not let maps of them "
            "leave. Allow it in the site's own settings (new_patients = true), or run the study without new_patients.",
            rule="new_patients",
        )
    if isinstance(request, Where) and not policy.labels:
        raise PrivacyError(
            f"{request.model} asks where patches lie that follow the labels. This site's policy does not tell it. Run the "
            "study with [protocol] patches = 'uniform', or allow it in the site's own settings (labels = true).",
            rule="labels",
        )


def _check_sum(request: Request, policy: Policy) -> None:
    if isinstance(request, Hold) and request.masking.threshold < policy.least_summed:
        raise PrivacyError(
            f"An update of {request.model} would be unmasked in a sum of {request.masking.threshold} sites. This site's policy "
            f"asks for {policy.least_summed} or more. Raise [collect] threshold, or lower least_summed in its settings.",
            rule="least_summed",
        )


def _check_kept(request: Request, policy: Policy, job: Job | None) -> None:
    if isinstance(request, Fetch) and job is not None and not job.has_all:
        raise PrivacyError(
            f"The tensors of {request.model} that stay here were asked for. They are a party's front, which no study sends once "
            "it stays. Do not take part in this study.",
            rule="kept",
        )
    if isinstance(request, Fetch) and not policy.kept:
        raise PrivacyError(
            f"The tensors of {request.model} that stay here were asked for. This site's policy does not let them leave. Allow it "
            "in the site's own settings (kept = true), or run the study with [sharing] unseen = 'none'.",
            rule="kept",
        )


def check_policy(request: Request, policy: Policy, job: Job | None = None) -> None:
    """Check that this site allows what is asked.

    Args:
        job: what it is prepared for, which may keep all weights here.

    Raises:
        PrivacyError: it does not.
    """
    if isinstance(request, Splitting):
        _check_split(request, policy)
    if _opens(request) and not policy.open_weights and not _keeps_all(request, job):
        raise PrivacyError(
            f"{type(request).__name__} asks for weights in the open. This site's policy lets them leave sealed or masked "
            "only. Run cyclic, or [collect] name = 'secure_sum', or allow it in the site's own settings.",
            rule="open_weights",
        )
    _check_sum(request, policy)
    if isinstance(request, Train) and request.shown and not policy.shown:
        raise PrivacyError(
            f"Other sites would be sent this site's update of {request.model} as it is, to judge it. This site's policy does not "
            "allow it. Allow it in the site's own settings (shown = true), or run the study with [collect] name = 'plain'.",
            rule="shown",
        )
    if isinstance(request, Pass | Hand | Take) and request.reveal and not policy.reveal:
        raise PrivacyError(
            f"{request.model} would be sent to the server when it is finished. This site's policy does not allow it. Take reveal "
            "out of the study, or allow it in the site's own settings.",
            rule="reveal",
        )
    _check_kept(request, policy, job)
    asked = []
    match request:
        case Prepare():
            asked = [request.network, request.training.loss, request.training.local_update]
            asked += [*request.guard.defences, *request.filters]
        case Evaluate():
            asked = list(request.metrics)
    for code in (name for plug_in in asked for name in catalog.code_from_outside(plug_in.name, plug_in.options)):
        if policy.plug_ins is not None and code not in policy.plug_ins:
            known = ", ".join(policy.plug_ins) or "none from outside"
            raise PrivacyError(
                f"{code} would be imported and run. Allowed here: {known}. Add it to the site's own settings, if you "
                "trust it.",
                rule="plug_ins",
            )
