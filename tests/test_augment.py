import dataclasses
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import on, only_on_the_cpu
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch.overrides import TorchFunctionMode

from mtseg.augment import (
    CONTROL_SPACING,
    Strengths,
    StrongView,
    gaussian_blur,
    intensity_view,
    rotation_matrix,
    sampling_grid,
    strong_view,
)

SIZE = (24, 20, 14)
MIDDLE = (np.array(SIZE) - 1) / 2
OFF = Strengths(**{field.name: 0.0 for field in dataclasses.fields(Strengths)})
GEOMETRY = dataclasses.replace(OFF, rotation=15.0, scaling=0.15, elastic=4.0)


@pytest.fixture(autouse=True)
def on_every_device(device, monkeypatch):
    for function in (strong_view, intensity_view, gaussian_blur):
        monkeypatch.setattr(sys.modules[__name__], function.__name__, on(device, function))
    monkeypatch.setattr(StrongView, "align", on(device, StrongView.align))


def only(**strengths):
    return dataclasses.replace(OFF, **strengths)


def voxels(size=SIZE):
    return np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij")).astype(np.float32)


def asymmetric(number=2):
    """Two channels of smooth blobs, without any symmetry: different in each sample."""
    channels = []
    for sample in range(number):
        for places in (((6, 5, 4), (17, 6, 8)), ((8, 13, 10), (16, 14, 3))):
            blobs = [np.exp(-((voxels().T - place - sample) ** 2).sum(-1).T / 30) for place in places]
            channels.append(blobs[0] - 0.6 * blobs[1])
    return torch.tensor(np.array(channels, np.float32).reshape(number, 2, *SIZE))


def sources(view, size=SIZE):
    """Where each voxel in view comes from, (N, 3, W, H, D) in voxels: what align makes of the coordinates."""
    there, in_view = view.align(torch.from_numpy(voxels(size)).expand(len(view.image), -1, *[-1] * len(size)))
    return there.double().numpy(), in_view[:, 0].numpy()


def fitted(source, in_view):
    """The least-squares A and b of source = A p + b over the voxels in view, and the largest deviation from it."""
    points = np.stack([*(v[in_view] for v in voxels(in_view.shape)), np.ones(in_view.sum())], axis=1)
    found = np.stack([s[in_view] for s in source], axis=1)
    solution = np.linalg.lstsq(points, found, rcond=None)[0]
    return solution[:-1].T, solution[-1], np.abs(points @ solution - found).max()


# ------------------------------------------------------------------------------------------------------- equivariance
def linear_network():
    torch.manual_seed(5)
    return torch.nn.Conv3d(2, 3, kernel_size=1)


def deviation(view, image, network):
    """The largest difference in the compared voxels between the network's output there and the aligned one."""
    with torch.no_grad():
        target, compared = view.align(network(image))
        return ((network(view.image) - target).abs() * compared).max().item()


def test_a_voxelwise_network_gives_the_same_on_the_view_as_after_align():
    image, network = asymmetric(), linear_network()
    torch.manual_seed(0)
    view = strong_view(image, GEOMETRY)
    assert 0.3 < view.compared.float().mean() < 0.95
    assert deviation(view, image, network) < 1e-5
    # Softmax does not commute with interpolation, but on smooth images it nearly does.
    assert deviation(view, image, lambda x: torch.softmax(5 * network(x), dim=1)) < 0.02


WRONG = {
    "none": lambda view: None,
    "inverse": lambda view: 2 * identity_grid(len(view.image)) - view.grid,
    "axes in the other order": lambda view: view.grid.flip(-1),
    "samples exchanged": lambda view: view.grid.flip(0),
    "corners at -1 and 1": lambda view: view.grid * torch.tensor(SIZE).flip(0) / (torch.tensor(SIZE).flip(0) - 1),
    "one voxel off": lambda view: view.grid + torch.tensor([0, 0, 2 / SIZE[0]]),
}


def identity_grid(number):
    return sampling_grid(SIZE, torch.eye(3).expand(number, 3, 3))[0]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_alignment_is_noticed(wrong):
    image, network = asymmetric(), linear_network()
    torch.manual_seed(0)
    view = strong_view(image, GEOMETRY)
    assert deviation(dataclasses.replace(view, grid=WRONG[wrong](view)), image, network) > 0.02


# ----------------------------------------------------------------------------------------------------------- geometry
def test_a_known_rotation_and_scaling_against_scipy():
    vector, magnification = np.radians(12) * np.array([2, -1, 2]) / 3, 0.9
    cross = np.array([[0, -vector[2], vector[1]], [vector[2], 0, -vector[0]], [-vector[1], vector[0], 0]])
    turned = rotation_matrix(torch.tensor(cross)[None], torch.tensor([np.linalg.norm(vector)], dtype=torch.float64))
    np.testing.assert_allclose(turned[0], Rotation.from_rotvec(vector).as_matrix(), atol=1e-12)
    image = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    grid, in_view = sampling_grid(SIZE, turned / magnification)
    ours = F.grid_sample(torch.from_numpy(image)[None, None], grid, align_corners=False)[0, 0].numpy()
    matrix = Rotation.from_rotvec(vector).as_matrix() / magnification
    scipys = ndimage.affine_transform(image, matrix, MIDDLE - matrix @ MIDDLE, order=1, mode="constant", cval=np.nan)
    inside = in_view[0, 0].numpy()
    np.testing.assert_array_equal(inside, np.isfinite(scipys))
    assert 0.5 < inside.mean() < 0.95
    np.testing.assert_allclose(ours[inside], scipys[inside], atol=1e-4)


def test_what_is_drawn_is_a_rotation_and_a_scaling_within_bounds_against_scipy():
    torch.manual_seed(0)
    image = torch.randn(40, 1, *SIZE)
    view = strong_view(image, only(rotation=15.0, scaling=0.15))
    source, in_view = sources(view)
    angles, magnifications, axes = [], [], []
    for n in range(len(image)):
        matrix, offset, misfit = fitted(source[n], in_view[n])
        assert misfit < 2e-4
        magnification = np.linalg.det(matrix) ** (-1 / 3)
        np.testing.assert_allclose(matrix @ matrix.T * magnification**2, np.eye(3), atol=1e-5)
        vector = Rotation.from_matrix(matrix * magnification).as_rotvec()
        angles.append(np.degrees(np.linalg.norm(vector)))
        axes.append(vector / np.linalg.norm(vector))
        magnifications.append(magnification)
        expected = ndimage.affine_transform(image[n, 0].numpy(), matrix, offset, order=1, mode="reflect")
        np.testing.assert_allclose(view.image[n, 0].numpy(), expected, atol=1e-3)
        # True exactly where SciPy does not reach beyond the volume, but for rounding on its faces.
        reached = ndimage.affine_transform(np.ones(SIZE), matrix, offset, order=1, mode="constant")
        there = np.moveaxis(voxels(), 0, -1) @ matrix.T + offset
        on_face = (np.minimum(np.abs(there), np.abs(there - np.array(SIZE) + 1)) < 2e-3).any(-1)
        np.testing.assert_array_equal(in_view[n][~on_face], reached[~on_face] > 0.5)
    assert 13 < max(angles) <= 15
    assert 0.85 <= min(magnifications) < 0.88
    assert 1.12 < max(magnifications) <= 1.15
    assert (np.abs(axes).mean(axis=0) > 0.35).all()  # 0.5 if every direction is equally likely


def test_rotations_are_rotations_in_the_space_of_the_spacing():
    torch.manual_seed(0)
    spacing = np.array([1.0, 1.0, 4.0])
    source, in_view = sources(strong_view(torch.randn(4, 1, *SIZE), only(rotation=30.0), spacing=spacing))
    for n in range(4):
        matrix = fitted(source[n], in_view[n])[0] * spacing[:, None] / spacing
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-5)


def test_elastic_moves_against_scipys_splines():
    size = (40, 20, 14)
    control = np.random.default_rng(0).uniform(-5, 5, (1, 3, 6, 5, 4))
    grid, in_view = sampling_grid(size, torch.eye(3)[None], torch.from_numpy(control))
    moved = ((grid[0].flip(-1).numpy() + 1) * size - 1) / 2
    for axis in range(3):
        at = voxels(size).astype(np.float64) / CONTROL_SPACING + 1
        move = ndimage.map_coordinates(control[0, axis], at, order=3, prefilter=False, mode="constant")
        np.testing.assert_allclose(moved[..., axis] - voxels(size)[axis], move, atol=1e-4)
    beyond = np.maximum(-moved, moved - np.array(size) + 1).max(-1)  # the faces' outermost voxels may be rounded
    np.testing.assert_array_equal(in_view[0, 0].numpy()[np.abs(beyond) > 1e-3], beyond[np.abs(beyond) > 1e-3] < 0)


def test_elastic_stays_within_its_strength_and_folds_nowhere():
    size = (40, 36, 34)
    torch.manual_seed(0)
    grid = strong_view(torch.zeros(6, 1, *size), only(elastic=6.4)).grid
    moved = ((grid.flip(-1).double().numpy() + 1) * size - 1) / 2
    moves = moved - np.moveaxis(voxels(size), 0, -1)
    assert 3 < np.abs(moves).max() <= 6.4
    assert 0.15 < np.sqrt((moves**2).mean()) / 6.4 < 0.25
    gradient = np.stack(np.gradient(moved, axis=(1, 2, 3)), axis=-1)
    assert np.linalg.det(gradient).min() > 0


def test_labels_follow_the_image_and_are_ignored_out_of_view():
    labels = torch.from_numpy(np.stack([((voxels().T - MIDDLE) ** 2).sum(-1).T <= 30] * 8).astype(np.int64))
    labels[:, :5] = 2
    labels[:, 20:, 3:] = 255
    torch.manual_seed(0)
    view = strong_view(labels[:, None].float(), GEOMETRY, labels)
    source, in_view = sources(view)
    nearest = np.rint(source).astype(int)
    tie = (np.abs(np.abs(source - np.floor(source)) - 0.5) < 1e-3).any(axis=1)
    for n in range(len(labels)):
        sure = in_view[n] & ~tie[n]
        expected = labels[n].numpy()[tuple(nearest[n][:, sure])]
        np.testing.assert_array_equal(view.labels[n].numpy()[sure], expected)
        assert (view.labels[n].numpy()[~in_view[n]] == 255).all()
    assert view.labels.dtype == labels.dtype


def test_a_magnification_enlarges_what_is_seen():
    torch.manual_seed(0)
    blob = torch.from_numpy(np.exp(-((voxels().T - MIDDLE) ** 2).sum(-1).T / 8)).expand(8, 1, *SIZE)
    view = strong_view(blob, only(scaling=0.15))
    source, in_view = sources(view)
    for n in range(8):
        growth = (view.image[n] * view.compared[n]).sum() / blob[n].sum()
        assert growth.item() == pytest.approx(1 / np.linalg.det(fitted(source[n], in_view[n])[0]), rel=0.05)


def test_images_of_two_dimensions():
    torch.manual_seed(0)
    image = torch.randn(3, 2, 20, 14)
    view = strong_view(image, Strengths(), mix_images=image)
    assert view.image.shape == image.shape
    view = strong_view(image, only(rotation=15.0, scaling=0.15))
    source, in_view = sources(view, (20, 14))
    for n in range(3):
        matrix, offset, misfit = fitted(source[n], in_view[n])
        assert misfit < 2e-4
        expected = ndimage.affine_transform(image[n, 1].numpy(), matrix, offset, order=1, mode="reflect")
        np.testing.assert_allclose(view.image[n, 1].numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("spacing", [None, (1.0, 2.0, 8.0)])
def test_in_plane_every_slice_of_a_view_is_what_its_own_slice_gives(spacing):
    """All slices move alike, each as SciPy moves it by itself."""
    torch.manual_seed(0)
    stack = torch.randn(4, 1, 24, 20, 6)
    stack[..., 3] = 0  # nothing comes from a slice beside
    labels = (stack[:, 0] > 0.5).long()
    strengths = only(rotation=40.0, scaling=0.3, elastic=4.0, in_plane=True)
    view = strong_view(stack, strengths, labels, spacing=spacing)
    source, in_view = sources(view, (24, 20, 6))
    source = np.moveaxis(source, 1, -1)
    np.testing.assert_allclose(source[..., 2], np.broadcast_to(np.arange(6), source.shape[:-1]), atol=1e-4)
    np.testing.assert_allclose(source[..., :2], source[..., :1, :2] + 0 * source[..., :2], atol=1e-4)
    np.testing.assert_array_equal(in_view, np.broadcast_to(in_view[..., :1], in_view.shape))
    assert (np.abs(source[:, 12, 10, 0, :2] - source[:, 4, 10, 0, :2])[:, 1] > 0.3).any(), "they are turned"
    for n, k in np.ndindex(4, 6):
        own, seen = np.moveaxis(source[n, :, :, k, :2], -1, 0), in_view[n, :, :, k]
        moved = ndimage.map_coordinates(stack[n, 0, :, :, k].numpy(), own, order=1)
        np.testing.assert_allclose(view.image[n, 0, :, :, k].numpy()[seen], moved[seen], atol=1e-3)
        expected = ndimage.map_coordinates(labels[n, :, :, k].numpy(), own, order=0)
        sure = seen & (np.abs(own - np.rint(own)) < 0.49).all(0)
        assert (view.labels[n, :, :, k].numpy() == expected)[sure].all()
    assert not Strengths(0, 0, 0, 0, 0, 0, 0, 0, in_plane=True)


def test_padding_is_not_compared_wherever_the_view_moves_it():
    torch.manual_seed(0)
    image = torch.randn(3, 1, 20, 18, 16)
    inside = torch.ones(3, 1, 20, 18, 16, dtype=torch.bool)
    inside[..., :3] = inside[..., 13:] = False
    assert strong_view(image, only(), inside=inside).compared is inside
    assert torch.equal(strong_view(image, only(gamma=0.5), inside=inside).compared, inside)
    view = strong_view(image, only(rotation=30.0, elastic=3.0), inside=inside)
    source, in_view = sources(view, (20, 18, 16))
    compared, z = view.compared[:, 0].numpy(), source[:, 2]
    assert not compared[(z < 2.99) | (z > 12.01) | ~in_view].any()
    assert compared[(z > 3.01) & (z < 11.99) & in_view].all()


# -------------------------------------------------------------------------------------------- boxes and intensities
def test_pasted_boxes_are_not_compared_and_bring_their_labels():
    torch.manual_seed(0)
    image, mix = torch.randn(200, 1, *SIZE), torch.randn(3, 1, *SIZE)
    mix_labels = torch.randint(0, 3, (3, *SIZE))
    view = strong_view(image, only(mixin=0.3), mix_images=mix, mix_labels=mix_labels)
    pasted = ~view.compared
    assert torch.equal(view.image[~pasted], image[~pasted])
    used = set()
    for n in range(200):
        where = pasted[n, 0]
        origin = [m for m in range(3) if torch.equal(view.image[n, 0][where], mix[m, 0][where])]
        used.update(origin[:1])
        assert torch.equal(view.labels[n][where], mix_labels[origin[0]][where])
        corners = where.nonzero()
        if len(corners):  # a box: as many voxels as between its corners
            assert (corners.amax(0) - corners.amin(0) + 1).prod() == len(corners)
        assert where.float().mean() < 0.3 * 1.4  # rounding to voxels
    assert used == {0, 1, 2}
    assert (view.labels[~pasted[:, 0]] == 255).all()
    assert pasted.float().mean().item() == pytest.approx(0.15, abs=0.02)
    target, _ = view.align(image)
    assert torch.equal(target, image)
    labels = torch.zeros(200, *SIZE, dtype=torch.int64)
    torch.manual_seed(1)
    view = strong_view(image, only(mixin=0.3), labels, mix)
    assert torch.equal(view.labels == 255, ~view.compared[:, 0])


def test_cut_boxes_are_not_compared_and_show_the_mean():
    torch.manual_seed(0)
    image = torch.randn(200, 2, *SIZE)
    labels = torch.zeros(200, *SIZE, dtype=torch.uint8)
    view = strong_view(image, only(cutout=0.3), labels)
    cut = ~view.compared
    assert torch.equal(view.labels == 255, cut[:, 0])
    expected = torch.where(cut, image.mean((2, 3, 4), keepdim=True), image)
    torch.testing.assert_close(view.image, expected)
    kept = view.compared.expand_as(image)
    assert torch.equal(view.image[kept], image[kept])
    assert cut.float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert cut.float().flatten(1).mean(1).max() < 0.3 * 1.3


def test_blur_against_scipy():
    image = np.random.default_rng(0).standard_normal((2, 1, *SIZE)).astype(np.float32)
    ours = gaussian_blur(torch.from_numpy(image), torch.tensor([0.8, 0.0])).numpy()
    weights = ndimage.gaussian_filter(np.ones(SIZE), 0.8, mode="constant", truncate=8)
    scipys = ndimage.gaussian_filter(image[0, 0].astype(np.float64), 0.8, mode="constant", truncate=8) / weights
    np.testing.assert_allclose(ours[0, 0], scipys, atol=1e-5)
    np.testing.assert_array_equal(ours[1], image[1])


def test_gamma_is_a_power_between_minimum_and_maximum():
    torch.manual_seed(0)
    image = torch.randn(40, 2, 20, 14)
    view = strong_view(image, only(gamma=0.5)).image
    axes = (2, 3)
    torch.testing.assert_close(view.amin(axes), image.amin(axes))
    torch.testing.assert_close(view.amax(axes), image.amax(axes))

    def logarithm(x):
        low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        return ((x - low) / (high - low)).double().clamp(1e-3, 1 - 1e-3).log()

    before, after = logarithm(image), logarithm(view)
    middle = (before < -0.2) & (before > -1.5)
    exponents = []
    for n in range(40):
        ratio = after[n][middle[n]] / before[n][middle[n]]
        assert ratio.std() < 1e-4
        exponents.append(ratio.mean().item())
    assert 1 / 1.5 <= min(exponents) < 0.72
    assert 1.4 < max(exponents) <= 1.5
    assert np.median(np.log(exponents)) == pytest.approx(0, abs=0.12)


def test_noise_is_gaussian_with_a_deviation_up_to_its_strength():
    torch.manual_seed(0)
    image = torch.randn(40, 1, *SIZE)
    noise = (strong_view(image, only(noise=0.2)).image - image).flatten(1).double()
    deviations = noise.std(1)
    assert 0.18 < deviations.max() < 0.204
    assert deviations.mean().item() == pytest.approx(0.1, abs=0.02)
    standard = noise / deviations[:, None]
    assert standard.mean().item() == pytest.approx(0, abs=0.01)
    assert (standard**4).mean().item() == pytest.approx(3, abs=0.05)


class Drawn(TorchFunctionMode):
    """Records the devices of all normal numbers drawn for an image."""

    def __init__(self):
        super().__init__()
        self.devices = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.randn and result.ndim == 5:
            self.devices.append(result.device.type)
        return result


def test_noise_is_drawn_on_the_device_of_the_images():
    """On the device "meta", which every machine has and which computes nothing."""
    with Drawn() as drawn:
        view = strong_view(torch.empty(2, 1, *SIZE, device="meta"), only(noise=0.2))
    assert view.image.device.type == "meta"
    assert drawn.devices == ["meta"]


# ----------------------------------------------------------------------------------------------------- intensity views


def in_units(image, of=None):
    """Each channel of `image` from 0 to 1 between the minimum and the maximum of `of`, in double precision."""
    axes, of = tuple(range(2, image.ndim)), image if of is None else of
    low, high = of.amin(axes, keepdim=True).double(), of.amax(axes, keepdim=True).double()
    return (image.double() - low) / (high - low)


def intensities(number=40, size=SIZE, **components):
    """(an image, its view), both between the image's own minimum and maximum."""
    torch.manual_seed(0)
    image = torch.rand(number, 2, *size)
    view = intensity_view(image, shares=(1, 1, 1), **components)
    return in_units(image), in_units(view, of=image)


@pytest.mark.parametrize("size", [SIZE, (30, 26)])
def test_brightness_and_contrast_are_factors_of_what_is_clipped(size):
    before, after = intensities(size=size, brightness=0.5)
    inside = (before > 0.1) & (after < 1 - 1e-6)
    factors = [(after[n] / before[n])[inside[n]] for n in range(40)]
    assert max(factor.std() for factor in factors) < 1e-5 and after.max() < 1 + 1e-6
    means = [factor.mean().item() for factor in factors]
    assert 0.5 <= min(means) < 0.65 and 1.35 < max(means) <= 1.5 + 1e-6
    before, after = intensities(size=size, contrast=0.5)
    mean = before.mean(tuple(range(2, before.ndim)), keepdim=True)
    inside = ((before - mean).abs() > 0.1) & (after > 1e-6) & (after < 1 - 1e-6)
    factors = [((after - mean) / (before - mean))[n][inside[n]] for n in range(40)]
    assert max(factor.std() for factor in factors) < 1e-5 and after.min() > -1e-6 and after.max() < 1 + 1e-6
    means = [factor.mean().item() for factor in factors]
    assert 0.5 <= min(means) < 0.65 and 1.35 < max(means) <= 1.5 + 1e-6


def test_gamma_and_bias_are_powers_and_fields_of_cubics():
    before, after = intensities(gamma=0.5)
    exponents = [(a.log() / b.log())[(b > 0.05) & (b < 0.9)] for a, b in zip(after, before, strict=True)]
    assert max(exponent.std() for exponent in exponents) < 1e-4
    logarithms = [exponent.mean().log().item() for exponent in exponents]
    assert -0.5 <= min(logarithms) < -0.4 and 0.4 < max(logarithms) <= 0.5
    torch.manual_seed(0)
    image = torch.rand(40, 2, *SIZE) + 0.5
    image[:, :, 0, 0, 0], image[:, :, 1, 0, 0] = 0, 2  # so that the minimum is 0, and the field is a ratio
    field = (intensity_view(image, bias=0.7, shares=(1, 0, 0)) / image).log().double()[:, :, 2:]
    assert 0.1 < field.std() < field.abs().max() <= 0.7 and torch.allclose(field[:, 0], field[:, 1], atol=1e-5)
    for axis in (2, 3, 4):
        assert field.diff(dim=axis).abs().max() > 0.01 and field.diff(n=4, dim=axis).abs().max() < 1e-4


def test_blur_and_noise_have_deviations_from_a_tenth_on():
    image = torch.zeros(40, 1, 41, 33)
    image[:, :, 20, 16] = 1
    torch.manual_seed(0)
    point = intensity_view(image, blur=2.0, shares=(0, 1, 0))[:, 0].double()
    torch.testing.assert_close(point.sum((1, 2)), torch.ones(40, dtype=torch.double), rtol=1e-5, atol=0)
    deviations = ((torch.arange(41) - 20) ** 2 * point.sum(2)).sum(1).sqrt()
    assert deviations.min() < 0.4 and 1.8 < deviations.max() <= 2 and deviations.mean() == pytest.approx(1, abs=0.25)
    noise = intensity_view(image, noise=1.0, shares=(0, 0, 1)) - image
    deviations = noise.flatten(1).std(1) / 0.9594  # of a normal variable clipped at two deviations
    assert 0.09 < deviations.min() < 0.2 and 0.9 < deviations.max() < 1.02
    assert (noise.flatten(1).abs().amax(1) / deviations).max() < 2.1


def test_what_is_drawn_for_an_image_is_left_out_as_often_as_asked_and_else_it_is_itself():
    torch.manual_seed(0)
    image = torch.rand(600, 1, 6, 5)
    for share, component in ((0.8, "brightness"), (0.8, "bias"), (0.5, "blur"), (0.2, "noise")):
        changed = (intensity_view(image, **{component: 1.0}) != image).flatten(1).any(1).double().mean()
        assert changed == pytest.approx(share, abs=0.06)
    assert torch.equal(intensity_view(image), image)
    everything = dict.fromkeys(("brightness", "contrast", "gamma", "bias", "blur"), 0.5)
    flat = torch.full((8, 1, 5, 5), 3.0)
    torch.testing.assert_close(intensity_view(flat, **everything), flat)
    assert intensity_view(image.bfloat16(), **everything, noise=1.0).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="floating point"):
        intensity_view(image.long())


# ------------------------------------------------------------------------------------------------------------ contract
@only_on_the_cpu
def test_all_off_is_the_input_itself_and_draws_nothing():
    image, labels = asymmetric(), torch.zeros(2, *SIZE, dtype=torch.int64)
    state = torch.get_rng_state()
    view = strong_view(image, OFF, labels)
    assert view.image is image
    assert view.labels is labels
    target, compared = view.align(image)
    assert torch.equal(target, image)
    assert compared.all()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_global_generator_decides_and_components_are_independent():
    image = asymmetric()

    def view(strengths, seed=3):
        torch.manual_seed(seed)
        np.random.seed(seed + 1)
        return strong_view(image, strengths, mix_images=image.flip(0))

    everything = view(Strengths())
    assert torch.equal(view(Strengths()).image, everything.image)
    assert not torch.equal(view(Strengths(), seed=4).image, everything.image)
    assert not torch.equal(everything.grid[0], everything.grid[1])
    both = view(dataclasses.replace(GEOMETRY, cutout=0.3, noise=1.0, gamma=1.0))
    assert torch.equal(both.grid, view(GEOMETRY).grid)
    assert torch.equal(both.compared, view(GEOMETRY).compared & view(only(cutout=0.3)).compared)


@pytest.mark.parametrize("size", [SIZE, (16, 16, 1), (5, 4)])
@pytest.mark.parametrize("value", [0.0, -3.0, 1e30])
def test_constant_images_stay_finite(size, value):
    image = torch.full((2, 1, *size), value)
    torch.manual_seed(0)
    view = strong_view(image, dataclasses.replace(Strengths(), noise=0.0), mix_images=image)
    torch.testing.assert_close(view.image, image)
    assert torch.isfinite(strong_view(image, Strengths(), mix_images=image).image).all()


def test_gradients_flow_to_the_student_alone():
    image, student, teacher = asymmetric(), linear_network(), linear_network()
    torch.manual_seed(0)
    for strengths in (Strengths(), only(noise=0.1)):
        view = strong_view(image, strengths, mix_images=image)
        target, compared = view.align(teacher(image))
        assert not target.requires_grad
        ((student(view.image) - target) ** 2 * compared).sum().backward()
    assert student.weight.grad.abs().sum() > 0
    assert teacher.weight.grad is None


def test_autocast_and_half_precision():
    image = asymmetric()

    def view(dtype=torch.float32):
        torch.manual_seed(0)
        return strong_view(image.to(dtype), Strengths(), mix_images=image)

    plain = view()
    with torch.autocast("cpu", torch.bfloat16):
        under = view()
        target, _ = under.align(linear_network()(image))
    assert torch.equal(under.image, plain.image)
    assert torch.equal(under.grid, plain.grid)
    assert target.dtype == torch.float32
    half = view(torch.bfloat16).image
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), plain.image, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "strengths", [{"rotation": -1}, {"scaling": 1}, {"elastic": 6.5}, {"cutout": 1.1}, {"noise": float("nan")}]
)
def test_strengths_outside_their_range_are_refused(strengths):
    with pytest.raises(ValueError, match=f"strength {next(iter(strengths))}="):
        Strengths(**strengths)


def test_shapes_that_do_not_fit_are_refused():
    image = asymmetric()
    with pytest.raises(ValueError, match="floating point"):
        strong_view(image.long(), OFF)
    with pytest.raises(ValueError, match="labels"):
        strong_view(image, OFF, labels=torch.zeros(2, 5, 5, 5))
    with pytest.raises(ValueError, match="mix_images"):
        strong_view(image, only(mixin=0.1))
    with pytest.raises(ValueError, match="mix_images"):
        strong_view(image, only(mixin=0.1), mix_images=image[:, :1])
    with pytest.raises(ValueError, match="mix_labels"):
        strong_view(image, only(mixin=0.1), mix_images=image, mix_labels=torch.zeros(1, *SIZE))
    with pytest.raises(ValueError, match="spacing"):
        strong_view(image, only(rotation=1), spacing=(1, 1))
    with pytest.raises(ValueError, match="outputs"):
        strong_view(image, GEOMETRY).align(image[..., 1:])
