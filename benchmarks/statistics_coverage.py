"""How often the intervals hold the truth, and how often the tests find a difference, where both are known.

python benchmarks/statistics_coverage.py [--repeats 500] [--seed 1] [--out FILE]        # about five minutes on an idle core

Scores are made up. Dice-like ones are mixtures of beta distributions with some low values and some zeros, other at every site;
differences of two models are of several shapes. Sites hold about 55, 30 and 15 % of the patients. With several seeds, a seed
shifts all patients, and each patient on top. Compared with: percentile bootstrap and t interval, Wilcoxon's test and t test.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from concilium._resampling import RESAMPLES, Draws, interval, sign_flip

Array = NDArray[np.float64]
PATIENTS = (6, 10, 20, 50)
SITES = {
    "Dice": [(0.02, 18, 2.5), (0.03, 12, 3), (0.05, 9, 3)],
    "Dice, many misses": [(0.10, 12, 2), (0.10, 8, 3), (0.15, 6, 3)],
}
"""Scores -> (share of zeros, a and b of the beta distribution) of each site; 5 % of the rest follow Beta(2, 4)."""
LOW = 0.05
PER_PATIENT = 0.02
"""Standard deviation of what a seed does to each patient."""


def sizes(n: int) -> list[int]:
    """Patients at each of three sites."""
    small = [max(2, round(n * share)) for share in (0.30, 0.15)]
    return [n - sum(small), *small]


def strata(n: int) -> list[str]:
    """The site of each patient."""
    return [f"site{i}" for i, k in enumerate(sizes(n)) for _ in range(k)]


def dice(kind: str, n: int, rng: np.random.Generator) -> Array:
    """(n,) scores of the patients of three sites."""
    parts = []
    for (zeros, a, b), k in zip(SITES[kind], sizes(n), strict=True):
        scores = np.where(rng.random(k) < LOW, rng.beta(2, 4, k), rng.beta(a, b, k))
        parts.append(np.where(rng.random(k) < zeros, 0, scores))
    return np.concatenate(parts)


def true_mean(kind: str, n: int) -> float:
    """What the intervals should hold."""
    means = [(1 - z) * ((1 - LOW) * a / (a + b) + LOW * 2 / 6) for z, a, b in SITES[kind]]
    return float(np.dot(means, sizes(n)) / n)


def similar(n: int, rng: np.random.Generator) -> Array:
    """Two models of the same kind: alike but for noise, and either misses 4 % of the patients."""
    scores = rng.beta(15, 2.5, n)
    a, b = (np.where(rng.random(n) < 0.04, 0, np.clip(scores + rng.normal(0, 0.02, n), 0, 1)) for _ in range(2))
    return np.asarray(a - b)


def tied(n: int, rng: np.random.Generator) -> Array:
    """Half of the patients are scored alike."""
    return np.where(rng.random(n) < 0.5, 0, rng.normal(0, 0.03, n))


def skewed(n: int, rng: np.random.Generator) -> Array:
    """A little worse on most, much better on some: a mean of zero, a median below it."""
    return rng.gamma(2, 0.02, n) - 0.04


DIFFERENCES: dict[str, Callable[[int, np.random.Generator], Array]] = {
    "normal": lambda n, rng: rng.normal(0, 0.03, n),
    "alike, 4 % missed by either": similar,
    "half tied": tied,
    "skewed": skewed,
}
"""Differences of two models whose means are equal."""


def with_seeds(scores: Array, n_seeds: int, scatter: float, rng: np.random.Generator) -> Array:
    """(patients, seeds) of scores that seeds shift; one seed is the model itself."""
    if n_seeds == 1:
        return scores[:, None]
    own = rng.normal(0, PER_PATIENT, (len(scores), n_seeds))
    return np.asarray(scores[:, None] + rng.normal(0, scatter, n_seeds) + own)


# ---------------------------------------------------------------------------------------------------------- intervals


def percentile(scores: Array, names: list[str], rng: np.random.Generator) -> tuple[float, float]:
    """The plain hierarchical bootstrap: patients within sites, then seeds."""
    patients, seeds = scores.mean(axis=1), scores.mean(axis=0)
    shift = np.zeros(1000)
    for name in sorted(set(names)):
        own = patients[np.array(names) == name]
        shift += (own[rng.integers(0, len(own), (1000, len(own)))].mean(axis=1) - own.mean()) * len(own) / len(names)
    shift += seeds[rng.integers(0, len(seeds), (1000, len(seeds)))].mean(axis=1) - seeds.mean()
    low, high = np.percentile(patients.mean() + shift, (2.5, 97.5))
    return float(low), float(high)


def student(scores: Array, _names: list[str], _rng: np.random.Generator) -> tuple[float, float]:
    """The t interval over patients, as if they were one site and seeds did not differ."""
    patients = scores.mean(axis=1)
    reach = stats.t.ppf(0.975, len(patients) - 1) * patients.std(ddof=1) / len(patients) ** 0.5
    return float(patients.mean() - reach), float(patients.mean() + reach)


def coverage(
    make: Callable[[np.random.Generator], Array], truth: float, names: list[str], repeats: int, seed: int, bounds: Any
) -> dict[str, list[float]]:
    """Method -> share of intervals that hold the truth, mean width."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[tuple[bool, float]]] = {}
    for repeat in range(repeats):
        scores = make(rng)
        ours = interval(scores, names, Draws(repeat))
        for method, (low, high) in {
            "ours": ours, "percentile": percentile(scores, names, rng), "t": student(scores, names, rng)
        }.items():  # fmt: skip
            low, high = max(low, bounds[0]), min(high, bounds[1])
            found.setdefault(method, []).append((low - 1e-12 <= truth <= high + 1e-12, high - low))
    return {method: [float(x) for x in np.mean(rows, axis=0)] for method, rows in found.items()}


def intervals(repeats: int, seed: int) -> Iterator[dict[str, Any]]:
    """Coverage in every setting."""
    for n in PATIENTS:
        for kind in SITES:
            for n_seeds, scatter in ((1, 0.0), (3, 0.01), (3, 0.03)):
                about = {"scores": kind, "n": n, "seeds": n_seeds, "scatter": scatter}
                yield about | coverage(
                    lambda rng, k=kind, n=n, s=n_seeds, x=scatter: with_seeds(dice(k, n, rng), s, x, rng),
                    true_mean(kind, n), strata(n), repeats, seed, (0, 1),
                )  # fmt: skip
        for kind, make in DIFFERENCES.items():
            yield {"scores": f"difference: {kind}", "n": n, "seeds": 1, "scatter": 0.0} | coverage(
                lambda rng, make=make, n=n: make(n, rng)[:, None], 0.0, strata(n), repeats, seed, (-1, 1)
            )


# -------------------------------------------------------------------------------------------------------------- tests


def wilcoxon(differences: Array) -> float:
    """p of the signed-rank test over patients who differ."""
    changing = differences.mean(axis=1)
    changing = changing[changing != 0]
    return float(stats.wilcoxon(changing).pvalue) if len(changing) else 1.0


def t_test(differences: Array) -> float:
    """p of the paired t test over patients."""
    patients = differences.mean(axis=1)
    return float(stats.ttest_1samp(patients, 0).pvalue) if patients.std() > 1e-12 else float(abs(patients[0]) < 1e-12)


def tests(repeats: int, seed: int) -> Iterator[dict[str, Any]]:
    """Share of p <= 0.05: where the means are equal, and where they differ by 0.02."""
    designs = [(kind, 1, 0.0) for kind in DIFFERENCES] + [("normal", 3, 0.0), ("normal", 3, 0.01), ("normal", 3, 0.03)]
    for kind, n_seeds, scatter in designs:
        for n in PATIENTS:
            for shift in (0.0, 0.02):
                rng, found = np.random.default_rng(seed), []
                for repeat in range(repeats):
                    made = with_seeds(DIFFERENCES[kind](n, rng) + shift, n_seeds, scatter, rng)
                    found.append((sign_flip(made, Draws(repeat)), wilcoxon(made), t_test(made)))
                shares = (np.array(found) <= 0.05).mean(axis=0)
                about = {"differences": kind, "n": n, "seeds": n_seeds, "scatter": scatter, "true": shift}
                yield about | dict(zip(("ours", "wilcoxon", "t"), map(float, shares), strict=True))


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Print both tables; every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="every figure as JSON")
    a = parser.parse_args(arguments)
    began, found = time.monotonic(), {"intervals": [], "tests": []}
    print(f"{a.repeats} repeats, {RESAMPLES} resamples. Coverage of 95 % intervals [%] (mean width)")
    print(f"{'scores':42} n   seeds  between  ours          percentile    t")
    for row in intervals(a.repeats, a.seed):
        found["intervals"].append(row)
        cells = [f"{100 * row[m][0]:5.1f} ({row[m][1]:.3f})" for m in ("ours", "percentile", "t")]
        print(f"{row['scores']:42} {row['n']:<3} {row['seeds']:<6} {row['scatter']:<7}", *cells, flush=True)
    print("\nShare of p <= 0.05 [%]: false positives where the true difference is 0, else power")
    print(f"{'differences':42} n   seeds  between  true   ours  Wilcoxon  t")
    for row in tests(a.repeats, a.seed):
        found["tests"].append(row)
        cells = [f"{100 * row[m]:6.1f}" for m in ("ours", "wilcoxon", "t")]
        print(
            f"{row['differences']:42} {row['n']:<3} {row['seeds']:<6} {row['scatter']:<8} {row['true']:<5}",
            *cells,
            flush=True,
        )
    print(f"{time.monotonic() - began:.0f} s")
    if a.out:
        a.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
