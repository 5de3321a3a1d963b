"""Strong views of batches for the student, and the teacher's output in the same geometry.

The teacher sees a batch as it is. The student sees a strong view of it: rotated, scaled, deformed, blurred, noisy, with
boxes cut out or pasted from labelled images. `StrongView.align` applies the geometry of the view to the teacher's
output and says which voxels can be compared, so that each voxel shows both networks the same tissue:

    view = strong_view(unlabeled_batch, Strengths())
    outputs = model(view.image)
    target_logits, compared = view.align(ema_model(unlabeled_batch))

Weak and strong views: Sohn et al., "FixMatch", NeurIPS 2020 (arXiv:2001.07685); French et al., "Semi-supervised
semantic segmentation needs strong, varied perturbations", BMVC 2020 (arXiv:1906.01916). Boxes from labelled images:
Bai et al., "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation", CVPR 2023 (arXiv:2305.00673).

Batches are (N, C, W, H, D) or (N, C, W, H), on any device; labels (N, W, H, D) or (N, W, H). Everything random is drawn
independently for every sample of the batch: the noise from the global generator of the batch's device, all else from
PyTorch's global CPU generator, whatever the device.
"""

import math
from dataclasses import astuple, dataclass, fields

import torch
import torch.nn.functional as F

CONTROL_SPACING = 16  # voxels between the control points of the elastic deformation
# Choi and Lee, "Injectivity conditions of 2D and 3D uniform cubic B-spline functions", Graphical Models 2000: the
# deformation folds nowhere if no control point moves further than this along any axis.
LARGEST_ELASTIC = CONTROL_SPACING / 2.479472335
CUTOUT_BOXES = 3
# Arguments of `intensity_view` by the number of dimensions: of slices brightness and contrast change, as in UniMatch's
# code; of volumes, which it does not have, a scanner's field and the curve of the intensities.
UNIMATCH_VIEWS = {2: {"brightness": 0.5, "contrast": 0.5, "blur": 2.0}, 3: {"bias": 1.0, "gamma": 0.5, "blur": 2.0}}
TOLERANCE = 1e-4  # voxels: rounding must not put a patch's last voxels out of view


@dataclass(frozen=True)
class Strengths:
    """The largest amount of each component; 0 switches it off. Amounts are drawn uniformly, for each sample anew.

    rotation: degrees, 0 to 180: the largest angle, in either direction, about an axis in any direction
    scaling: 0 to below 1: a magnification between 1 - scaling and 1 + scaling, the same along all axes
    elastic: voxels, 0 to 6.4: the largest displacement of a control point along an axis. Control points lie 16 voxels
        apart, with cubic B-splines between them. Voxels move by at most this, and by about 0.2 of it along each axis as
        a root mean square
    gamma: at least 0: x -> x^g between each channel's minimum and maximum; g from 1 / (1 + gamma) to 1 + gamma, and
        log g uniform
    noise: at least 0, in units of the image's intensity: standard deviation of Gaussian noise
    blur: voxels, at least 0: standard deviation of a Gaussian kernel
    cutout: 0 to 1: share of the volume in three boxes, which are set to the mean of the image
    mixin: 0 to 1: share of the volume in a box, which is replaced by the same box of a labelled image
    in_plane: of volumes: rotation about D alone, scaling and deformation along W and H alone, the same in all slices,
        as nnU-Net has it for stacks whose slices lie far apart; no component by itself

    Raises ValueError for a number outside its range.
    """

    rotation: float = 15.0
    scaling: float = 0.15
    elastic: float = 4.0
    gamma: float = 0.5
    noise: float = 0.1
    blur: float = 1.0
    cutout: float = 0.2
    mixin: float = 0.2
    in_plane: bool = False

    def __post_init__(self):
        largest = {"rotation": 180, "scaling": 1, "elastic": LARGEST_ELASTIC, "cutout": 1, "mixin": 1}
        for field in fields(self):
            value, limit = getattr(self, field.name), largest.get(field.name, math.inf)
            if not (0 <= value <= limit and math.isfinite(value)) or (field.name == "scaling" and value == 1):
                wanted = f"between 0 and {limit:.4g}" if limit < math.inf else "a finite number of at least 0"
                wanted = "at least 0 and less than 1" if field.name == "scaling" else wanted
                raise ValueError(f"strength {field.name}={value} is not {wanted}")

    def __bool__(self):
        """Whether any component is on."""
        return any(astuple(self)[:-1])  # without in_plane


@dataclass
class StrongView:
    """What `strong_view` returns.

    image: (N, C, *spatial), the student's input
    labels: (N, *spatial), the class of each voxel of `image` where it is known, else the ignore index; None where no
        labels were given at all
    compared: bool (N, 1, *spatial), the voxels that come from the patch itself: in view, not cut out, not pasted
    grid: (N, *spatial, ndim), where each voxel comes from, as grid_sample reads it; None without geometry
    """

    image: torch.Tensor
    labels: torch.Tensor | None
    compared: torch.Tensor
    grid: torch.Tensor | None

    @torch.no_grad()
    def align(self, outputs):
        """(`outputs` in the geometry of `image`, `compared`); `outputs` are for the batch as it was, (N, K, *spatial).

        Logits or probabilities, interpolated linearly in float32, as the image is; no gradient flows. Without geometry
        the values are those given, bit for bit. Outside `compared` they mean nothing. Raises ValueError
        for outputs of another size.
        """
        if outputs.shape[0] != self.compared.shape[0] or outputs.shape[2:] != self.compared.shape[2:]:
            raise ValueError(f"outputs {tuple(outputs.shape)} for a view {tuple(self.image.shape)} of another size")
        if self.grid is None:
            return outputs.detach(), self.compared
        return _sample(outputs, self.grid, "bilinear"), self.compared


@torch.no_grad()
def strong_view(
    images, strengths, labels=None, mix_images=None, mix_labels=None, spacing=None, ignore_index=255, inside=None
):
    """A strong view of each image of a batch: geometry, pasted box, blur, gamma, noise, cut-out, in this order.

    `images`: floating point (N, C, *spatial). `labels`: integer (N, *spatial), which follow the geometry by nearest
    neighbour; voxels out of view or cut out get `ignore_index`. `mix_images` (M, C, *spatial): boxes are pasted from
    one of these, drawn for each sample, at the same position. `mix_labels` (M, *spatial): their labels, which the
    labels of the view then contain, so that the supervised loss can use pasted voxels in their new surroundings. The
    teacher never saw pasted voxels: they are not compared.

    `spacing`: the size of a voxel along each spatial axis, in any unit; by default all sides are equal. Rotations are
    rotations in this space, about an axis in any direction; of 2-D images, in the plane. `elastic` then counts voxels
    of the finest axis. Outside the patch its mirror image is sampled. `inside`, bool (N, 1, *spatial): the voxels that
    are not padding; only those are compared that come from such alone.

    With all strengths 0 nothing is drawn, and image and labels of the view are the given tensors themselves. What one
    component draws does not depend on the strengths of the others. Raises ValueError where shapes do not fit.
    """
    _check(images, strengths, labels, mix_images, mix_labels, spacing)
    number, size, device = images.shape[0], images.shape[2:], images.device
    compared = torch.ones((number, 1, *size), dtype=torch.bool, device=device) if inside is None else inside
    if not strengths:
        return StrongView(images, labels, compared, None)

    cpu = {"device": "cpu", "dtype": torch.float64}
    plane = torch.randn(number, len(size), len(size), **cpu)
    angle, scale, gamma, noise, blur, partner = torch.rand(6, number, **cpu)
    mix_box = torch.rand(1, number, 1 + len(size), **cpu)
    cut_boxes = torch.rand(CUTOUT_BOXES, number, 1 + len(size), **cpu)
    control = torch.rand(number, len(size), *[(side - 1) // CONTROL_SPACING + 4 for side in size], **cpu)

    view, grid = images.float(), None
    if strengths.rotation or strengths.scaling or strengths.elastic:
        sides = torch.as_tensor([1.0] * len(size) if spacing is None else spacing, **cpu)
        if flat := strengths.in_plane and len(size) == 3:
            plane[:, 2], plane[:, :, 2] = 0, 0
        turned = rotation_matrix(plane, math.radians(strengths.rotation) * (2 * angle - 1))
        magnification = (1 + strengths.scaling * (2 * scale - 1))[:, None].repeat(1, len(size))
        reach = strengths.elastic * sides.min() / sides
        if flat:
            magnification[:, 2], reach[2], control = 1, 0, control[..., :1].expand(control.shape)
        matrix = turned * sides / sides[:, None] / magnification[:, :, None]
        control = reach.view(-1, *[1] * len(size)) * (2 * control - 1) if strengths.elastic else None
        grid, in_view = sampling_grid(size, matrix, control, device)
        view = _sample(view, grid, "bilinear")
        if inside is not None:
            compared = _sample(inside, grid, "bilinear") > 1 - TOLERANCE
        compared = compared & in_view
        if labels is not None:
            moved = _sample(labels[:, None], grid, "nearest")[:, 0].to(labels.dtype)
            labels = moved.masked_fill(~in_view[:, 0], ignore_index)

    if strengths.mixin:
        box = _boxes(mix_box, size, strengths.mixin, device)
        partner = (partner * len(mix_images)).long().to(device, non_blocking=True)
        view = torch.where(box, mix_images[partner].float(), view)
        compared = compared & ~box
        if mix_labels is not None:
            labels = mix_labels.new_full((number, *size), ignore_index) if labels is None else labels
            labels = torch.where(box[:, 0], mix_labels[partner], labels)
        elif labels is not None:
            labels = labels.masked_fill(box[:, 0], ignore_index)

    axes = tuple(range(2, images.ndim))
    if strengths.blur:
        view = gaussian_blur(view, strengths.blur * blur)
    if strengths.gamma:
        exponent = torch.exp(math.log1p(strengths.gamma) * (2 * gamma - 1))
        unit, low, extent = _unit(view)
        view = low + extent * unit ** _per_sample(exponent, view)
    if strengths.noise:
        view = view + _per_sample(strengths.noise * noise, view) * torch.randn(view.shape, device=device)
    if strengths.cutout:
        boxes = _boxes(cut_boxes, size, strengths.cutout, device)
        view = torch.where(boxes, view.mean(axes, keepdim=True), view)
        compared = compared & ~boxes
        if labels is not None:
            labels = labels.masked_fill(boxes[:, 0], ignore_index)
    return StrongView(view.to(images.dtype), labels, compared, grid)


@torch.no_grad()
def intensity_view(
    images, brightness=0.0, contrast=0.0, gamma=0.0, bias=0.0, blur=0.0, noise=0.0, shares=(0.8, 0.5, 0.2)
):
    """A view of each image (N, C, *spatial) with other intensities and the same geometry; 0 switches a component off.

    With probability shares[0] an image x, from 0 to 1 between each channel's minimum and maximum, becomes in turn
    x b, clipped to 0..1, b from 1 - brightness to 1 + brightness; mean + c (x - mean), clipped, c likewise by
    `contrast`; x exp(f), f a cubic in each coordinate with values between -bias and bias (an MR scanner's bias field);
    x^g, log g from -gamma to gamma. With shares[1] it is blurred with a deviation from 0.1 to `blur` voxels. With
    shares[2] it gets Gaussian noise, with a deviation from 0.1 to `noise` of the image's unit, clipped at twice that.
    """
    if images.ndim not in (4, 5) or not images.is_floating_point():
        raise ValueError(f"images are floating point (N, C, *spatial), not {images.dtype} {tuple(images.shape)}")
    number, size, cpu = len(images), images.shape[2:], {"device": "cpu", "dtype": torch.float64}
    jittered, blurred, noisy = torch.rand(3, number, **cpu) < torch.tensor(shares, **cpu)[:, None]
    *signed, width, deviation = torch.rand(5, number, **cpu)
    b, c, g = (_per_sample(2 * draw - 1, images.float()) for draw in signed)
    field = torch.rand(number, 1, *[4] * len(size), **cpu)

    view = images.float()
    unit, low, extent = _unit(view)
    if brightness:
        unit = (unit * (1 + brightness * b)).clamp(0, 1)
    if contrast:
        mean = unit.mean(tuple(range(2, images.ndim)), keepdim=True)
        unit = (mean + (1 + contrast * c) * (unit - mean)).clamp(0, 1)
    if bias:
        unit = unit * torch.exp(_spline(bias * (2 * field - 1), size, size, images.device))
    if gamma:
        unit = unit ** torch.exp(gamma * g)
    if brightness or contrast or bias or gamma:
        view = torch.where(_per_sample(jittered, view).bool(), low + extent * unit, view)
    if blur:
        view = gaussian_blur(view, (0.1 + (blur - 0.1) * width) * blurred)
    if noise:
        deviation = _per_sample((0.1 + (noise - 0.1) * deviation) * noisy, view)
        view = view + deviation * torch.randn(view.shape, device=view.device).clamp(-2, 2)
    return view.to(images.dtype)


def rotation_matrix(plane, angle):
    """Rotations exp(angle K), (N, ndim, ndim), by `angle` (N,) in radians; K is `plane` - its transpose, normalised.

    `plane` (N, ndim, ndim): with normally distributed entries every direction of the axis is equally likely. In two
    dimensions there is only one plane, and the entries of `plane` decide the sense of rotation.
    """
    skew = plane - plane.mT
    skew = skew * (math.sqrt(2) / torch.linalg.matrix_norm(skew, keepdim=True))
    return torch.linalg.matrix_exp(angle[:, None, None] * skew)


def sampling_grid(size, matrix, control=None, device="cpu"):
    """Where each voxel p of a view comes from: q = c + matrix (p + u(p) - c), c the middle of the patch.

    `size`: voxels along each axis. `matrix` (N, ndim, ndim), in voxels. `control` (N, ndim, *points): displacements in
    voxels along each axis at the control points of u, a uniform cubic B-spline (Rueckert et al., "Nonrigid registration
    using free-form deformations", IEEE TMI 1999); an axis has (side - 1) // CONTROL_SPACING + 4 points, and point k
    lies at voxel (k - 1) CONTROL_SPACING.

    Returns `grid`, float32 (N, *size, ndim) for grid_sample with align_corners=False, and `in_view`, bool
    (N, 1, *size): True where q lies between the centres of the first and the last voxels of the patch, so that only
    voxels of the patch are interpolated there.
    """

    def per_sample(values):
        return values.float().to(device, non_blocking=True).view(-1, *[1] * len(size))

    from_middle = [
        (torch.arange(side, device=device) - (side - 1) / 2).view(-1, *[1] * (len(size) - axis - 1))
        for axis, side in enumerate(size)
    ]
    if control is not None:
        move = _spline(control, size, [CONTROL_SPACING] * len(size), device)
        from_middle = [f + m for f, m in zip(from_middle, move.unbind(1), strict=True)]
    in_view, grid = True, []
    for side, row in zip(size, matrix.unbind(1), strict=True):
        # A sum, not a matrix product: TF32 would round the coordinates.
        source = sum(per_sample(entry) * f for entry, f in zip(row.unbind(1), from_middle, strict=True))
        in_view = in_view & (source.abs() <= (side - 1) / 2 + TOLERANCE)
        grid.append(source * (2 / side))
    return torch.stack(grid[::-1], dim=-1), in_view[:, None]


def gaussian_blur(images, sigma):
    """Convolve every channel of `images` (N, C, *spatial) with a Gaussian of standard deviation `sigma` (N,) in voxels.

    The kernel is sampled at voxel centres and sums to 1 over the voxels inside the image, at its border too. A
    deviation of 0 changes nothing.
    """
    variance = sigma.double().square().clamp(min=1e-9).view(-1, 1, 1)
    for side in images.shape[2:]:
        position = torch.arange(side, dtype=torch.float64)
        kernel = torch.softmax(-(position[:, None] - position).square() / (2 * variance.cpu()), dim=-1)
        images = _multiply("ncp...,nsp->nc...s", images, kernel.to(images.device, images.dtype, non_blocking=True))
    return images


def _spline(control, size, spacing, device):
    """The cubic B-spline with control points (N, C, *points), so many voxels apart along each axis, at each voxel."""
    values = control.float().to(device, non_blocking=True)
    for side, step in zip(size, spacing, strict=True):
        # Each product turns the first of the spatial axes into the last: after the last one they are in order.
        values = _multiply("ncp...,sp->nc...s", values, _bspline(side, step).to(device, non_blocking=True))
    return values


def _bspline(side, spacing):
    """The weight of each control point at each voxel, (side, points)."""
    points = (side - 1) // spacing + 4
    distance = (torch.arange(side)[:, None] / spacing + 1 - torch.arange(points)).abs()
    inner = 2 / 3 - distance**2 + distance**3 / 2
    return torch.where(distance < 1, inner, (2 - distance).clamp(min=0) ** 3 / 6)


def _unit(images):
    """`images` from 0 to 1 between each channel's minimum and maximum; the minimum; the maximum less the minimum."""
    axes = tuple(range(2, images.ndim))
    low, high = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
    return (images - low) / (high - low).clamp(min=torch.finfo(images.dtype).tiny), low, high - low


def _boxes(draw, size, share, device):
    """Bool (N, 1, *size), True in boxes with the proportions of the volume, together at most `share` of it in a sample.

    `draw` (boxes, N, 1 + ndim), uniform in [0, 1): the size of each box, and its position along each axis.
    """
    draw = draw.float().to(device, non_blocking=True)
    extent = (draw[..., 0] * (share / len(draw))) ** (1 / len(size))
    inside = True
    for axis, side in enumerate(size):
        first = draw[..., 1 + axis] * (1 - extent) * side
        centre = torch.arange(side, device=device) + 0.5
        along = (centre >= first[..., None]) & (centre < (first + extent * side)[..., None])
        inside = inside & along.view(*along.shape[:2], 1, *[1] * axis, side, *[1] * (len(size) - axis - 1))
    return inside.any(dim=0)


def _sample(values, grid, mode):
    return F.grid_sample(values.float(), grid, mode=mode, padding_mode="reflection", align_corners=False)


def _per_sample(values, like):
    return values.to(like.device, like.dtype, non_blocking=True).view(-1, *[1] * (like.ndim - 1))


def _multiply(equation, values, matrix):
    with torch.autocast(values.device.type, enabled=False):
        return torch.einsum(equation, values, matrix)


def _check(images, strengths, labels, mix_images, mix_labels, spacing):
    shape = tuple(images.shape)
    if images.ndim not in (4, 5) or not images.is_floating_point():
        raise ValueError(f"images are floating point (N, C, W, H, D) or (N, C, W, H), not {images.dtype} {shape}")
    if labels is not None and tuple(labels.shape) != (shape[0], *shape[2:]):
        raise ValueError(f"labels {tuple(labels.shape)} for images {shape}")
    if strengths.mixin and (mix_images is None or not len(mix_images)):
        raise ValueError(f"strength mixin={strengths.mixin} needs mix_images to paste from")
    if mix_images is not None and tuple(mix_images.shape[1:]) != shape[1:]:
        raise ValueError(f"mix_images {tuple(mix_images.shape)} for images {shape}")
    if mix_labels is not None and (mix_images is None or mix_labels.shape != mix_images[:, 0].shape):
        raise ValueError(f"mix_labels {tuple(mix_labels.shape)} are not those of mix_images")
    if spacing is not None and (len(spacing) != images.ndim - 2 or not all(side > 0 for side in spacing)):
        raise ValueError(f"spacing {spacing} for images {shape}: one positive size for each spatial axis")
