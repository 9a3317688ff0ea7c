"""What a study may start from, and which tensors of it take the place of drawn ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from concilium.errors import DataError, StudyError
from concilium.matching import as_table, match, note_of, require
from concilium.messages import PlugIn
from concilium.networks import names_elsewhere
from concilium.start_from import Source, find_source, read_source

FILE = Path("there.pth")
HERE = {"down0.w": torch.zeros(2, 3), "down0.n": torch.tensor(0), "up0.w": torch.zeros(6), "head0.w": torch.zeros(4)}


def there(**changed: Tensor | None) -> dict[str, Tensor]:
    """Weights that fit, but for what is changed, by name with _ for the dot."""
    tensors: dict[str, Tensor] = {n: torch.ones_like(t) for n, t in HERE.items()}
    new = {n.replace("_", "."): t for n, t in changed.items()}
    return {n: t for n, t in (tensors | new).items() if t is not None}  # type: ignore[operator]


def test_equal_names_and_shapes_match() -> None:
    found = match(HERE, there(), {}, FILE)
    assert list(found.weights) == list(HERE)
    assert all(bool((t == 1).all()) for t in found.weights.values())
    assert (found.fraction, found.missing, found.other_shape, found.unused) == (1.0, [], {}, [])


def test_what_does_not_fit_is_told_and_counted_by_values() -> None:
    """13 values before the heads: 6 of down0.w, 1 of down0.n, 6 of up0.w."""
    found = match(HERE, there(down0_w=torch.ones(3, 2), down0_n=None, more_w=torch.ones(1)), {}, FILE)
    assert found.missing == ["down0.n"]
    assert found.other_shape == {"down0.w": (torch.Size((3, 2)), torch.Size((2, 3)))}
    assert found.unused == ["more.w"]
    assert list(found.weights) == ["up0.w", "head0.w"]
    assert found.fraction == 6 / 13


def test_what_was_added_does_not_count_where_it_is_not_there() -> None:
    def added(name: str) -> bool:
        return name == "up0.w"

    assert match(HERE, there(up0_w=None), {}, FILE, added=added).fraction == 1
    assert match(HERE, there(up0_w=None), {}, FILE, added=added).missing == ["up0.w"]
    assert match(HERE, there(up0_w=None, down0_w=None), {}, FILE, added=added).fraction == 1 / 7
    assert match(HERE, there(down0_w=None), {}, FILE, added=added).fraction == 7 / 13


@pytest.mark.parametrize("head", [None, torch.ones(5)])
def test_a_head_that_does_not_fit_does_not_count(head: Tensor | None) -> None:
    found = match(HERE, there(head0_w=head), {}, FILE)
    assert found.fraction == 1.0
    assert "head0.w" not in found.weights
    require(found, 1.0, fresh=HERE, file=FILE)


def test_too_little_is_refused_with_names_and_shapes() -> None:
    tensors = there(down0_w=torch.ones(3, 2), up0_w=None) | {"up0.weight": torch.ones(6)}
    found = match(HERE, tensors, {}, FILE)
    with pytest.raises(StudyError) as e:
        require(found, 0.5, fresh=HERE, file=FILE)
    assert str(e.value) == (
        "[network] weights: 2 of 4 tensors fit from there.pth, 8% of the network's values before its heads (1 not there: up0.w 6 "
        "(nearest there: up0.weight); 1 of another shape: down0.w 3×2 instead of 2×3). At least 50% must. Give weights of this "
        "network and plan, or a lower min_matched."
    )
    require(found, 1 / 13, fresh=HERE, file=FILE)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_ignored(prefix: str) -> None:
    assert match(HERE, {prefix + n: t for n, t in there().items()}, {}, FILE).fraction == 1.0


def test_types_become_those_of_the_network() -> None:
    found = match(HERE, there(up0_w=torch.full((6,), 0.5, dtype=torch.float16), down0_n=torch.tensor(1.0)), {}, FILE)
    assert found.weights["up0.w"].dtype == torch.float32
    assert list(found.other_shape) == ["down0.n"]  # a whole number here, none there


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused(wrong: float) -> None:
    """The last is, until it is a float32."""
    tensors = there(up0_w=torch.tensor([0, 0, 0, 0, 0, wrong], dtype=torch.float64))
    with pytest.raises(DataError, match=r"up0\.w in there\.pth is not finite"):
        match(HERE, tensors, {}, FILE)
    assert match({n: t for n, t in HERE.items() if n != "up0.w"}, tensors, {}, FILE).unused == ["up0.w"]


def test_two_names_of_one_tensor_must_agree() -> None:
    match(HERE, there() | {"alias": torch.ones(6)}, {"alias": "up0.w"}, FILE)
    for other in (torch.zeros(6), torch.ones(5)):
        with pytest.raises(DataError, match=r"two tensors for up0\.w, one of them alias, which differ"):
            match(HERE, there() | {"alias": other}, {"alias": "up0.w"}, FILE)


def test_what_matched_shares_no_memory_with_the_file() -> None:
    tensors = there()
    match(HERE, tensors, {}, FILE).weights["up0.w"].zero_()
    assert bool(tensors["up0.w"].all())


def test_a_network_without_published_names_has_none() -> None:
    assert names_elsewhere(PlugIn("unet"), plan={}, n_channels=1, n_labels=2) == {}


# ------------------------------------------------------------------------------------------------------------- sources


def model_folder(root: Path, *folds: str) -> Path:
    folder = root / "Trainer__Plans__2d"
    for fold in folds:
        (folder / fold).parent.mkdir(parents=True, exist_ok=True)
        (folder / fold).parent.joinpath(Path(fold).name).touch()
    (folder / "plans.json").write_text("{}")
    return folder


def test_a_fold_is_chosen_by_name_or_is_the_first(tmp_path: Path) -> None:
    folder = model_folder(
        tmp_path, "fold_1/checkpoint_best.pth", "fold_2/checkpoint_final.pth", "fold_2/checkpoint_best.pth"
    )
    (folder / "fold_0").mkdir()
    plans = folder / "plans.json"
    assert find_source(folder) == Source(folder / "fold_1" / "checkpoint_best.pth", plans, "2d")
    chosen = find_source(tmp_path / "Trainer__Plans__2d#fold_2")
    assert chosen == find_source(chosen.file) == Source(folder / "fold_2" / "checkpoint_final.pth", plans, "2d")
    with pytest.raises(StudyError, match=r"no checkpoint in 'fold_0'\. .*Known: fold_1, fold_2\. Choose"):
        find_source(tmp_path / "Trainer__Plans__2d#fold_0")
    model_folder(tmp_path, "fold_all/checkpoint_final.pth")
    assert find_source(folder).file.parent.name == "fold_all"


@pytest.mark.parametrize("name", ["missing", "notes.txt", "empty", "empty#fold_0", "w.safetensors#x"])
def test_other_sources_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "w.safetensors").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match=r"weights = .* (does not exist|is none of these)\. Allowed: a run folder"):
        find_source(tmp_path / name)


def test_a_name_with_a_number_sign_is_a_name_where_it_exists(tmp_path: Path) -> None:
    path = tmp_path / "w#1.safetensors"
    save_file({"a": torch.ones(1)}, path)
    assert find_source(path) == Source(path)
    assert list(read_source(find_source(path))) == ["a"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0" + json.dumps({"a": 1}).encode().ljust(16)]
)
def test_a_damaged_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="cannot be used as weights"):
        read_source(Source(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("metadata", "files", "told"),
    [
        ({"license": "apache-2.0"}, {"README.md": "---\nlicense: mit\n---\n"}, "apache-2.0"),
        (
            {"format": "pt"},
            {"README.md": '---\ntags:\n- x\nlicense: "mit"\nlibrary: y\n---\n# W\n', "LICENSE": "X"},
            "mit",
        ),
        (
            {},
            {"README.md": "# W\n\nlicense: no front matter\n", "LICENSE": "\n  MIT License\n\nPermission"},
            "MIT License",
        ),
        ({"licence": "a\x1b[31m\nb" + 200 * "c"}, {}, "a[31mb" + 74 * "c"),
        ({}, {}, ""),
    ],
)
def test_the_licence_is_what_the_file_or_what_lies_beside_it_says(
    metadata: dict[str, str], files: dict[str, str], told: str, tmp_path: Path
) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors", metadata=metadata)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert Source(tmp_path / "w.safetensors").licence == told
    note = note_of(as_table(FILE, "0123456789abcdef", match(HERE, there(), {}, FILE), HERE) | {"licence": told})
    assert note.endswith(
        f"4 tensors (SHA-256 0123456789ab..., licence: {told or 'not told there; look where it came from'})"
    )
