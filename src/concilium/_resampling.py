"""Intervals and tests by resampling, on plain arrays. Which method, and how well it does: docs/statistics.md.

Scores are (patients, seeds), not a number where a patient's score is undefined; differences of two models likewise. Patients are
in strata (their sites), whose sizes are fixed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

Array = NDArray[np.float64]
RESAMPLES = 4000
SIGNS = 9999
"""Random sign patterns of a test."""
EXACT = 13
"""Up to so many patients who differ, a test goes through all sign patterns."""
FLOOR = 0.1
"""Of the variance that a resample may be divided by, over that of the sample: a handful of patients drawn alike has none."""


class Draws:
    """Resamples that depend on the seed, the stratum and its size only; made once, so that models share them."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._kept: dict[tuple[str, int], NDArray[np.uint8]] = {}

    def counts(self, name: str, n: int) -> NDArray[np.uint8]:
        """(RESAMPLES, n): how often each of n is in a resample of n."""
        if (name, n) not in self._kept:
            drawn = self._generator(name, n).integers(0, n, (RESAMPLES, n))
            flat = (drawn + n * np.arange(RESAMPLES)[:, None]).ravel()
            counts = np.bincount(flat, minlength=RESAMPLES * n).reshape(RESAMPLES, n)
            self._kept[name, n] = counts.astype(np.uint8)
        return self._kept[name, n]

    def signs(self, n: int) -> NDArray[np.int8]:
        """(SIGNS, n) of -1 and 1."""
        drawn = self._generator("signs", n).integers(0, 2, (SIGNS, n), dtype=np.int8)
        return 2 * drawn - 1

    def _generator(self, name: str, n: int) -> np.random.Generator:
        return np.random.default_rng([self._seed & 0xFFFFFFFF, zlib.crc32(name.encode()), n])


def interval(scores: Array, strata: Sequence[str], draws: Draws) -> tuple[float, float]:
    """95 % interval of the mean over patients: patients are resampled within their stratum, then seeds.

    Bootstrap-t (Efron 1981; Hall 1988): quantiles of (resample - sample) / standard error of the resample, with each stratum's
    deviations enlarged by sqrt(n / (n - 1)) (Rao and Wu 1988), as those of seeds. Each end is at least as far as that of the
    t interval with Satterthwaite's degrees of freedom. At least two patients.
    """
    filled = _filled(scores)
    patients, seeds = filled.mean(axis=1), _seed_effects(filled)
    n, mean = len(patients), float(patients.mean())
    shift, variance = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    parts: list[tuple[float, int]] = []  # variance of the mean, degrees of freedom
    for name, members in _strata(strata).items():
        share = len(members) / n
        _add(shift, variance, patients[members], share, draws.counts(name, len(members)))
        parts.append((share**2 * float(patients[members].var(ddof=1)) / len(members), len(members) - 1))
    within, freedom = sum(v for v, _ in parts), sum(f for _, f in parts)
    parts = [(within, freedom)]
    if len(seeds) > 1:
        _add(shift, variance, seeds, 1.0, draws.counts("seeds", len(seeds)))
        parts.append((float(seeds.var(ddof=1)) / len(seeds), len(seeds) - 1))
    total = sum(v for v, _ in parts)
    if total == 0:
        return mean, mean
    t = float(stdtrit(total**2 / sum(v**2 / f for v, f in parts), 0.975))
    low, high = np.percentile(shift / np.sqrt(np.maximum(variance, FLOOR * total)), (2.5, 97.5))
    error = total**0.5
    return mean - max(float(high), t) * error, mean + max(-float(low), t) * error


def sign_flip(differences: Array, draws: Draws) -> float:
    """Two-sided p of "the mean difference is zero": signs of patients' differences are exchanged (Fisher 1935, section 21).

    The statistic is the mean itself. Over several seeds the null distribution is widened by the seeds' scatter: a t variable with
    one degree of freedom less than seeds is added to it. Exact with one seed up to `EXACT` patients who differ.
    """
    filled = _filled(differences)
    patients, seeds = filled.mean(axis=1), _seed_effects(filled)
    observed, n, n_seeds = abs(float(patients.mean())), len(patients), len(seeds)
    scatter = float(seeds.std(ddof=1)) / n_seeds**0.5 if n_seeds > 1 else 0.0
    changing = patients[patients != 0]
    exact = len(changing) <= EXACT
    signs = _all_signs(len(changing)) if exact else draws.signs(len(changing))
    null = signs @ changing / n
    if scatter > 0:
        far = stdtr(n_seeds - 1, (null - observed) / scatter) + stdtr(n_seeds - 1, (-null - observed) / scatter)
    else:
        far = (
            np.abs(null) >= observed - 1e-9 * float(np.abs(changing).sum()) / n
        )  # sums in another order differ in the last bits
    found = float(np.sum(far))
    return found / len(null) if exact else (1 + found) / (1 + len(null))


def _seed_effects(filled: Array) -> Array:
    """What each seed does to all patients together.

    The seeds' means also scatter by what a seed does to single patients. That is in the scatter of the patients already, and its
    expectation is taken out (analysis of variance of patients by seeds), lest it count twice.
    """
    seeds: Array = filled.mean(axis=0) - filled.mean()
    n, n_seeds = filled.shape
    scatter = float(seeds.var(ddof=1)) if n_seeds > 1 else 0.0
    if scatter == 0:
        return seeds
    residual = filled - filled.mean(axis=1, keepdims=True) - seeds
    noise = float((residual**2).sum()) / ((n - 1) * (n_seeds - 1)) / n
    shared: Array = seeds * max(0.0, 1 - noise / scatter) ** 0.5
    return shared


def _add(shift: Array, variance: Array, values: Array, share: float, counts: NDArray[np.uint8]) -> None:
    """Add a stratum's part to the resamples' deviations from the mean, and to the variances of their means."""
    n = len(values)
    centred = values - values.mean()
    sums = counts.astype(np.float64) @ np.stack([centred, centred**2], axis=1)
    means = sums[:, 0] / n
    shift += share * means * (n / (n - 1)) ** 0.5
    variance += share**2 * np.maximum(sums[:, 1] / n - means**2, 0) / (n - 1)


def _filled(scores: Array) -> Array:
    """What is undefined under some seeds is the patient's mean over the others: the mean over patients is as without it."""
    missing = np.isnan(scores)
    if not missing.any():
        return scores
    return np.where(missing, np.nanmean(scores, axis=1, keepdims=True), scores)


def _strata(names: Sequence[str]) -> dict[str, NDArray[np.intp]]:
    """Name -> its members. A stratum of one cannot be resampled: these share one, and one that is alone joins the smallest."""
    given = np.asarray(names)
    strata = {str(name): np.flatnonzero(given == name) for name in sorted(set(names))}
    single = [name for name, members in strata.items() if len(members) == 1]
    if len(single) == 1 and len(strata) > 1:
        single.append(min((len(m), name) for name, m in strata.items() if len(m) > 1)[1])
    if len(single) > 1:
        strata["+".join(single)] = np.sort(np.concatenate([strata.pop(name) for name in single]))
    return strata


def _all_signs(n: int) -> NDArray[np.int8]:
    """(2**n, n) of -1 and 1: every pattern."""
    patterns = np.arange(2**n)[:, None] >> np.arange(n)
    return (2 * (patterns & 1) - 1).astype(np.int8)
