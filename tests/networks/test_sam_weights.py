"""Checkpoints of Segment-Anything, in the authors' layout and in Hugging Face's, against numbers of their own code.

`sam_numbers.json` is theirs; `make_sam_numbers.py` wrote it where their packages are. No checkpoint of theirs could be had.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from concilium.errors import DataError, StudyError
from concilium.matching import as_table, match, note_of, require
from concilium.messages import PlugIn
from concilium.network_sizes import plan_for
from concilium.networks import Stages, names_elsewhere
from concilium.networks.sam import build, prompted, refitted
from concilium.start_from import find_source, read_source

NUMBERS: dict[str, Any] = json.loads((Path(__file__).parent / "sam_numbers.json").read_text(encoding="utf-8"))
SIDE = 80
SMALL: dict[str, Any] = {
    "width": 32, "depth": 3, "heads": 2, "image_size": SIDE, "window": 3, "whole_image_blocks": (1,), "decoder_features": 32
}  # fmt: skip
BOXES = torch.tensor([[3.0, 5.0, 40.0, 60.0], [20.0, 10.0, 79.0, 30.0]])
POINTS = torch.tensor([[[10.0, 20.0], [30.0, 7.0]], [[60.0, 70.0], [1.0, 2.0]]])
POSITIVE = torch.tensor([[True, False], [True, True]])
ASKED: dict[str, dict[str, Tensor]] = {
    "boxes": {"boxes": BOXES},
    "points": {"points": POINTS, "positive": POSITIVE},
    "both": {"boxes": BOXES, "points": POINTS, "positive": POSITIVE},
}
LAYOUTS = ["original", "hugging_face"]


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """As in `make_sam_numbers.py`."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    return torch.from_numpy((0.2 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32))


def drawn_wide(name: str, shape: tuple[int, ...]) -> Tensor:
    """As in `make_sam_numbers.py`."""
    values = drawn(name, shape)
    return 1 + values if len(shape) == 1 and name.endswith("weight") else values / 5


def published(layout: str) -> dict[str, Tensor]:
    """A checkpoint of this layout."""
    shapes: dict[str, str] = NUMBERS[layout]["tensors"]
    shared = {"prompt_encoder.shared_embedding.positional_embedding": "shared_image_embedding.positional_embedding"}
    return {n: drawn(shared.get(n, n), tuple(map(int, shape.split()))) for n, shape in shapes.items()}


def made(n_labels: int = 2, **options: Any) -> Stages:
    torch.manual_seed(3)
    plan = plan_for((SIDE, SIDE))
    return build(n_channels=3, n_labels=n_labels, plan=plan, **SMALL | {"intensity": "0-255"} | options).eval()


def matched(network: Stages, path: Path) -> Any:
    there = read_source(find_source(path))
    known = names_elsewhere(PlugIn("sam"), plan={}, n_channels=3, n_labels=2, there=there.keys())
    return match(network.state_dict(), there, known, path, refit=refitted)


def written(layout: str, path: Path, **changed: Tensor) -> Path:
    tensors = published(layout) | {n.replace("__", "."): t for n, t in changed.items()}
    if path.suffix == ".safetensors":
        save_file({n: t.clone() for n, t in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.fixture(params=[(layout, end) for layout in LAYOUTS for end in ("pth", "safetensors")], ids="-".join)
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Stages]:
    layout, end = request.param
    network = made()
    found = matched(network, written(layout, tmp_path / f"sam.{end}"))
    assert (found.fraction, found.missing, found.other_shape, found.refitted) == (1, [], {}, {})
    assert found.unused == []
    network.load_state_dict(found.weights)
    return layout, network


def check(values: Tensor, expected: dict[str, Any], *, within: float = 2e-6) -> None:
    flat = values.double().flatten()
    places = torch.linspace(0, len(flat) - 1, 12).long()
    assert list(values.shape) == expected["shape"]
    assert torch.allclose(flat[places], torch.tensor(expected["values"], dtype=torch.float64), rtol=0, atol=within)
    assert float(flat.mean()) == pytest.approx(expected["mean"], abs=within / 2)
    assert float(flat.std()) == pytest.approx(expected["deviation"], abs=within / 2)


def image() -> Tensor:
    return (255 * drawn("image", (3, SIDE, SIDE)).abs().clamp(max=1))[None]


@torch.no_grad()
def test_embedding_and_masks_are_those_of_the_published_code(loaded: tuple[str, Stages]) -> None:
    layout, network = loaded
    expected = NUMBERS[layout]
    front = Stages({name: network[name] for name in network.names[:-2]})
    frame, embedding = front.run((image(),))
    check(embedding, expected["embedding"])
    for name in ASKED.keys() & expected.keys():
        answers = prompted(network, image(), **ASKED[name])
        check(answers.coarse, expected[name])
        check(answers.quality, expected[f"{name}_quality"])
        assert torch.equal(answers.logits[:, 1], answers.masks[:, 0])
    if layout == "original":  # what FedFMS does, who ask nothing
        large, tokens = network["decoder"].decode(embedding)  # type: ignore[operator]
        coarse = network["head0"].masks_of(large, tokens)  # type: ignore[operator]
        check(coarse, expected["without"])
        check(network["head0"].enlarged(coarse, frame), expected["large"])  # type: ignore[operator]
        (logits,) = network(image())
        assert torch.equal(logits[:, 1], network["head0"].enlarged(coarse, frame)[:, 0])  # type: ignore[operator]
        assert not logits[:, 0].any()


@pytest.mark.slow
@torch.no_grad()
def test_vit_b_at_1024_pixels_is_the_authors(tmp_path: Path) -> None:
    """Of a checkpoint as their code saves it: embedding and logits of all masks, to a ten-thousandth of their deviation."""
    expected = NUMBERS["vit_b"]
    shapes = {n: tuple(map(int, shape.split())) for n, shape in expected["tensors"].items()}
    path = tmp_path / "sam_vit_b.pth"
    torch.save({n: drawn_wide(n, shape) for n, shape in shapes.items()}, path)
    network = build(n_channels=3, n_labels=2, plan=plan_for((1024, 1024)), intensity="0-255").eval()
    found = matched(network, path)
    assert (found.fraction, found.missing, found.other_shape, found.refitted, found.unused) == (1, [], {}, {}, [])
    network.load_state_dict(found.weights)
    pixels = (255 * drawn("image", (3, 1024, 1024)).abs().clamp(max=1))[None]
    front = Stages({name: network[name] for name in network.names[:-2]})
    _, embedding = front.run((pixels,))
    large, tokens = network["decoder"].decode(embedding)  # type: ignore[operator]
    coarse = network["head0"].masks_of(large, tokens)  # type: ignore[operator]
    boxes = prompted(network, pixels, boxes=torch.tensor([[100.0, 150.0, 700.0, 900.0]])).coarse
    for values, told in ((embedding, "embedding"), (coarse, "without"), (boxes, "boxes")):
        check(values, expected[told], within=1e-4 * expected[told]["deviation"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_of_another_size_are_interpolated_and_told(layout: str, tmp_path: Path) -> None:
    network = made(image_size=48, n_labels=4)
    path = written(layout, tmp_path / "sam.pth")
    found = matched(network, path)
    fresh = network.state_dict()
    changed = {"embed.position", "block1.block.attention.relative_rows", "block1.block.attention.relative_columns"}
    assert found.refitted.keys() == changed
    assert found.missing == ["head0.labels.weight", "head0.labels.bias"]
    assert found.fraction == 1
    assert all(found.weights[n].shape == fresh[n].shape for n in found.weights)
    note = note_of(as_table(path, "", found, fresh))
    assert "interpolated from another size: embed.position (1×5×5×32 there, 1×3×3×32 here)" in note
    assert "drawn anew: head0.labels.weight" in note


def test_the_table_as_interpolated_is_what_the_network_does_for_such_images(tmp_path: Path) -> None:
    """A network for the size of the file, and one for that of the image, say the same of it."""
    path = written("original", tmp_path / "sam.pth")
    logits = []
    for side in (SIDE, 48):
        network = made(image_size=side)
        network.load_state_dict(matched(network, path).weights)
        logits.append(network(image()[..., :48, :48])[0])
    assert torch.allclose(*logits, atol=1e-6)


def test_tables_are_stretched_in_place() -> None:
    """What is linear in the place stays so; positions bicubically, with their middles where they were."""
    table = torch.linspace(0, 1, 9)[:, None].expand(9, 2)
    rows = refitted("block1.block.attention.relative_rows", table, (5, 2))
    assert rows is not None
    assert torch.allclose(rows[:, 0], torch.tensor([0.05, 0.275, 0.5, 0.725, 0.95]), atol=1e-6)
    position = torch.zeros(1, 4, 4, 1)
    position[0, 1] = 1
    finer = refitted("embed.position", position, (1, 8, 8, 1))
    assert finer is not None
    assert torch.allclose(finer[0, 2:6, 3, 0], torch.tensor([0.8789, 0.8789, 0.2617, -0.1055]), atol=1e-3)
    assert refitted("block1.block.linear.0.weight", torch.ones(4, 2), (8, 2)) is None
    assert refitted("embed.position", position, (1, 8, 8, 2)) is None
    assert refitted("embed.position", torch.empty(1, 0, 4, 1), (1, 8, 8, 1)) is None
    assert refitted("block1.block.attention.relative_rows", torch.empty(0, 2), (5, 2)) is None


def test_prefixes_and_wrapped_checkpoints(tmp_path: Path) -> None:
    """As DistributedDataParallel names them, within a checkpoint that has more."""
    for layout in LAYOUTS:
        torch.save({"model": {f"module.{n}": t for n, t in published(layout).items()}, "epoch": 3}, tmp_path / "w.pth")
        assert matched(made(), tmp_path / "w.pth").fraction == 1


def test_another_encoder_is_refused_by_shape(tmp_path: Path) -> None:
    network = made(width=16)
    path = written("original", tmp_path / "sam.pth")
    found = matched(network, path)
    assert "embed.patches.weight" in found.other_shape
    assert found.refitted == {}
    with pytest.raises(StudyError, match=r"of another shape: embed\.position 1×5×5×32 instead of 1×5×5×16"):
        require(found, 0.9, fresh=network.state_dict(), file=path)


def test_names_that_mean_one_tensor_must_agree(tmp_path: Path) -> None:
    other = {"prompt_encoder__shared_embedding__positional_embedding": torch.ones(2, 16)}
    path = written("hugging_face", tmp_path / "sam.safetensors", **other)
    with pytest.raises(DataError, match=r"two tensors for decoder\.prompts\.frequencies, .* which differ"):
        matched(made(), path)


class Command:
    """What a hostile file would have its reader do."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.touched,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hostile_or_damaged_checkpoint_does_nothing(layout: str, tmp_path: Path) -> None:
    touched, path = tmp_path / "touched", tmp_path / "sam.pth"
    torch.save(published(layout) | {"note": Command(touched)}, path)
    assert matched(made(), path).fraction == 1
    pickle.loads(pickle.dumps(Command(touched)))
    assert touched.exists(), "the file would have done it"
    touched.unlink()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot be used|is damaged"):
        matched(made(), path)
    path.with_suffix(".safetensors").write_bytes(whole)
    with pytest.raises(DataError, match="cannot be used as weights"):
        matched(made(), path.with_suffix(".safetensors"))
    assert not touched.exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    wrong = {"image_encoder__pos_embed": torch.full((1, 7, 7, 32), float("nan"))}  # of another size, too
    path = written("original", tmp_path / "sam.pth", **wrong)
    with pytest.raises(DataError, match=r"embed\.position in .* is not finite"):
        matched(made(), path)
