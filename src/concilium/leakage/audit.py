"""Run attacks on what was sent, score each guess against the truth, and put beside it what a guess without looking gets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from concilium import catalog
from concilium.attacks import Auxiliary, Cases, Guess, Known, Transcript, about, only, stacked
from concilium.leakage import scores
from concilium.leakage.scene import Scene

ALL_MAPS = "all"
ALL_CHANNELS = "all"
SHUFFLES = 20
"""How often maps meet the images of others, for the distance correlation of what has nothing to do with each other."""
Row: TypeAlias = dict[str, Any]
Show: TypeAlias = Callable[[str, Tensor, Tensor, Tensor], None]
"""Called with a name, and images: original, found, naive (N, C, *spatial)."""


@dataclass(frozen=True)
class Attack:
    """An attack by name, with its options."""

    name: str
    options: Mapping[str, Any]
    seed: int

    @property
    def about(self) -> tuple[str, str, str]:
        """What it sees, what it guesses, who could do it."""
        module = inspect.getmodule(catalog.load("attacks", self.name))
        return about(vars(module))

    @property
    def on_request(self) -> bool:
        """Whether it is run only where it is asked for."""
        return bool(vars(inspect.getmodule(catalog.load("attacks", self.name))).get("ON_REQUEST"))

    @property
    def needs_front(self) -> bool:
        """Whether it is of no use to a receiver that does not know the front's weights."""
        return bool(vars(inspect.getmodule(catalog.load("attacks", self.name))).get("NEEDS_FRONT"))

    def __call__(self, transcript: Transcript, known: Known, auxiliary: Auxiliary) -> Guess:
        guess: Guess = catalog.load("attacks", self.name)(transcript, known, auxiliary, seed=self.seed, **self.options)
        return guess


def figures_of(
    scene: Scene, attacks: Iterable[Attack], channels: Sequence[str], *, show: Show, watch: Callable[[str], None]
) -> list[Row]:
    """A row for each figure of each attack on this scene; attacks that do not see what it holds are left out."""
    rows: list[Row] = []
    if scene.maps:
        rows += [row for names, seen in _selections(scene) for row in _correlations(scene, names, seen)]
    for attack in attacks:
        sees, guesses, _ = attack.about
        lacks = guesses == "patients" and scene.auxiliary.candidates is None
        lacks |= attack.needs_front and scene.known.front is None
        if sees not in holds(scene) or lacks or (guesses == "members") != (scene.members is not None):
            continue
        for name, seen in _selections(scene) if sees == "maps" else [(scene.gradient, scene)]:
            watch(f"{attack.name}: {place(scene, name)}")
            guess = attack(seen.transcript, seen.known, seen.auxiliary)
            of = scene.channels or channels
            for row in _scored(seen, guess, guesses, of, f"{place(scene, name)} {attack.name}", show):
                rows.append(_placed(scene, name, attack.name) | row)
    return rows


def holds(scene: Scene) -> tuple[str, ...]:
    """What an attack can see there."""
    if scene.known.steer is not None:
        return ("steering",)
    if not scene.transcript:
        return ("model",)
    first = scene.transcript[0]
    return tuple(what for what in ("maps", "gradients", "update") if getattr(first, what)) + (
        ("updates",) if first.update else ()
    )


def place(scene: Scene, name: str) -> str:
    """Where a figure belongs, in words."""
    cut = f", cut {scene.cut}" if scene.cut else ""
    site = f", site {scene.site}" if scene.site else ""
    when = ", prediction" if scene.predicting else ""
    return f"round {scene.round}{cut}{site}{f', map {name}' if name else ''}{when}"


def _placed(scene: Scene, name: str, attack: str) -> Row:
    site = ({"site": scene.site} if scene.site else {}) | ({"predicting": True} if scene.predicting else {})
    return {"round": scene.round, "cut": scene.cut, "map": name, "attack": attack} | site


def _selections(scene: Scene) -> Iterator[tuple[str, Scene]]:
    """The scene with each map alone, and with all where there are several."""
    n = len(scene.maps)
    twice = {name for name in scene.maps if scene.maps.count(name) > 1}
    for i, name in enumerate(scene.maps):
        yield f"{name}.{i}" if name in twice else name, _only(scene, [i])
    if n > 1:
        yield ALL_MAPS, scene


def _only(scene: Scene, places: list[int]) -> Scene:
    own, asked = scene.auxiliary.own, scene.auxiliary.candidates
    return replace(
        scene,
        transcript=only(scene.transcript, places),
        known=replace(scene.known, places=tuple(scene.known.places[i] for i in places)),
        auxiliary=replace(
            scene.auxiliary,
            own=replace(own, sent=only(own.sent, places)),
            candidates=None if asked is None else replace(asked, sent=only(asked.sent, places)),
        ),
    )


# ---------------------------------------------------------------------------------------------------------------- scores


def _scored(scene: Scene, guess: Guess, kind: str, channels: Sequence[str], name: str, show: Show) -> Iterator[Row]:
    own, truth = scene.auxiliary.own, scene.truth
    match kind:
        case "images":
            naive = own.images.mean(0, keepdim=True).expand_as(truth.images)
            show(name, truth.images, guess.of("images"), naive)
            yield from _images(truth.images, guess.of("images"), own.images, channels)
        case "labels":
            yield _masks(truth, guess.of("labels"), own)
        case "members":
            members = scene.trained_on.numpy()
            area, found = scores.auc_of(guess.of("members").numpy().astype(float), members)
            yield _row("auc", area, 0.5, len(members))
            yield _row("tpr_at_1_fpr", found, scores.FALSE_POSITIVES, len(members))
        case "patients":
            hit = (guess.of("patients").argmax(1).numpy() == np.array(scene.patients)).astype(float)
            yield _row("reidentified", float(hit.mean()), 1 / guess.of("patients").shape[1], len(hit))


def _row(
    metric: str, value: float, naive: float, n: int, *, most: float | None = None, channel: str = ALL_CHANNELS
) -> Row:
    values = {"value": value, "naive": naive, "most": value if most is None else most}
    return {"channel": channel, "metric": metric} | {k: round(v, 6) for k, v in values.items()} | {"n": n}


def _images(truth: Tensor, found: Tensor, own: Tensor, channels: Sequence[str]) -> Iterator[Row]:
    """SSIM and PSNR of each channel, and their mean over channels where there are several."""
    within = scores.range_of(own.numpy())
    originals, guesses, mean = truth.numpy(), found.numpy(), own.mean(0).numpy()
    bodies = [scores.body_of(x, within) for x in originals]
    for metric, score in (("ssim", scores.ssim), ("psnr", scores.psnr)):
        table = np.array(
            [
                [
                    [score(x[c], y[c], float(within.low[c]), float(within.high[c]), body) for y in (guess, mean)]
                    for c in range(len(channels))
                ]
                for x, guess, body in zip(originals, guesses, bodies, strict=True)
            ]
        )  # (N, C, 2)
        places = [(channel, table[:, c]) for c, channel in enumerate(channels)]
        places += [(ALL_CHANNELS, table.mean(1))] if len(channels) > 1 else []
        for channel, values in places:
            got, naive = values.mean(0)
            yield _row(metric, float(got), float(naive), len(values), most=float(values[:, 0].max()), channel=channel)


def _masks(truth: Cases, chance: Tensor, own: Cases) -> Row:
    """Dice of foreground, beside that of the most likely mask of the attacker's own cases; both cut where they are best there."""
    mine, theirs = (own.labels > 0).numpy(), (truth.labels > 0).numpy()
    prior = mine.mean(0)
    at = scores.best_threshold(np.broadcast_to(prior, mine.shape), mine)
    naive = [scores.dice(t, prior > at) for t in theirs]
    found = [scores.dice(t, c > 0.5) for t, c in zip(theirs, chance.numpy(), strict=True)]
    return _row("dice", float(np.mean(found)), float(np.mean(naive)), len(found), most=max(found))


def _correlations(scene: Scene, name: str, seen: Scene) -> Iterator[Row]:
    """Distance correlation of maps and images, beside that of maps with the images of others."""
    images = scene.truth.images.numpy()
    if len(images) < 4:
        return
    maps = np.concatenate([m.float().flatten(1).numpy() for m in stacked(seen.transcript)], axis=1)
    value = scores.distance_correlation(maps, images)
    orders = [np.random.default_rng(k).permutation(len(images)) for k in range(SHUFFLES)]
    shuffled = [scores.distance_correlation(maps, images[order]) for order in orders]
    yield _placed(scene, name, "") | _row("distance_correlation", value, float(np.mean(shuffled)), len(images))
