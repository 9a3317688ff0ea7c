"""Whether a case was trained on, from the finished model: its loss is lower than that of a case that is as hard.

Yeom et al. 2018 (arXiv:1709.01604), with a threshold on the loss; made fair for how hard a case is (Watson et al. 2022,
arXiv:2111.08440) by what the attacker's own cases, which were not trained on, say of cases with as much foreground and contrast.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from concilium.attacks import Auxiliary, Cases, Guess, Known, Transcript
from concilium.errors import ContractError
from concilium.networks import Stages

SEES, GUESSES = "model", "members"
REVEALS = "whoever has the finished model and a case with its label map, of which it asks whether it was trained on"

CHUNK = 8


def attack(transcript: Transcript, network: Known, auxiliary: Auxiliary, *, seed: int, calibrate: bool = True) -> Guess:
    """How likely each candidate was trained on.

    Args:
        calibrate: compare with the loss that the attacker's own cases of this kind have; otherwise the loss alone decides.
    """
    if auxiliary.candidates is None:
        raise ContractError("No candidates were given. Membership inference needs some. Give cases to ask about.")
    whole = network.open_whole.eval()
    own, asked = (_losses(whole, of) for of in (auxiliary.own, auxiliary.candidates))
    if not calibrate:
        return Guess(members=-asked.float())
    kinds = _kinds(auxiliary.own)
    fit = torch.linalg.lstsq(kinds, own.unsqueeze(1)).solution
    expected = _kinds(auxiliary.candidates) @ fit
    return Guess(members=(expected[:, 0] - asked).float())


def _losses(whole: Stages, cases: Cases) -> Tensor:
    """Logarithm of cross-entropy and soft Dice loss of each patch."""
    found = []
    with torch.no_grad():
        for i in range(0, len(cases.images), CHUNK):
            logits = whole(cases.images[i : i + CHUNK])[0].float()
            labels = cases.labels[i : i + CHUNK].clamp_max(logits.shape[1] - 1)
            entropy = functional.cross_entropy(logits, labels, reduction="none").flatten(1).mean(1)
            p, y = 1 - logits.softmax(1)[:, 0], (labels > 0).float()
            overlap = (2 * (p * y).flatten(1).sum(1) + 1) / ((p + y).flatten(1).sum(1) + 1)
            found.append(entropy + 1 - overlap)
    return torch.cat(found).double().clamp_min(1e-8).log()


def _kinds(cases: Cases) -> Tensor:
    """What makes a case hard or easy, a row for each: a constant, the foreground's share (rooted), and contrast."""
    share = (cases.labels > 0).flatten(1).float().mean(1)
    contrast = cases.images.flatten(1).std(1)
    return torch.stack([torch.ones_like(share), share, share.sqrt(), contrast], 1).double()
