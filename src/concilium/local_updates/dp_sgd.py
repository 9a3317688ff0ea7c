"""Differentially private training: the record that is protected is a patient, with all cases and patches.

Abadi et al. 2016 (doi:10.1145/2976749.2978318), algorithm 1, with one gradient for each patient. In every step each patient of
the site is drawn with the chance `rate` (Poisson sampling); the gradient of the loss on that patient's patches alone is scaled
down to the norm `clip`; the gradients are added up, Gaussian noise of deviation `noise` times `clip` is added to every value, and
the sum is divided by the number of patients expected. A step without a patient adds noise all the same, and counts. Each patient
is a forward and a backward pass, which is right for every network that does not mix the images of a batch.

(epsilon, delta) is that of adding or removing one patient (opacus' accountants: Mironov et al. 2019, arXiv:1908.10530, or Gopi et
al. 2021, arXiv:2106.02848), for the weights that the site sends. It says nothing of what else leaves: statistics for the plan,
scores, how many cases there are, and the choice of settings by their results. Noise comes from torch's generator, which is no
cryptographic one, in floating point.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from concilium.data.draws import drawn_from
from concilium.data.patches import Batch, Batches
from concilium.errors import ContractError, StudyError
from concilium.local_updates import Local, logits_of, trained
from concilium.sharing import HIDDEN, STATISTICS

TOGETHER = COMPUTES_MORE = True
PROTOCOLS = ("federated",)
LARGE = 20.0
"""An epsilon above which no accountant is asked for a closer one."""


def step(  # noqa: PLR0913  (options of the study)
    local: Local,
    batch: Batch,
    *,
    clip: float = 1.0,
    noise: float = 1.0,
    rate: float = 0.1,
    patches: int = 2,
    delta: float = 1e-5,
    accountant: Literal["rdp", "prv"] = "rdp",
    tell_loss: bool = False,
) -> Tensor:
    """Take one step; 0 in place of the loss, which would tell of patients, unless `tell_loss`.

    Args:
        clip: largest norm of a patient's gradient.
        noise: deviation of the noise, as a multiple of `clip`.
        rate: chance of each patient to be in a step.
        patches: of each patient that is.
        delta: the probability with which epsilon may not hold; less than 1 in the number of patients.
        accountant: `rdp` (Renyi), or `prv`, which takes longer and finds a smaller epsilon for the same training; above 20 the
            figure is that of `rdp`.
        tell_loss: send the mean loss after each round, for which epsilon does not account.

    Raises:
        ContractError: the batch was not drawn by patients, or precision is float16.
        FloatingPointError: a gradient is not finite.
    """
    if batch.patients is None or local.scaler is not None or not local.n_patients:
        raise ContractError(
            f"dp_sgd was lent a batch {'with' if batch.patients is not None else 'without'} patients of {local.n_patients}, and "
            f"{'a' if local.scaler else 'no'} scale of the loss. Expected patients, and no scale. Set [training] precision to "
            "'float32' or 'bfloat16'."
        )
    parameters = [p for _, p in trained(local.network)]
    total, losses = clipped_sum(local, batch, clip)
    for parameter, summed in zip(parameters, total, strict=True):
        # drawn on the CPU, whose generator depends on all of the site's secret, and a GPU's on 64 bits of it
        drawn = torch.randn(summed.shape, dtype=summed.dtype).to(summed.device)
        noised = summed + noise * clip * drawn
        parameter.grad = noised / (rate * local.n_patients)
    local.optimizer.step()
    return torch.stack(losses).mean() if tell_loss and losses else torch.zeros(())


def clipped_sum(local: Local, batch: Batch, clip: float) -> tuple[list[Tensor], list[Tensor]]:
    """Of the gradient of each patient in the batch, clipped, the sum by parameter; and each patient's loss.

    Raises:
        ContractError: the batch does not say whose patches it has.
        FloatingPointError: a gradient is not finite.
    """
    parameters = [p for _, p in trained(local.network)]
    total, losses = [torch.zeros_like(p) for p in parameters], []
    if batch.patients is None:
        raise ContractError("A batch does not say whose patches it has. Expected a patient for each. Report this.")
    for patient in torch.unique(batch.patients):
        part = _of(batch, batch.patients == patient)
        if part.is_unknown:  # nobody looked for anything in these patches
            continue
        loss = local.objective(logits_of(local, part), part)
        loss.backward()  # type: ignore[no-untyped-call]
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in own]))
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(f"The norm of a patient's gradient is {float(norm)}.")
        factor = (clip / norm.clamp_min(1e-12)).clamp_max(1.0)
        for summed, g in zip(total, own, strict=True):
            summed.add_(g * factor)
        losses.append(loss.detach())
    return total, losses


def _of(batch: Batch, chosen: Tensor) -> Batch:
    """The patches that are chosen, as a batch like any other."""
    there = chosen.to(batch.image.device)
    annotated = None if batch.annotated is None else batch.annotated[there]
    return Batch(batch.image[there], tuple(x[there] for x in batch.labels), annotated)


# ------------------------------------------------------------------------------------------------------ who is in a step


@dataclass(frozen=True)
class Sampled:
    """Batches of patients, each of whom is in with the same chance, whoever else is."""

    patients: tuple[Batches, ...]
    rate: float

    def draw(self, *key: str | int) -> Batch:
        """The batch of this key; it may be empty."""
        with drawn_from(*key, "patients"):
            chosen = (torch.rand(len(self.patients), dtype=torch.float64) < self.rate).nonzero().flatten().tolist()
        drawn = {i: self.patients[i].draw(*key, "patient", i) for i in chosen}
        each = list(drawn.values()) or [self.patients[0].draw(*key)]  # of which nothing but the shape is kept
        owners = torch.tensor([i for i, batch in drawn.items() for _ in batch.image], dtype=torch.int64)
        joined = Batch(
            torch.cat([b.image for b in each]),
            tuple(torch.cat(scale) for scale in zip(*(b.labels for b in each), strict=True)),
            torch.cat([b.annotated for b in each]) if all(b.annotated is not None for b in each) else None,
        )
        return _of(joined, torch.arange(len(joined.image)) < len(owners))._replace(patients=owners)


def sample(batches: Batches, patients: Sequence[Sequence[str]], *, rate: float, patches: int, **_: Any) -> Sampled:
    """What draws each of these patients, by their cases, with the chance `rate`."""
    return Sampled(tuple(batches.only(cases, patches) for cases in patients), rate)


def check_network(network: nn.Module, **_: Any) -> None:
    """Refuse layers that mix the images of a batch, or keep statistics of them.

    Raises:
        StudyError: there is one.
    """
    mixing = [
        name
        for name, m in network.named_modules()
        if (isinstance(m, nn.modules.batchnorm._BatchNorm) or getattr(m, STATISTICS[0], None) is not None)
        and STATISTICS[0] not in getattr(m, HIDDEN, ())  # what is frozen stays as it is
    ]
    if mixing:
        raise StudyError(
            f"[local_update] name = 'dp_sgd' is not possible with this network: {len(mixing)} of its layers ({mixing[0]}, ...) "
            "normalise over the batch or keep running statistics, so that a patient's gradient depends on other patients, and "
            "statistics leave without noise. Allowed: instance or group normalisation. Choose another [network], or its norm."
        )


# ---------------------------------------------------------------------------------------------------------- the account


def release(*, steps: int, noise: float, rate: float, **_: Any) -> tuple[float, float, int]:
    """What the updates of so many steps add to the account."""
    return noise, rate, steps


def account(history: Sequence[tuple[float, float, int]], *, delta: float, accountant: str, **_: Any) -> float:
    """The epsilon of all these (noise, rate, steps) together.

    Raises:
        StudyError: opacus is not installed.
    """
    if any(noise == 0 for noise, _, _ in history):
        return float("inf")
    if (
        accountant == "prv"
    ):  # an upper bound too, and enough where epsilon is large: there `prv` takes memory without end
        bound = account(history, delta=delta, accountant="rdp")
        if bound > LARGE:
            return bound
    try:
        from opacus import accountants
    except ImportError as e:
        raise StudyError(
            f"[local_update] name = 'dp_sgd' needs opacus, which is not installed ({e}). Expected the extra `private`. Install "
            "it at the server and where the sites train: pip install concilium[private]."
        ) from e
    kept = accountants.create_accountant(accountant)
    kept.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of orders at the end of their range: epsilon is then larger than need be, not smaller
        return float(kept.get_epsilon(delta))


def doubts(n_patients: int, *, delta: float, **_: Any) -> str:
    """What should be known of the guarantee for a site of so many patients; nothing where it is as it should be.

    With delta of 1 / n or more, giving away one patient of n in full is allowed (Dwork and Roth 2014, section 2.3).
    """
    if n_patients and delta * n_patients >= 1:
        return (
            f"delta = {delta:g} is no protection for {n_patients} patients: a site that gives one away in full keeps to it. "
            f"Take less than {1 / n_patients:.2g}."
        )
    return ""


def check(labels: object, *, delta: float, accountant: str, **_: Any) -> None:
    """Try the account once, before a night of training.

    Raises:
        StudyError: opacus is not installed.
    """
    account([(1.0, 0.1, 1)], delta=delta, accountant=accountant)
