"""Sizes of networks, counted and not run: against each other, against numbers from elsewhere, and as the command shows them."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import concilium
from concilium import catalog, cli
from concilium.errors import StudyError
from concilium.forecast import split_bytes
from concilium.network_sizes import NetworkSizes, all_sizes, plan_for, read_options, read_size, sizes_of
from concilium.reports.networks import by_stage, giga, operations, parameters

TEN = {
    "attention_unet", "cgnet", "deeplabv3", "deeplabv3plus", "ducknet", "refinenet", "segnet", "sunet", "swin_unet", "unet"
}  # fmt: skip


@pytest.fixture(scope="module")
def full() -> dict[str, NetworkSizes]:
    """All networks in full size, three channels, 256×256, five labels."""
    found, missing = all_sizes()
    assert not missing
    return {n.name: n for n in found}


def test_all_ten_are_there(full: dict[str, NetworkSizes]) -> None:
    assert full.keys() == TEN | {"nnunet", "sam"}
    assert full.keys() | {"nnunet_trainer", "fused"} == set(catalog.names("networks"))


def test_parts_add_up_to_the_whole(full: dict[str, NetworkSizes]) -> None:
    for network in full.values():
        assert [cut.name for cut in network.cuts] == ["shallow", "deep"]
        for cut in network.cuts:
            for of in ("parameters", "flops"):
                parts = [getattr(part, of) for part in (cut.front, cut.body, cut.tail)]
                assert sum(parts) == getattr(network.whole, of), (network.name, cut.name)
                assert min(parts) > 0


@pytest.mark.parametrize("name", sorted(TEN | {"sam"}))
def test_stages_add_up_to_what_runs(name: str) -> None:
    """PyTorch's counter, over a network that does run, forward as a whole."""
    network = sizes_of(name, size=(64, 48), options=small(name))
    plan = plan_for((64, 48))
    built = catalog.load("networks", name)(n_channels=3, n_labels=5, plan=plan, **small(name)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(torch.randn(1, 3, 64, 48))
    assert counter.get_total_flops() == network.whole.flops
    assert sum(p.numel() for p in built.parameters()) == network.whole.parameters


def small(name: str) -> dict[str, Any]:
    if name == "sam":
        return {"size": "vit_t", "width": 16, "depth": 3, "heads": 2, "decoder_features": 16, "adapt": "adapters"}
    options = catalog.options("networks", name)
    blocks = {"blocks": tuple(min(n, 4) for n in options["blocks"].default)} if "blocks" in options else {}
    return {"base_features": 32 if name == "swin_unet" else 8} | blocks


def test_the_usual_u_net_in_three_parts() -> None:
    """Of the first convolution also the operations: for each of 256×256 voxels, 32 features of 3×3 of 3 channels."""
    network = sizes_of("unet", cut=("shallow",), options={"base_features": 32, "norm": "batch"})
    (cut,) = network.cuts
    assert (cut.front.parameters, cut.body.parameters, cut.tail.parameters) == (928, 7_752_800, 9_445)
    assert cut.after == ("down0", "up0")
    assert cut.front.flops == 2 * 256 * 256 * 32 * 3 * 3 * 3
    assert (cut.up, cut.down) == (4 * 32 * 256 * 256 * 2,) * 2  # maps, and gradients of maps, in float32


def test_deep_halves_what_the_u_net_sends(full: dict[str, NetworkSizes]) -> None:
    shallow, deep = full["unet"].cuts
    assert 2 * deep.up == shallow.up
    assert 2 * deep.down == shallow.down


def test_nowhere_does_deep_send_more_than_shallow(full: dict[str, NetworkSizes]) -> None:
    for network in full.values():
        shallow, deep = network.cuts
        assert deep.up + deep.down <= shallow.up + shallow.down, network.name


def test_the_smallest_and_the_largest_are_those_of_medsegnet10(full: dict[str, NetworkSizes]) -> None:
    """Shiranthika et al. 2026 (arXiv:2503.20830): the order, for the numbers themselves could not be had."""
    ten = {name: full[name].whole for name in TEN}
    assert min(ten, key=lambda n: ten[n].parameters) == "cgnet"
    assert min(ten, key=lambda n: ten[n].flops) == "cgnet"
    assert max(ten, key=lambda n: ten[n].parameters) == "refinenet"
    assert max(ten, key=lambda n: ten[n].flops) == "attention_unet"


def of_auxiliary_head(n_labels: int) -> int:
    """A 3×3 convolution of 1024 to 256 features, its norm, the logits: torchvision's models have it, and count it."""
    return 1024 * 256 * 9 + 2 * 256 + (256 + 1) * n_labels


@pytest.mark.parametrize(
    ("name", "options", "n_labels", "published"),
    [
        # torchvision's deeplabv3_resnet101 and deeplabv3_resnet50 (num_params of their weights), without the auxiliary head
        ("deeplabv3", {"norm": "batch"}, 21, 60_996_202 - of_auxiliary_head(21)),
        ("deeplabv3", {"norm": "batch", "blocks": [3, 4, 6, 3]}, 21, 42_004_074 - of_auxiliary_head(21)),
        # the authors' CGNet, M = 3 and N = 21, for Cityscapes; its logits have no bias
        ("cgnet", {"norm": "batch"}, 19, 496_306 + 19),
    ],
)
def test_as_many_parameters_as_elsewhere(name: str, options: dict[str, Any], n_labels: int, published: int) -> None:
    assert sizes_of(name, options=options, labels=n_labels).whole.parameters == published


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("swin_unet", {}, 27.17),  # as usually given for the authors' code, 9 labels
        ("segnet", {"norm": "batch"}, 29.44),  # VGG-16's 14.7 of convolutions, and their mirror image
    ],
)
def test_about_as_many_parameters_as_elsewhere(name: str, options: dict[str, Any], millions: float) -> None:
    assert sizes_of(name, options=options, labels=9).whole.parameters / 1e6 == pytest.approx(millions, abs=0.01)


def test_a_cut_by_stages_and_volumes() -> None:
    network = concilium.network(
        "attention_unet", cut=("encode0", "decode1"), size=(32, 48, 32), channels=2, options={"base_features": 8}
    )
    assert network.image == (2, 32, 48, 32)
    (cut,) = network.cuts
    assert cut.name == "encode0 decode1"
    assert network.table.loc[0, "body_parameters"] == cut.body.parameters
    assert len(network.table) == 1


@pytest.mark.parametrize("name", ["segnet", "unet", "swin_unet"])
def test_bytes_are_those_of_the_forecast(name: str) -> None:
    """Whole numbers among them: SegNet's places come down with the shallow cut, one byte each."""
    plan = plan_for((64, 48))
    build = partial(catalog.load("networks", name), n_channels=3, n_labels=5, plan=plan, **small(name))
    for cut in sizes_of(name, size=(64, 48), options=small(name)).cuts:
        forecast = split_bytes(build, (cut.name,), batch=(1, 3, 64, 48), precision="float32")
        assert (forecast.step_up, forecast.step_down) == (cut.up, cut.down)


def test_a_plan_of_nnunets_rule() -> None:
    arguments = plan_for((256, 256))["architecture"]["arch_kwargs"]
    assert arguments["strides"] == [[1, 1]] + [[2, 2]] * 6
    assert arguments["features_per_stage"] == [32, 64, 128, 256, 512, 512, 512]
    assert plan_for((64, 16))["architecture"]["arch_kwargs"]["strides"] == [[1, 1], [2, 2], [2, 2], [2, 1]]


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("unett", {}, r"has no 'unett'.*Did you mean 'unet'"),
        ("unet", {"options": {"width": 3}}, r"width = 3 is not known\. Known: base_features, levels, norm"),
        ("unet", {"cut": ("up0", "down0")}, r"cut = \['up0', 'down0'\] is not possible\. Allowed: shallow, deep, or"),
        ("unet", {"size": (256,)}, r"256 voxels .* is not possible\. Allowed: 2 or 3 axes"),
        ("unet", {"channels": 0}, r"image of 0 channels .* is not possible\."),
        ("segnet", {"size": (7, 7)}, r"7×7 voxels leaves nothing to pool\. Allowed: 8 or more"),
        ("nnunet", {"size": (37, 40)}, r"cannot take images of 37×40 voxels\. Allowed: .* such as 64×64"),
        ("nnunet_trainer", {}, r"is not possible here: its trainer builds it\."),
        (
            "cgnet",
            {"cut": ("encode2", "context3")},
            r"After down1, down2, encode2 the image itself, or a linear map of it",
        ),
        ("ducknet", {"cut": ("down2", "up1")}, r"After down0, down1, down2, down3, down4 the image itself"),
    ],
)
def test_what_cannot_be_counted_is_refused_with_what_is_allowed(name: str, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        sizes_of(name, **asked)


def test_options_of_a_command_line() -> None:
    given = ["base_features=16", "norm=batch", "blocks=3,4,6,3", "rates = [1, 2]", 'name="x"', "on=true"]
    assert read_options(given) == {
        "base_features": 16, "norm": "batch", "blocks": [3, 4, 6, 3], "rates": [1, 2], "name": "x", "on": True
    }  # fmt: skip
    assert (read_size("96x96x64"), read_size("12×8")) == ((96, 96, 64), (12, 8))
    for wrong in ("base_features", "=3", "norm="):
        with pytest.raises(StudyError, match="name=value"):
            read_options([wrong])
    with pytest.raises(StudyError, match="256x256"):
        read_size("256,256")


@pytest.mark.slow
def test_options_that_only_some_have_reach_those() -> None:
    found, missing = all_sizes(options={"output_stride": 8, "levels": 1}, size=(64, 64))
    coarsest = {n.name: n.stages[-3].stack[-1][-1] for n in found if n.name == "deeplabv3"}
    assert coarsest == {"deeplabv3": 8}
    assert {text.split(":")[0] for text in missing} == {"attention_unet", "ducknet", "sunet", "unet"}
    with pytest.raises(
        StudyError,
        match=r"wheels is not known to any network\. .*Known: adapt, adapter_features",
    ):
        all_sizes(options={"wheels": 3})


# ----------------------------------------------------------------------------------------------------------- as it is shown

PAGE = (Path(__file__).parents[1] / "docs" / "networks.md").read_text(encoding="utf-8")


def rows_of_page(heading: str) -> dict[str, list[str]]:
    """Network -> the other cells of its row in the table below a heading."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line[:1] == "|"]
    return {row[0].strip("` "): row[1:] for row in rows[2:]}


def test_the_page_tells_sizes_and_options(full: dict[str, NetworkSizes]) -> None:
    rows = rows_of_page("Which there are")
    assert rows.keys() == full.keys()
    for name, (_, axes, millions, gflops, options) in rows.items():
        whole = full[name].whole
        assert (millions, gflops) == (f"{whole.parameters / 1e6:.2f}", giga(whole.flops)), name
        assert axes == ("2D, 3D" if works_in_3d(name) else "2D"), name
        known = catalog.options("networks", "deeplabv3" if options.startswith("as") else name)
        assert set(re.findall(r"`(\w+)`", options)) - {"deeplabv3"} == set() if options.startswith("as") else set(known)
        for option, default in re.findall(r"`(\w+)` (\d+(?:, \d+)*)", options):
            assert str(known[option].default).strip("()") == default, (name, option)


def works_in_3d(name: str) -> bool:
    try:
        sizes_of(name, size=(32, 32, 32), options=small(name) if name in TEN | {"sam"} else {})
    except StudyError:
        return False
    return True


def test_the_page_tells_where_networks_are_cut(full: dict[str, NetworkSizes]) -> None:
    rows = rows_of_page("Where they are cut")
    assert rows.keys() == full.keys()
    for name, cells in rows.items():
        network = full[name]
        stacks = {s.name: s.stack for s in network.stages}
        for cut, (after, crosses, megabytes, share) in zip(network.cuts, (cells[:4], cells[4:]), strict=True):
            assert tuple(re.findall(r"`(\w+)`", after)) == cut.after, name
            assert megabytes == f"{cut.up / 1e6:.2f}", name
            assert share == f"{100 * (cut.front.flops + cut.tail.flops) / network.whole.flops:.0f} %", name
            top = ["×".join(map(str, stacks[stage][-1])) for stage in cut.after]
            assert [re.findall("[0-9×]+", part)[0] for part in crosses.split("; ")] == top, name


def test_tables_say_what_was_counted(full: dict[str, NetworkSizes]) -> None:
    networks = [full["unet"], full["cgnet"]]
    grid = parameters(networks)
    assert grid.title == "Parameters (256×256, 3 channels, 5 labels)"
    assert grid.rows[0] == ("unet", "shallow: down0, up0", "928", "7,752,800", "9,445", "7,763,173")
    flops = operations(networks)
    assert flops.rows[0] == ("unet", "shallow", "0.113", "22.8", "1.23", "24.2", "16.78", "16.78")
    rows = {row[0]: row for row in by_stage(full["cgnet"]).rows}
    assert rows["down2"][3:] == ("no: the image", "3×64×64 image + 64×64×64")
    assert rows["down3"][3:] == ("yes", "128×32×32")
    assert rows["whole"][1] == f"{full['cgnet'].whole.parameters:,}"
    assert "places" in {row[0]: row[4] for row in by_stage(full["segnet"]).rows}["down1"]
    assert [giga(n) for n in (1, 24_159_191_040, 134_488_129_536)] == ["1e-09", "24.2", "134"]


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "argv", ["concilium", "network", *arguments])
    with pytest.raises(SystemExit) as e:
        cli.main()
    captured = capsys.readouterr()
    assert isinstance(e.value.code, int)
    return e.value.code, captured.out, captured.err


def test_the_command_gives_exact_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = shown(monkeypatch, capsys, "unet", "--cut", "shallow", "--option", "norm=batch")
    assert (code, err) == (0, "")
    assert re.search(r"unet\W+shallow: down0, up0\W+928\W+7,752,800\W+9,445\W+7,763,173", out)


def test_the_command_says_which_networks_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = shown(monkeypatch, capsys, "--size", "32x32x32", "--cut", "deep", "--option", "base_features=8")
    assert code == 0
    assert all(name in out for name in ("unet", "nnunet", "segnet", "sunet"))
    assert "Left out: cgnet: [network] name = 'cgnet' is not possible with patches of 3 axes" in " ".join(err.split())


def test_the_command_shows_every_stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = shown(monkeypatch, capsys, "ducknet", "--all", "--option", "base_features=4", "--size", "64x64")
    assert code == 0
    assert "no: the image" in out
    assert all(stage in out for stage in ("down0", "encode4", "up0", "head0", "whole"))


def test_a_wrong_cut_ends_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = shown(monkeypatch, capsys, "unet", "--cut", "down0,head0", "--size", "32x32")
    assert (code, out) == (2, "")
    assert "is not possible. Allowed: shallow, deep" in err
