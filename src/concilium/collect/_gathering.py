"""One round of masked updates as the server sees it (see `secure_sum.py` for its five requests)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch import Tensor

from concilium import masking
from concilium.aggregation import about_own, weight_of
from concilium.collect import Answer, Ask
from concilium.collect._receive import untrue
from concilium.errors import ContractError, EngineError
from concilium.masking import COUNTS, SHARE_BYTES, Numbers, Terms
from concilium.messages import (
    Agree,
    Agreed,
    Deal,
    Dealt,
    Failure,
    Held,
    Hold,
    Mask,
    Masked,
    Masking,
    Request,
    SiteError,
    Tensors,
    Train,
    Unmask,
    Unmasked,
    as_failure,
)
from concilium.sealing import KEY_BYTES, as_bytes

R = TypeVar("R")
BELOW = SiteError("EngineError", "below_threshold", "")


@dataclass
class Gathering:
    """A round. `held` has the sites that are still in it. One whose update is in the sum stays in `answers` if it fails then."""

    ask: Ask
    how: Masking
    like: Tensors
    """What each update holds, as the sites call it."""
    answers: dict[str, Answer] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    """What comes beside the weights: as at most sites."""
    inside: tuple[str, ...] = ()
    """The sites whose masked updates are in the sum."""

    def hold(self, trains: Mapping[str, Train], asked: Mapping[str, int]) -> None:
        """Have the sites train. Those that took no step have no update, and take no part in what follows."""
        self.asked, self.about = asked, next(iter(trains.values()))
        orders = {id(t): Hold(replace(t, send_weights=False), self.how) for t in trains.values()}
        for site, reply in self.ask({site: orders[id(t)] for site, t in trains.items()}):
            if not isinstance(reply, Held):
                self.failures[site] = as_failure(reply)
            elif (problem := self._problem(site, reply)) is not None:
                self.failures[site] = problem
            else:
                told = reply.trained
                self.answers[site] = Answer(
                    told.n_cases, told.n_steps, told.loss, told.seconds, told.memory, told.spent
                )
                if told.n_steps:
                    self.held[site] = reply
        self.held = dict(sorted(self.held.items()))
        counted = Counter(h.beside for h in self.held.values())
        self.beside = max(counted, key=lambda names: counted[names], default=())
        for site in [s for s, h in self.held.items() if h.beside != self.beside]:
            self._lose(site, SiteError("ContractError", "wrong_tensors", ""))

    def changes(self) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """The weighted means of the changes, and of what came beside them: float64. `None` where there is no sum.

        Raises:
            EngineError: what was unmasked is no sum of updates.
        """
        total = self._summed() if self._enough() else None
        if total is None:
            return None
        values = masking.decode(total, self.how.bits)
        n = len(self.inside)
        # what every site may say is from -1 to 1 times its part of all, and rounded: masks that do not cancel are not
        split = sum(t.numel() for t in self.like.values())
        made = []
        for part, has, dealt in (
            (values[:split], self.weight, self.terms.weight),
            (values[split:], self.n_cases, self.terms.cases),
        ):
            part = part * (dealt / has)
            if np.abs(part).max(initial=0.0) > 1 + n * 2.0 ** (2 - self.how.bits) * dealt / has:
                raise self._unusable("values are out of all range, as where masks do not cancel")
            made.append(part)
        weights = about_own(masking.unflat(made[0], self.like, self.how))
        return weights, masking.unflat(made[1], {name: self.like[name] for name in self.beside}, self.how)

    @property
    def weight(self) -> int:
        """What the updates in the sum count together."""
        return sum(map(self._weight_of, self.inside))

    @property
    def n_cases(self) -> int:
        """How many training cases the sites in the sum have."""
        return sum(self.answers[site].n_cases for site in self.inside)

    # ---------------------------------------------------------------------------------------------------------- steps

    def _summed(self) -> Numbers | None:
        """The sum of the updates without their masks; `None` where too few sites were left for it."""
        keys = tuple(h.keys for h in self.held.values())
        weight = sum(map(self._weight_of, self.held))
        n_cases = sum(self.answers[site].n_cases for site in self.held)
        model, number = self.about.model, self.about.round
        self.terms = Terms(model, number, self.how, keys, weight, n_cases)
        deal = Deal(model, number, keys, weight, n_cases)
        self.dealt = self._gather(dict.fromkeys(self.held, deal), Dealt, self._fits_deal)
        if not self._enough():
            return None
        size = sum(self.like[name].numel() for name in (*self.like, *self.beside))
        total = np.zeros(size, masking.UNSIGNED[self.how.bits])

        def add(site: str, reply: Masked) -> bool:
            nonlocal total
            if reply.values.shape != (size,) or reply.values.dtype != masking.TRAVELS[self.how.bits]:
                return False
            total += masking.to_numbers(reply.values, self.how.bits)
            return True

        shares = {
            site: {sender: d.shares[site].clone() for sender, d in self.dealt.items() if sender != site}
            for site in self.dealt
        }
        self._gather({site: Mask(model, number, own) for site, own in shares.items()}, Masked, add, keep=False)
        if not self._enough():
            return None
        self.inside = tuple(self.held)
        return total if self._unmask(total) else None

    def _unmask(self, total: Numbers) -> bool:
        """Take all masks away; `False` where too few sites helped. One that does not help is in the sum all the same."""
        model, number = self.about.model, self.about.round
        agreed = self._gather(dict.fromkeys(self.held, Agree(model, number, self.inside)), Agreed)
        cards = tuple(reply.card for reply in agreed.values())
        if not self._enough():
            return False
        told = self._gather(dict.fromkeys(self.held, Unmask(model, number, cards)), Unmasked, self._fits_shares)
        if not self._enough():
            return False
        for site in self.inside:
            seed = self._joined(site, {s: r.own[site] for s, r in told.items()})
            if masking.commitment(seed, self.terms, site) != as_bytes(self.dealt[site].commitment):
                raise self._unusable(f"the shares of the mask of {site} do not make it")
            total -= masking.mask(masking.own_key_of(seed, self.terms, site), total.size, self.how.bits)
        for site in self._lost:
            secret = self._joined(site, {s: r.lost[site] for s, r in told.items()})
            key = X25519PrivateKey.from_private_bytes(secret)
            if key.public_key().public_bytes_raw() != self.terms.mask_key(site).public_bytes_raw():
                raise self._unusable(f"the shares of the key of {site} do not make it")
            for other in self.inside:  # what these added for it, it would have added with the other sign
                total += masking.pair_mask(key, site, other, self.terms, total.size)
        return True

    @property
    def _lost(self) -> list[str]:
        """Those that dealt shares, and whose masked updates did not come."""
        return [site for site in self.dealt if site not in self.inside]

    # --------------------------------------------------------------------------------------------------------- answers

    def _gather(
        self,
        requests: Mapping[str, Request],
        kind: type[R],
        fits: Callable[[str, R], bool] = lambda site, reply: True,
        *,
        keep: bool = True,
    ) -> dict[str, R]:
        """The replies of this kind that fit, sorted by site; the other sites are lost."""
        found: dict[str, R] = {}
        for site, reply in self.ask(requests):
            if not isinstance(reply, kind):
                self._lose(site, as_failure(reply))
            elif not fits(site, reply):
                self._lose(site, SiteError("ContractError", "wrong_tensors", ""))
            elif keep:
                found[site] = reply
            del reply  # before the next one is unpacked
        return dict(sorted(found.items()))

    def _lose(self, site: str, failure: Failure) -> None:
        del self.held[site]
        self.failures[site] = failure
        if site not in self.inside:
            del self.answers[site]

    def _enough(self) -> bool:
        """Whether there are still so many sites that a sum may be unmasked; if not, the round has failed for all of them."""
        enough = len(self.held) >= self.how.threshold
        if not enough:
            for site in list(self.held):
                self._lose(site, BELOW)
            for site in self.inside:
                self.answers.pop(site, None)
        return enough

    def _weight_of(self, site: str) -> int:
        a = self.answers[site]
        return weight_of(COUNTS[self.how.counts])(a.n_cases, a.n_steps / self.asked[site])

    def _problem(self, site: str, reply: Held) -> Failure | None:
        if reply.trained.weights or reply.trained.control or not set(reply.beside) <= self.like.keys():
            return SiteError("ContractError", "wrong_tensors", "")
        keys = (reply.keys.share, reply.keys.mask)
        if any(k.site != site or not _is_bytes(k.key, KEY_BYTES) for k in keys):
            return SiteError("ContractError", "wrong_keys", "")
        return untrue(reply.trained, self.asked[site])

    def _fits_deal(self, site: str, reply: Dealt) -> bool:
        others = set(self.terms.sites) - {site}
        return reply.shares.keys() == others and _is_bytes(reply.commitment, KEY_BYTES)

    def _fits_shares(self, site: str, reply: Unmasked) -> bool:
        expected = [(reply.own, self.inside), (reply.lost, self._lost)]
        return all(
            got.keys() == set(sites) and all(_is_bytes(t, SHARE_BYTES) for t in got.values()) for got, sites in expected
        )

    def _joined(self, site: str, shares: Mapping[str, Tensor]) -> bytes:
        """A secret of a site from the shares that the others held: just so many as are needed."""
        chosen = sorted(shares)[: self.how.threshold]
        try:
            return masking.join({masking.place_of(s, self.terms.sites): as_bytes(shares[s]) for s in chosen})
        except ContractError as e:
            raise self._unusable(f"the shares of the secret of {site} do not fit together") from e

    def _unusable(self, reason: str) -> EngineError:
        return EngineError(
            f"{self.about.model}, round {self.about.round}: the masks of {', '.join(self.inside)} could not be taken away "
            f"({reason}). Expected what each of them dealt. One site did not do what it said: find it, then go on with --resume."
        )


def _is_bytes(tensor: Tensor, size: int) -> bool:
    return tensor.dtype == torch.uint8 and tensor.shape == (size,)
