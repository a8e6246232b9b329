"""Shift and distance of edges between conditions and results, on shifts that are known."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from imgdit.benchmarks.alignment import alignment, distance_to, edge_distance, slope, strongest


def photos(seed=0, count=2, size=96):
    """Smooth noise with blobs, larger than what is looked at."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, size // 8, size // 8, generator=generator)
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def window(images, rows, columns, size=64):
    return list(images[:, :, 16 - rows : 16 - rows + size, 16 - columns : 16 - columns + size])


@pytest.mark.parametrize("shift", [(0, 0), (5, -7), (-12, 3), (1, 0)])
def test_shifts_of_whole_pixels_are_found(shift):
    images = photos()
    found = alignment(window(images, 0, 0), window(images, *shift))
    assert (found.shifts - torch.tensor(shift)).abs().max() < 0.1
    assert abs(found.shift.value - torch.tensor(shift).float().norm()) < 0.1
    assert found.rows.low <= found.rows.value <= found.rows.high
    assert (found.edges.value < 0.01) == (shift == (0, 0))


def test_shifts_between_pixels_are_found():
    fine = photos(size=192)
    images, moved = (F.avg_pool2d(fine[:, :, i : i + 160, i : i + 160], 2) for i in (1, 0))
    found = alignment(list(images), list(moved))
    assert (found.shifts - 0.5).abs().max() < 0.1


def test_conditions_of_another_kind_are_compared_by_their_edges():
    images = photos(3)
    edges = strongest(slope(images))[:, None].expand(-1, 3, -1, -1).float()
    inverted = 1 - images
    for kind in (edges, inverted):
        found = alignment(window(kind, 0, 0), window(images, 4, -6))
        assert (found.shifts - torch.tensor((4, -6))).abs().max() < 0.5
        assert alignment(window(kind, 0, 0), window(images, 0, 0)).shift.value < 0.3


def test_distance_of_edges_is_that_of_every_pair():
    edges = torch.rand(2, 9, 13, generator=torch.Generator().manual_seed(1)) > 0.9
    places = torch.cartesian_prod(torch.arange(9.0), torch.arange(13.0))
    for one, found in zip(edges, distance_to(edges), strict=True):
        pairs = torch.cdist(places, one.nonzero().float())
        torch.testing.assert_close(found.flatten(), pairs.amin(1))
    line, moved = torch.zeros(1, 9, 13, dtype=torch.bool), torch.zeros(1, 9, 13, dtype=torch.bool)
    line[:, :, 3], moved[:, :, 7] = True, True
    assert edge_distance(line, moved).item() == 4.0


def test_conditions_are_fitted_to_the_results():
    image = Image.fromarray((photos(4)[0].permute(1, 2, 0) * 255).byte().numpy())
    found = alignment(image, image.resize((48, 48)))
    assert found.shift.value < 0.3 and "px" in str(found)


def test_what_has_no_place_is_refused():
    images = photos()
    with pytest.raises(ValueError, match=r"1 condition\(s\) and 2 result"):
        alignment(images[0], list(images))
    with pytest.raises(ValueError, match="result 1 is of one colour"):
        alignment(list(images), [images[0], torch.zeros(3, 96, 96)])
