import math

import pytest
import torch

from imgdit.benchmarks.metrics import (
    abs_rel,
    bootstrap,
    delta_1,
    edge_f1,
    fitted,
    frechet,
    mean_iou,
    psnr,
    ssim,
    wilson,
)


def test_wilson_is_the_textbook_interval():
    # 8 of 10, Newcombe (1998), table I: 0.4902 to 0.9433 for z = 1.96
    assert wilson(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=2e-4)
    assert wilson(0, 5).low == 0.0 and wilson(5, 5).high == 1.0
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson(3, 2)


def test_bootstrap_covers_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 2
    found = bootstrap(values)
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(float(values.mean()), abs=1e-6)
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.15)
    with pytest.raises(ValueError, match="a row of numbers"):
        bootstrap([])


def test_depth_metrics():
    truth = torch.full((2, 1, 4, 4), 2.0)
    made = truth.clone()
    made[1, :, :2] = 3.0
    assert abs_rel(made, truth).tolist() == pytest.approx([0.0, 0.25])
    assert delta_1(made, truth).tolist() == pytest.approx([1.0, 0.5])


def test_fitting_takes_out_scale_and_shift_of_the_inverse_alone():
    truth = 2 + torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made = 1 / (torch.tensor([0.5, 2.0]).view(2, 1, 1, 1) / truth + 0.3)
    assert torch.allclose(fitted(made, truth), truth, atol=1e-5)
    bent = made + 0.1 * torch.linspace(-1, 1, 8) ** 2
    assert abs_rel(fitted(bent, truth), truth).min() > 1e-3
    level = torch.full_like(truth, 3.0)  # nothing to scale: the mean inverse is nearest
    assert torch.allclose(1 / fitted(level, truth), (1 / truth).mean((2, 3), keepdim=True).expand_as(truth), atol=1e-6)


def test_mean_iou_counts_classes_that_either_shows():
    truth = torch.zeros(1, 4, 4, dtype=torch.long)
    truth[:, :, 2:] = 1
    made = truth.clone()
    assert mean_iou(made, truth).item() == 1.0
    made[0, 0, 0] = 2
    assert mean_iou(made, truth).item() == pytest.approx((7 / 8 + 1 + 0) / 3)


def test_edges_count_within_a_pixel():
    truth = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    truth[..., 4] = True
    for shift, expected in ((0, 1.0), (1, 1.0), (2, 0.0)):
        assert edge_f1(truth.roll(shift, -1), truth).item() == pytest.approx(expected)
    assert edge_f1(torch.zeros_like(truth), truth).item() == 0.0


def test_psnr_and_ssim():
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert psnr(image * 0 + 0.5, image * 0 + 0.6).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    assert ssim(image, image).tolist() == pytest.approx([1.0, 1.0])
    worse = (image + 0.2 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    assert (ssim(worse, image) < 0.95).all()
    # Constant images: only the luminance term is left.
    a, b, c = 0.4, 0.6, 0.01**2
    flat = torch.ones(1, 3, 16, 16)
    assert ssim(flat * a, flat * b).item() == pytest.approx((2 * a * b + c) / (a * a + b * b + c), rel=1e-4)


def test_frechet_distance_of_known_normals():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 3, generator=generator, dtype=torch.float64)
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet(a, a + 2) == pytest.approx(12.0)
    b = 3 * torch.randn(20000, 3, generator=generator, dtype=torch.float64)
    assert frechet(a, b) == pytest.approx(3 * (3 - 1) ** 2, rel=0.05)
    assert math.isfinite(frechet(a[:2], b[:2]))
    with pytest.raises(ValueError, match="two samples or more"):
        frechet(a[:1], b)


def test_abs_rel_counts_the_pixels_of_a_mask():
    truth = torch.full((1, 1, 2, 2), 2.0)
    depth = torch.tensor([[[[2.0, 3.0], [4.0, 100.0]]]])
    where = torch.tensor([[[[True, True], [True, False]]]])
    assert abs_rel(depth, truth, where).tolist() == [0.5]
    assert torch.equal(abs_rel(depth, truth, torch.ones_like(where)), abs_rel(depth, truth))
