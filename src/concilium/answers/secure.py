"""Answers to `Hold`, `Deal`, `Mask`, `Agree` and `Unmask`: an update that leaves under masks only (`masking.py`).

Bonawitz et al. 2017 (doi:10.1145/3133956.3133982, figure 4, with the consistency check). What a site does not do, whatever it is
asked: send an update that it held back without masks, or under two sets of masks; name two lists of survivors in a round; give
shares before `threshold` sites have signed the same list as this one; give the share of a site's own mask and that of its key
both; help to unmask two different sums of a round, in whichever life. Keys are made for one round of one life of a site, and are
in its memory alone: a site that restarted knows nothing of the round, and refuses to go on with it.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from concilium import masking
from concilium.aggregation import about_before, weight_of
from concilium.answers import Check, Settings
from concilium.answers.ledger import note
from concilium.answers.summed import note_sum
from concilium.answers.train import Learner
from concilium.errors import ContractError, PrivacyError
from concilium.masking import Terms
from concilium.messages import (
    Agree,
    Agreed,
    Card,
    Deal,
    Dealt,
    Held,
    Hold,
    Keys,
    Mask,
    Masked,
    Reply,
    Unmask,
    Unmasked,
)
from concilium.sealing import KEY_BYTES, About, as_bytes, as_tensor, check_card, make_card, seal, unseal
from concilium.wire import read_tensors, write_tensors

Secret: TypeAlias = Deal | Mask | Agree | Unmask


@dataclass
class Attempt:
    """What a site knows of one attempt at a round, from the end of its training to its last answer."""

    order: Hold
    share_key: X25519PrivateKey
    mask_key: X25519PrivateKey
    keys: Keys
    weight: int
    n_cases: int
    seed: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES))
    """Of the site's own mask."""
    terms: Terms | None = None
    shares: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Sender -> what was dealt to this site: a share of its `seed`, and one of its `key`."""
    survivors: tuple[str, ...] = ()


class Secure:
    """What a site must know to take part in rounds of masked updates in one run; one round at a time."""

    def __init__(self, settings: Settings, *, run: str) -> None:
        self._settings, self._run = settings, run
        self._attempt: Attempt | None = None

    # ------------------------------------------------------------------------------------------------------- requests

    def hold(self, learner: Learner, request: Hold, cancelled: Check) -> Held:
        """Train, put the change aside, and make keys for this attempt; what an earlier one left is gone.

        Raises:
            ContractError: the weights are not this network's, or there never were any; or it is asked for what there is not.
            OverflowError: a value has changed by more than can be said.
            DataError, FloatingPointError, Cancelled: as in training.
        """
        self.forget()
        how, name = request.masking, self._settings.name
        if how.bits not in masking.UNSIGNED or how.counts not in masking.COUNTS or not how.range > 0:
            raise ContractError(
                f"Masked updates of {how.bits} bits, range {how.range}, counted by {how.counts!r} were asked for. Allowed: "
                f"{', '.join(map(str, masking.UNSIGNED))} bits, a range above 0, {' or '.join(masking.COUNTS)}. Use one version."
            )
        order = request.train
        trained = learner.train(replace(order, send_weights=True), site=name, cancelled=cancelled)
        trained = note(self._settings.folder, order, trained, learner.job.training.local_update, learner.draws)
        changes = masking.flat(about_before(trained.weights, order.weights), order.weights, how)
        flat = {"changes": changes, "beside": masking.flat(trained.control, None, how)}
        held = {part: torch.from_numpy(values) for part, values in flat.items()}
        share = trained.n_steps / order.steps
        weight = weight_of(masking.COUNTS[how.counts])(trained.n_cases, share)
        share_key, mask_key = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        keys = Keys(self._card("share", share_key, request), self._card("mask", mask_key, request))
        write_tensors(self._update, held, {})
        self._attempt = Attempt(request, share_key, mask_key, keys, weight, trained.n_cases)
        told = replace(trained, weights={}, control={})
        return Held(told, tuple(sorted(trained.control)), keys)

    def answer(self, request: Secret) -> Reply:
        """The reply to what follows.

        Raises:
            ContractError: the site is not at this point of this round; or what it was given does not fit.
            PrivacyError: the answer would tell more than the sum.
        """
        attempt = self._at(request)
        match request:
            case Deal():
                return self._deal(attempt, request)
            case Mask():
                return self._mask(attempt, request)
            case Agree():
                return self._agree(attempt, request)
            case Unmask():
                return self._unmask(attempt, request)

    def forget(self) -> None:
        """Let go of the attempt at hand, and of the update that was held back."""
        self._attempt = None
        self._update.unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------------------- steps

    def _deal(self, attempt: Attempt, request: Deal) -> Dealt:
        """Divide the two secrets of this attempt among all its sites."""
        name, threshold = self._settings.name, attempt.order.masking.threshold
        self._once(attempt.terms is None, "deal shares", request)
        terms = Terms(request.model, request.round, attempt.order.masking, request.keys, request.weight, request.cases)
        self._check_sites(terms, attempt)
        if not (attempt.weight <= terms.weight and attempt.n_cases <= terms.cases):
            raise ContractError(
                f"All updates together were said to count {terms.weight} for {terms.cases} cases. This one alone counts "
                f"{attempt.weight} for {attempt.n_cases}. Report this."
            )
        for keys in terms.keys:
            for purpose, card in (("share", keys.share), ("mask", keys.mask)):
                check_card(card, self._text(purpose, attempt.order), self._settings.identity)
        attempt.terms = terms
        seeds = masking.divide(attempt.seed, terms.sites, threshold)
        own = masking.divide(attempt.mask_key.private_bytes_raw(), terms.sites, threshold)
        attempt.shares[name] = {"seed": seeds[name], "key": own[name]}
        sealed = {}
        for keys in terms.keys:
            if (site := keys.share.site) != name:
                shares = {"seed": as_tensor(seeds[site]), "key": as_tensor(own[site])}
                receiver = check_card(keys.share, self._text("share", attempt.order), self._settings.identity)
                about = self._about(terms, name, site)
                sealed[site] = seal(shares, about, own=attempt.share_key, receiver=receiver)
        return Dealt(sealed, as_tensor(masking.commitment(attempt.seed, terms, name)))

    def _check_sites(self, terms: Terms, attempt: Attempt) -> None:
        """Check that the sum is one of enough sites, each named once, with this one as it introduced itself."""
        sites, threshold = terms.sites, attempt.order.masking.threshold
        own = [keys for keys in terms.keys if keys.share.site == self._settings.name]
        if list(sites) != sorted(set(sites)) or any(k.share.site != k.mask.site for k in terms.keys):
            raise ContractError(f"Keys of {', '.join(sites)} came. Expected each site once, sorted. Report this.")
        if len(own) != 1 or not _same(own[0], attempt.keys):
            raise ContractError(
                f"The keys of {self._settings.name} are not among those of this round as it has shown them. Report this."
            )
        if not len(sites) / 2 < threshold <= len(sites):
            raise PrivacyError(
                f"Of {len(sites)} sites, {threshold} would be enough to unmask a sum. Allowed: more than half of them, and no "
                "more than there are. Set [collect] threshold so.",
                rule="unmask",
            )

    def _mask(self, attempt: Attempt, request: Mask) -> Masked:
        """The update under the site's own mask, and under one for each site whose shares are here."""
        terms, name = self._terms(attempt), self._settings.name
        self._once(set(attempt.shares) == {name}, "mask its update", request)
        dealers = {*request.shares, name}
        if not dealers <= set(terms.sites) or len(dealers) < terms.masking.threshold:
            raise PrivacyError(
                f"Shares of {len(dealers)} sites are here ({', '.join(sorted(dealers))}). A sum needs those of "
                f"{terms.masking.threshold} among {', '.join(terms.sites)}. Nothing leaves.",
                rule="unmask",
            )
        received = {}
        for sender, sealed in request.shares.items():
            if sender != name:
                card = terms.keys[terms.sites.index(sender)].share
                key = check_card(card, self._text("share", attempt.order), self._settings.identity)
                opened = unseal(sealed, self._about(terms, sender, name), own=attempt.share_key, sender=key)
                received[sender] = {part: as_bytes(opened[part]) for part in ("seed", "key")}
        attempt.shares |= received
        update, bits = read_tensors(self._update)[0], terms.masking.bits
        shares = {"changes": attempt.weight / terms.weight, "beside": attempt.n_cases / terms.cases}
        total = np.concatenate([masking.encode(update[p].numpy(), shares[p], bits) for p in ("changes", "beside")])
        self._update.unlink()  # it is not needed again, and no second mask may be put on it
        total += masking.mask(masking.own_key_of(attempt.seed, terms, name), total.size, bits)
        for other in sorted(received):
            total += masking.pair_mask(attempt.mask_key, name, other, terms, total.size)
        return Masked(masking.to_tensor(total, bits))

    def _agree(self, attempt: Attempt, request: Agree) -> Agreed:
        """This site's signature of who is in the sum."""
        terms, survivors = self._terms(attempt), request.survivors
        self._once(not attempt.survivors, "say who is in the sum", request)
        known = set(attempt.shares)
        if len(set(survivors)) < terms.masking.threshold or len(survivors) > len(set(survivors)):
            raise PrivacyError(
                f"A sum over {len(set(survivors))} sites was to be unmasked ({', '.join(survivors)}). Allowed: "
                f"{terms.masking.threshold} or more, each once. Nothing leaves.",
                rule="unmask",
            )
        if not set(survivors) <= known or self._update.exists():
            raise ContractError(
                f"{', '.join(survivors)} were said to be in the sum. {self._settings.name} knows of {', '.join(sorted(known))}, "
                "and must have sent its own masked update first. Start the round again."
            )
        attempt.survivors = tuple(sorted(survivors))
        text = self._agreement(attempt, terms)
        return Agreed(make_card(self._settings.name, text, attempt.share_key, self._settings.identity))

    def _unmask(self, attempt: Attempt, request: Unmask) -> Unmasked:
        """One share of each site that dealt: of its own mask if it is in the sum, else of its key. Then all is forgotten."""
        terms = self._terms(attempt)
        if not attempt.survivors:
            raise ContractError(
                f"{self._settings.name} was to unmask a sum before it was told of which sites. Send Agree first."
            )
        text, shown = self._agreement(attempt, terms), {k.share.site: k.share for k in terms.keys}
        signed = set()
        for card in request.agreed:
            check_card(card, text, self._settings.identity)
            if card.site in attempt.survivors and torch.equal(card.key, shown[card.site].key):
                signed.add(card.site)
        if len(signed) < terms.masking.threshold:
            raise PrivacyError(
                f"{len(signed)} of the sites in the sum have signed who is in it. Expected {terms.masking.threshold} or more. "
                "Nothing leaves.",
                rule="unmask",
            )
        note_sum(self._settings.folder / "summed.json", request.model, request.round, attempt.survivors)
        shares, inside = attempt.shares, set(attempt.survivors)
        self.forget()
        own = {site: as_tensor(parts["seed"]) for site, parts in shares.items() if site in inside}
        lost = {site: as_tensor(parts["key"]) for site, parts in shares.items() if site not in inside}
        return Unmasked(own, lost)

    # ------------------------------------------------------------------------------------------------------- internals

    @property
    def _update(self) -> Path:
        return self._settings.folder / "held.safetensors"

    def _at(self, request: Secret) -> Attempt:
        """The attempt that a request belongs to.

        Raises:
            ContractError: there is none.
        """
        attempt = self._attempt
        if attempt is None or (request.model, request.round) != (attempt.order.model, attempt.order.round):
            at = f"round {attempt.order.round} of {attempt.order.model}" if attempt else "no such round"
            raise ContractError(
                f"{type(request).__name__} came for round {request.round} of {request.model}. {self._settings.name} is in {at}. "
                "Start the round again: its keys are in the memory of one life of a site, and are used once."
            )
        return attempt

    def _terms(self, attempt: Attempt) -> Terms:
        if attempt.terms is None:
            raise ContractError(f"{self._settings.name} has dealt no shares in this round. Send Deal first.")
        return attempt.terms

    def _once(self, first: bool, what: str, request: Secret) -> None:
        if not first:
            raise PrivacyError(
                f"{self._settings.name} was asked to {what} twice in round {request.round} of {request.model}. Two answers tell "
                "more than one. Start the round again.",
                rule="unmask",
            )

    def _text(self, purpose: str, order: Hold) -> str:
        return json.dumps([masking.VERSION, self._run, order.model, order.round, purpose])

    def _card(self, purpose: str, key: X25519PrivateKey, order: Hold) -> Card:
        return make_card(self._settings.name, self._text(purpose, order), key, self._settings.identity)

    def _agreement(self, attempt: Attempt, terms: Terms) -> str:
        return json.dumps([self._run, terms.agreement(attempt.shares, attempt.survivors)])

    def _about(self, terms: Terms, sender: str, receiver: str) -> About:
        run = json.dumps([self._run, terms.digest.hex()])
        return About(run, terms.model, terms.round, sender, receiver, "shares", False)


def _same(a: Keys, b: Keys) -> bool:
    return torch.equal(a.share.key, b.share.key) and torch.equal(a.mask.key, b.mask.key)
