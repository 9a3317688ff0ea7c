"""The scores of an audit, on what can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from concilium.leakage.scores import (
    auc_of,
    best_threshold,
    body_of,
    dice,
    distance_correlation,
    psnr,
    range_of,
    ssim,
)

RNG = np.random.default_rng(0)


def head(size: int = 32) -> np.ndarray:
    """A bright disc with texture in dark air, (1, size, size), air 0 to the bit."""
    x, y = np.mgrid[:size, :size] - size / 2
    disc = x**2 + y**2 < (size / 4) ** 2
    return (disc * (0.6 + 0.4 * np.sin(x) * np.cos(y)))[None].astype(np.float32)


def test_ssim_of_an_image_with_itself_is_1_and_without_a_mask_it_is_scikit_images() -> None:
    a, b = RNG.random((24, 24)), RNG.random((24, 24))
    everywhere = np.ones((24, 24), bool)
    assert ssim(a, a, 0, 1, everywhere) == pytest.approx(1)
    full = structural_similarity(
        a, b, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )[1]
    assert ssim(a, b, 0, 1, everywhere) == pytest.approx(full.mean())


def test_background_does_not_flatter() -> None:
    """An empty image is right in the air around a head, and wrong in it: only the second counts."""
    image = head()
    within = range_of(image[None])
    body = body_of(image, within)
    assert 0.1 < body.mean() < 0.35
    nothing = np.zeros_like(image[0])
    assert ssim(image[0], nothing, 0, 1, np.ones_like(body)) > 0.5
    assert ssim(image[0], nothing, 0, 1, body) < 0.2
    assert psnr(image[0], nothing, 0, 1, body) < psnr(image[0], nothing, 0, 1, np.ones_like(body)) - 4


def test_what_normalisation_set_to_one_value_is_no_body() -> None:
    """Outside a mask nnU-Net leaves 0, the middle of the range; inside are darker and brighter values."""
    image = np.where(head() > 0, RNG.normal(size=(1, 32, 32)), 0).astype(np.float32)
    body = body_of(image, range_of(image[None]))
    assert body.sum() <= (head() > 0).sum()


def test_the_range_is_that_of_the_attackers_cases_for_every_patch() -> None:
    a, b = np.zeros((16, 16)), np.zeros((16, 16))
    a[8, 8], b[8, 8] = 50, 1
    assert ssim(a, b, 0, 1, np.ones_like(a, bool)) == pytest.approx(1), "clipped"
    assert psnr(np.zeros(4), np.full(4, 0.1), 0, 1, np.ones(4, bool)) == pytest.approx(20)


def test_a_volume_thinner_than_the_window_is_scored_slice_by_slice() -> None:
    a, b = RNG.random((16, 16, 4)), RNG.random((16, 16, 4))
    body = np.ones((16, 16, 4), bool)
    slices = [ssim(a[..., z], b[..., z], 0, 1, body[..., z]) for z in range(4)]
    assert ssim(a, b, 0, 1, body) == pytest.approx(np.mean(slices))


def test_distance_correlation_is_1_of_a_function_and_0_of_what_is_independent() -> None:
    a = RNG.normal(size=(40, 3, 50))
    assert distance_correlation(a, 3 * a + 1) == pytest.approx(1)
    found = [distance_correlation(RNG.normal(size=(40, 200)), RNG.normal(size=(40, 200))) for _ in range(20)]
    assert abs(np.mean(found)) < 0.1, "with many values per patch the one that is not corrected is near 1"
    assert distance_correlation(a, np.ones_like(a)) == 0


def test_area_and_share_found_at_few_false_alarms() -> None:
    members = np.arange(400) < 200
    assert auc_of(members.astype(float), members) == (1.0, 1.0)
    assert auc_of(-members.astype(float), members) == (0.0, 0.0)
    assert auc_of(np.zeros(400), members) == (0.5, 0.0)
    scores = np.where(members, 1.0, 0.0)
    scores[200:202] = 5  # two false alarms are a hundredth of 200 and are allowed; a third is not
    assert auc_of(scores, members)[1] == 1.0
    scores[202] = 5
    assert auc_of(scores, members)[1] == 0.0


def test_dice_and_the_threshold_of_the_best() -> None:
    a = np.array([True, True, False, False])
    assert dice(a, np.array([True, False, True, False])) == 0.5
    assert dice(a & False, a & False) == 1.0
    chance = np.array([[0.9, 0.6, 0.4, 0.1]] * 3)
    assert 0.4 <= best_threshold(chance, np.stack([a] * 3)) < 0.6
