"""Patterns planted in images, masks, names of files and identifiers are looked for in every byte that split training sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from faults import Made
from torch import Tensor, nn

from concilium import catalog, wire
from concilium.answers import split
from concilium.data.patches import Batch
from concilium.line import run
from concilium.networks import Stages
from concilium.study import Study, parse_study

CANARY = "Wilhelmina"
"""In the name of every file, case and patient."""
SIZE = 32
LENGTH = 24
"""Values in a row that are looked for: so many do not come together by chance."""
QUICK = {"unet", "segnet", "cgnet"}
"""These run with the fast tests: one plain, one that sends places, one that carries the image."""
NAMES = [name for name in catalog.names("networks") if name != "nnunet_trainer"]


def marks_of(name: str, cut: str) -> list[pytest.MarkDecorator]:
    """The other networks with the slow tests, at one of two cuts, in turn; at both with `./test --all`."""
    if name in QUICK:
        return []
    turn = ("deep", "shallow")[NAMES.index(name) % 2]
    return [pytest.mark.slow if cut == turn else pytest.mark.exhaustive]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites, whose pictures are noise and whose label maps are noise in a square."""
    folder = tmp_path_factory.mktemp("canary")
    for i, site in enumerate(("north", "south")):
        draw = np.random.default_rng(i)
        for part in ("imagesTr", "labelsTr"):
            (folder / site / part).mkdir(parents=True)
        cases = [f"{CANARY}-{site}-{n}" for n in range(5)]
        for case in cases:
            image = draw.integers(1, 255, (SIZE, SIZE, 3)).astype(np.uint8)
            label = draw.integers(0, 2, (SIZE, SIZE)).astype(np.uint8)
            sitk.WriteImage(
                sitk.GetImageFromArray(image, isVector=True), folder / site / "imagesTr" / f"{case}_0000.png"
            )
            sitk.WriteImage(sitk.GetImageFromArray(label), folder / site / "labelsTr" / f"{case}.png")
        about = {
            "channel_names": {"0": "R", "1": "G", "2": "B"},
            "labels": {"background": 0, "spot": 1},
            "numTraining": len(cases),
            "file_ending": ".png",
            "patient": {case: f"{CANARY} {case[-1]}" for case in cases},
        }
        (folder / site / "dataset.json").write_text(json.dumps(about))
    return folder


def study_of(data: Path, name: str, cut: str, **changes: Any) -> Study:
    options = catalog.options("networks", name) if ":" not in name else {}
    small = {"base_features": 32 if name == "swin_unet" else 4} if "base_features" in options else {}
    small |= {"refine_features": 8} if "refine_features" in options else {}
    small |= {"blocks": [min(n, 4) for n in options["blocks"].default]} if "blocks" in options else {}
    if name == "sam":
        small = {"size": "vit_t", "width": 16, "depth": 3, "patch": 8, "image_size": 32, "decoder_features": 16}
    tables: dict[str, Any] = {
        "study": {"name": "canary"},
        "sites": {site: {"data": str(data / site)} for site in ("north", "south")},
        "protocol": {"name": "splitfed", "cut": cut, "rounds": 1, "steps": 2},
        "plan": {"configuration": "2d"},
        "network": {"name": name, **small},
        "training": {"augmentation": "none", "mirror": False, "batch_size": 2, "patch_size": [SIZE, SIZE]},
        "engine": {"threads": 1, "device": "cpu", "pictures": False},
    }
    return parse_study({**tables, **changes}, folder=data)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Batch], list[bytes]]:
    """The batches that sites trained on, and all bytes of messages either way."""
    batches: list[Batch] = []
    sent: list[bytes] = []
    stream, pack = split.stream, wire.pack

    def streams(*args: Any, **options: Any) -> Iterator[Batch]:
        for batch in stream(*args, **options):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(split, "stream", streams)
    monkeypatch.setattr(wire, "pack", lambda message: sent.append(pack(message)) or sent[-1])
    return batches, sent


def patterns(batches: list[Batch], data: Path) -> Iterator[tuple[str, bytes]]:
    """What must not be sent: rows of patches and of files, as any type that they might be sent in, and names."""
    yield from (("a name", text.encode()) for text in (CANARY, CANARY.lower()))
    yield "a name in UTF-16", CANARY.encode("utf-16-le")
    yield "a path", str(data).encode()
    for path in data.glob("*/imagesTr/*.png"):
        picture = sitk.GetArrayFromImage(sitk.ReadImage(path))
        yield "a picture", picture[3].tobytes()[:LENGTH]
        yield "a channel of a picture", picture[3, :, 1].tobytes()[:LENGTH]
        yield "a file", path.read_bytes()[-64:-16]
    yield from of_patches(batches)


def of_patches(batches: list[Batch]) -> Iterator[tuple[str, bytes]]:
    """Rows of what was trained on, which augmentation left as they were."""
    for batch in batches:
        for row in batch.image[:, :, ::5].flatten(0, 2):
            if len(row[:LENGTH].unique()) < LENGTH // 2:
                continue  # beside the picture a patch is 0, as much else is
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                yield "an image", raw(row[:LENGTH].to(dtype))
        for row in batch.labels[0][:, :, ::5].flatten(0, 2):
            if not LENGTH // 4 < row[:LENGTH].count_nonzero() < 3 * LENGTH // 4:
                continue
            for dtype in (
                torch.uint8,
                torch.int8,
                torch.int16,
                torch.int32,
                torch.int64,
                torch.float32,
                torch.bfloat16,
            ):
                yield "a mask", raw(row[:LENGTH].to(dtype))
        for label in batch.labels[0]:
            bits = np.packbits(label.numpy() > 0).tobytes()
            yield "a mask, a bit a voxel", bits[len(bits) // 2 :][:LENGTH]


def raw(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def found(batches: list[Batch], sent: list[bytes], data: Path) -> set[str]:
    everything = b"".join(sent)
    return {what for what, pattern in patterns(batches, data) if pattern in everything}


@pytest.mark.parametrize(
    ("name", "cut"), [pytest.param(n, c, marks=marks_of(n, c)) for n in NAMES for c in ("deep", "shallow")]
)
def test_nothing_planted_is_sent(
    name: str, cut: str, data: Path, tmp_path: Path, seen: tuple[list[Batch], list[bytes]]
) -> None:
    outcome = run(study_of(data, name, cut), tmp_path / "run")
    assert outcome.exit_code == 0, outcome.results["problems"]
    batches, sent = seen
    assert len(batches) == 4
    assert sum(map(len, sent)) > 10_000
    assert found(batches, sent, data) == set()


def leaky(*, n_channels: int, n_labels: int, plan: Any, deep_supervision: bool) -> Stages:
    """The image travels with the first map, and says it was a map."""
    first, body, last, head = (nn.Conv2d(a, 4, 1) for a in (n_channels, n_channels + 4, 4, 4))
    return Stages(
        {
            "down0": Made(1, 2, first, lambda x: (x.clone(), first(x).relu())),
            "middle": Made(2, 1, body, lambda x, y: (body(torch.cat((x, y), 1)).relu(),)),
            "last": Made(1, 1, last, lambda y: (last(y).relu(),)),
            "head0": Made(1, 1, head, lambda y: (head(y)[:, :n_labels],)),
        }
    )


def test_an_image_that_is_sent_is_found(
    data: Path, tmp_path: Path, seen: tuple[list[Batch], list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it not refused before: else patterns that never match would pass for a wall that holds."""
    monkeypatch.setattr(split, "shows", lambda image, m: False)
    study = study_of(data, "test_canary:leaky", "shallow", protocol={
        "name": "splitfed", "cut": ["down0", "middle"], "rounds": 1, "steps": 2
    })  # fmt: skip
    run(study, tmp_path / "run")
    assert found(*seen, data) == {"an image"}


def test_a_mask_and_a_name_that_are_sent_are_found(data: Path, seen: tuple[list[Batch], list[bytes]]) -> None:
    labels = torch.randint(0, 2, (1, 1, SIZE, SIZE), dtype=torch.int16)
    batch = Batch(torch.randn(1, 3, SIZE, SIZE), (labels,))
    for dtype in (torch.uint8, torch.int64, torch.float32):
        assert found([batch], [b"..." + raw(labels.to(dtype))], data) == {"a mask"}
    assert found([batch], [f"case {CANARY}-north-1".encode()], data) == {"a name"}
    picture = next(data.glob("*/imagesTr/*.png"))
    assert "a file" in found([batch], [picture.read_bytes()], data)
    packed = np.packbits(labels.numpy() > 0).tobytes()
    assert found([batch], [packed], data) == {"a mask, a bit a voxel"}
