"""Metrics against numbers worked out by hand, and the verdict's three words."""

import math

import pytest
import torch

from splatedit.metrics import Report, iou, judge, psnr, roughness, ssim


def test_psnr_of_a_constant_error():
    a = torch.full((1, 3, 8, 8), 0.5)
    assert psnr(a, a + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert psnr(a, a) == math.inf


def test_psnr_counts_only_the_mask():
    a, mask = torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    b = a.clone()
    b[..., 0, 0], b[..., 3, 3], mask[..., 0, 0] = 0.1, 1.0, 1.0
    assert psnr(a, b, mask) == pytest.approx(20.0, abs=1e-4)
    assert math.isnan(psnr(a, b, torch.zeros_like(mask)))


def test_psnr_clamps_to_the_visible_range():
    assert psnr(torch.full((1, 3, 2, 2), 1.7), torch.ones(1, 3, 2, 2)) == math.inf


def test_ssim_of_equal_and_of_constant_pictures():
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert ssim(picture, picture) == pytest.approx(1.0, abs=1e-6)
    a, b = torch.full((1, 3, 32, 32), 0.2), torch.full((1, 3, 32, 32), 0.6)
    c1 = 0.01**2  # constants have no variance: only the luminance term is left
    assert ssim(a, b) == pytest.approx((2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1), abs=1e-4)


def test_ssim_falls_with_noise_and_only_inside_the_mask():
    rng = torch.Generator().manual_seed(1)
    picture = torch.rand(1, 3, 32, 32, generator=rng)
    noisy = (picture + 0.2 * torch.randn(picture.shape, generator=rng)).clamp(0, 1)
    assert ssim(picture, noisy) < 0.9
    half, mask = picture.clone(), torch.zeros(1, 1, 32, 32)
    half[..., 16:], mask[..., :8] = noisy[..., 16:], 1.0
    assert ssim(picture, half, mask) == pytest.approx(1.0, abs=1e-6)


def test_iou_of_overlapping_squares():
    a, b = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    a[..., :4, :4], b[..., 2:6, :4] = 1, 1
    assert iou(a, b) == pytest.approx(8 / 24)
    assert math.isnan(iou(torch.zeros(1), torch.zeros(1)))


def test_roughness_of_a_checkerboard_and_of_a_flat_picture():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    assert roughness(board.float()[None, None]) == pytest.approx(2.0)
    assert roughness(torch.ones(1, 1, 8, 8)) == 0


def report(**changes) -> Report:
    numbers = {
        "verdict": "changed",
        "changed_share": 0.8,
        "psnr_to_source": 20.0,
        "roughness": 0.2,
        "roughness_ratio": 1.1,
        "coverage_ratio": 1.0,
        "prefers_target": 1.0,
        "preferred_target_before": 0.0,
        "margin": 0.1,
        "margin_before": -0.1,
    }
    return Report(**{**numbers, **changes})


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "changed"),
        ({"changed_share": 0.001}, "unchanged"),
        ({"psnr_to_source": math.inf}, "unchanged"),
        ({"roughness_ratio": 4.0}, "noise"),
        ({"roughness_ratio": 4.0, "roughness": 0.03}, "changed"),
        ({"coverage_ratio": 0.1}, "noise"),
    ],
)
def test_verdict(changes, verdict):
    judged = judge(report(**changes))
    assert judged.verdict == verdict
    assert bool(judged.advice) == (verdict != "changed")


def test_an_edit_of_a_small_part_is_judged_by_that_part():
    small = {"changed_share": 0.004, "psnr_to_source": 55.0}
    assert judge(report(**small)).verdict == "unchanged"
    assert judge(report(**small), inside=0.01).verdict == "changed"
    assert judge(report(**{**small, "changed_share": 0.00001}), inside=0.01).verdict == "unchanged"
    assert judge(report(**{**small, "psnr_to_source": 66.0}), inside=0.01).verdict == "unchanged"


def test_a_splat_with_nan_is_noise():
    assert judge(report(), finite=False).verdict == "noise"


def test_changed_but_not_towards_the_target_is_said():
    judged = judge(report(prefers_target=0.2))
    assert judged.verdict == "changed" and "does not see the target" in judged.advice[0]


def test_report_is_valid_json_even_with_infinite_psnr():
    assert report(psnr_to_source=math.inf).as_dict()["psnr_to_source"] is None
