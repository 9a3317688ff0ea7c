"""The rule that says whether one plan suits: each ground alone, at its edge, and what it takes to count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from concilium import suitability
from concilium.suitability import Advice, Outline, View, advise, overlap, runs, spell, view_of

CUBES, FLAT = ((3, 3, 3),) * 4, ((1, 3, 3), *((3, 3, 3),) * 3)
HALVES = ((1, 1, 1), *((2, 2, 2),) * 3)
JOINT = Outline(
    axes=("z", "y", "x"), patch_size=(40, 40, 40), batch_size=2, spacing=(1.0, 1.0, 1.0), size=(40.0, 40.0, 40.0), kernels=CUBES,
    strides=HALVES, clips=(True,), ranges=((-100.0, 300.0),),
)  # fmt: skip


def view(joint: Outline = JOINT, **changes: Any) -> View:
    """A site that is like the joint plan but for what is given; `own` replaces values of its own plan."""
    own = changes.pop("own", {})
    about: dict[str, Any] = {
        "n_cases": 20,
        "shape": (40.0, 40.0, 40.0),
        "spacing": (1.0, 1.0, 1.0),
        "ranges": joint.ranges,
        "own": None if own is None else replace(joint, **own),
        "differs": bool(own),
        "shared": 1.0,
    }
    return view_of(joint, **about | changes)


def said(joint: Outline = JOINT, **sites: View) -> Advice:
    return advise(joint, {"other": view(joint), **sites})


def kinds(advice: Advice) -> list[tuple[str, str]]:
    return [(g.site, g.kind) for g in advice.grounds]


def test_sites_that_are_alike_have_one_plan() -> None:
    advice = said(north=view(spacing=(1.2, 1.0, 1.0)))
    assert (advice.suits, advice.sites, advice.grounds, advice.notes) == ("one", (), (), ())
    assert "within 1.2 times" in advice.text
    assert "equal to that of the joint plan" in said(north=view()).text


@pytest.mark.parametrize("spacing", [(2.0, 1.0, 1.0), (0.5, 1.0, 1.0)])
def test_twice_the_spacing_is_still_one_plan(spacing: tuple[float, ...]) -> None:
    assert said(north=view(spacing=spacing)).suits == "one"


@pytest.mark.parametrize("spacing", [(5.0, 1.0, 1.0), (1.0, 1.0, 0.4)])
def test_another_spacing_is_a_ground(spacing: tuple[float, ...]) -> None:
    shape = tuple(40 / s for s in spacing)
    advice = said(north=view(spacing=spacing, shape=shape, shared=0.714))
    assert (advice.suits, advice.sites, kinds(advice)) == ("asymmetric", ("north",), [("north", "spacing")])
    along, mm = ("z", "5") if spacing[0] == 5 else ("x", "0.4")
    assert f"its spacing along {along} is {mm} mm, the joint plan's 1 mm" in advice.text
    assert "by own plans it would share 71% of its parameters" in advice.text


def test_the_joint_plan_counts_along_its_own_axes() -> None:
    turned = replace(JOINT, axes=("x", "z", "y"), spacing=(3.0, 1.0, 1.0))
    assert (
        said(turned, north=view(turned, spacing=(3.0, 1.0, 1.0)), other=view(turned, spacing=(3.0, 1.0, 1.0))).suits
        == "one"
    )
    assert "along x" in said(turned, north=view(turned, spacing=(1.0, 1.0, 1.0))).text


def test_other_kernels_are_a_ground_where_the_network_follows_them() -> None:
    advice = said(north=view(own={"kernels": FLAT}))
    assert kinds(advice) == [("north", "kernels")]
    assert "its own kernels are 1×3×3, 3 of 3×3×3, the joint plan's 4 of 3×3×3" in advice.text
    assert said(north=view(own={"kernels": FLAT}, differs=False)).suits == "one", (
        "a network that does not read the plan"
    )


def test_kernels_are_compared_along_the_axes_of_the_file() -> None:
    flat = replace(JOINT, kernels=FLAT)
    same = view(flat, own={"axes": ("x", "z", "y"), "kernels": (((3, 1, 3)), *CUBES[1:])})
    assert kinds(said(flat, north=same)) == []
    advice = said(flat, north=view(flat, own={"axes": ("x", "z", "y")}))
    assert kinds(advice) == [("north", "kernels")]
    assert advice.notes[-1].startswith("Own plans of north take the axes in another order than z×y×x")


def test_one_more_stage_is_a_note_and_two_are_a_ground() -> None:
    one = said(north=view(own={"strides": (*HALVES, (2, 2, 2)), "kernels": (*CUBES, (3, 3, 3))}))
    assert one.suits == "one"
    assert one.notes == ("north's own plan would have 5 stages for 4; that alone is no ground.",)
    two = said(north=view(own={"strides": (*HALVES, (2, 2, 2), (2, 2, 2))}))
    assert kinds(two) == [("north", "stages")]
    assert "its own plan has 6 stages, the joint one 4" in two.text
    assert (
        said(north=view(own={"strides": HALVES[:-1]})).notes[0].startswith("north's own plan would have 3 stages for 4")
    )


def test_a_patch_that_covers_too_little_counts_where_an_own_one_covers_more() -> None:
    large = (64.0, 64.0, 64.0)
    better = view(shape=large, own={"patch_size": (64, 64, 64), "size": large})
    assert better.covered == pytest.approx((40 / 64) ** 3)
    assert better.covered < suitability.COVERED
    assert kinds(said(north=better)) == [("north", "covered")]
    assert said(north=view(shape=large, own={"patch_size": (40, 40, 40), "size": large})).suits == "one", "no better"
    assert said(north=view(shape=(63.0, 63.0, 63.0), own={"patch_size": (64, 64, 64)})).suits == "one", "a quarter"


def test_a_patch_that_is_mostly_padding_is_a_ground() -> None:
    small = view(shape=(25.0, 25.0, 25.0))
    assert small.filled == pytest.approx((25 / 40) ** 3)
    assert kinds(said(north=small)) == [("north", "filled")]
    assert said(north=view(shape=(26.0, 26.0, 26.0))).suits == "one"


def test_intensities_count_where_they_are_clipped_to_a_common_range() -> None:
    other = {"ranges": ((900.0, 1300.0),)}
    advice = said(north=view(**other))
    assert kinds(advice) == [("north", "range")]
    assert "its intensities are 900 to 1300, and are clipped to -100 to 300 (is the unit the same?)" in advice.text
    single = replace(JOINT, clips=(False,))
    assert said(single, north=view(single, **other)).suits == "one"
    assert said(north=view(ranges=(None,))).suits == "one", "no foreground"


def test_too_few_cases_leave_the_joint_plan() -> None:
    few = view(spacing=(5.0, 1.0, 1.0), shape=(8.0, 40.0, 40.0), n_cases=suitability.FEW - 1)
    advice = said(north=few)
    assert (advice.suits, advice.sites, kinds(advice)) == ("one", (), [("north", "spacing")])
    assert "no site that differs from it should have one of its own (north: its spacing" in advice.text
    assert advice.notes == ("north has 9 cases, fewer than the 10 that a plan of its own should rest on.",)
    both = said(north=few, west=view(spacing=(5.0, 1.0, 1.0)))
    assert both.sites == ("west",)
    assert "north" not in both.text


def test_a_site_that_cannot_be_planned_for_says_why() -> None:
    advice = said(north=view(own=None, why_not="No case has foreground.", shared=None))
    assert advice.suits == "one"
    assert advice.notes == ("north cannot have a plan of its own (No case has foreground.).",)


def test_where_every_image_is_resized_neither_size_nor_spacing_counts() -> None:
    resized = replace(JOINT, resizes=True)
    north = view(resized, spacing=(9.0, 1.0, 1.0), shape=(8.0, 400.0, 400.0))
    assert (north.factor, north.covered, north.filled) == ((5.0, 0.1, 0.1), 1.0, 1.0)
    advice = said(resized, north=north)
    assert (advice.suits, advice.grounds) == ("one", ())
    assert "brought to one size" in advice.text


def test_what_resampling_does_to_a_site() -> None:
    north = view(spacing=(5.0, 1.0, 0.5), shape=(8.0, 40.0, 80.0))
    assert north.factor == (5.0, 1.0, 0.5)
    assert north.voxels == 2.5
    assert north.anisotropy == 10
    assert (north.covered, north.filled) == (1.0, 1.0)


def test_words() -> None:
    assert runs([(1, 3, 3), (3, 3, 3), (3, 3, 3), (1, 3, 3)]) == "1×3×3, 2 of 3×3×3, 1×3×3"
    assert spell((-0.5, 277760.0)) == "-0.5 to 277760"
    assert overlap((0, 4), (2, 6)) == pytest.approx(1 / 3)
    assert overlap((0, 1), (2, 3)) == 0
    assert overlap((1, 1), (1, 1)) == 1
