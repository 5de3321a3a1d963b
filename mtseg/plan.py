"""A plan read off a data set: spacing, normalisation, patch, batch, strides and kernels, by nnU-Net v2's rules.

Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", Nature
Methods 18 (2021), and "nnU-Net Revisited", MICCAI 2024 (arXiv:2404.09556). Sizes, spacings, strides and kernels are
along the axes of the arrays: (W, H, D) of volumes, D across the slices, (H, W) of images. The 2-D plan of volumes is
that of their slices along D: nnU-Net's are along the coarsest axis, which D is of stacks.
"""

import math

import numpy as np

REFERENCE = {3: (560e6, 2), 2: (85e6, 12)}  # feature-map elements that 8 GB hold, of a batch of so many patches
WHOLE = {3: 256**3, 2: 2048**2}  # voxels of the patch that shrinking begins with
COARSE = 3  # times coarser than the other axes: that axis is treated apart
SMALLEST = 4  # voxels that a side keeps at the network's bottom
MASKED = 3 / 4  # of a scan, left by the crop: below that, statistics are over what is not 0
MOST_FILTERS = {3: 320, 2: 512}
N_FILTERS = {"unet": 32, "vnet": 16}
LARGEST = 1e30
# nnU-Net's words for a channel's normalisation, where it is neither CT nor the image's own z-score: [low, high, shift,
# scale], or the name of one that looks at each image.
CHANNEL_NAMES = {"nonorm": [-LARGEST, LARGEST, 0, 1], "rescale_to_0_1": "minmax", "rgb_to_0_1": [0, 255, 0, 255]}


class PlanError(ValueError):
    """A data set of which no plan can be made, or a file that is no plan; the message is one sentence."""


def fingerprint(cases, labeled, voxels=10**7):
    """What a plan needs to know of a data set, as JSON holds it; one case is in memory at a time.

    `cases`: (image, label, spacing) triples: numbers (*spatial) or (C, *spatial); an array (*spatial) with the
    foreground above 0, or None where the label is hidden or there is none; the size of a voxel along each spatial axis.
    `labeled`: how many of them have a label. `voxels`: so many of the foreground are looked at, an equal share of each
    labelled case, drawn with replacement (nnU-Net: 10**8).

    Returns {'shapes', 'spacings': a list a case, the shape of its box of what is not 0 in a channel, 'channels': int,
    'kept': median share of a scan in that box, 'intensities': [{'mean', 'std', 'median', 'min', 'max', 'low', 'high'},
    ...], one a channel, low and high the 0.5th and 99.5th percentile; [] where no case has a foreground}. Raises
    PlanError.
    """
    shapes, spacings, kept, samples, channels = [], [], [], [], set()
    for number, (image, label, spacing) in enumerate(cases, start=1):
        spacing = [float(width) for width in spacing]
        if not all(0 < width < math.inf for width in spacing):
            raise PlanError(f"the spacing of case {number} is {spacing}, but widths of voxels are above 0; repair it")
        image = np.asarray(image)
        image = image.reshape(-1, *image.shape[-len(spacing) :])
        shape = np.array(image.shape[1:])
        channels.add(len(image))
        size = nonzero_size(image)
        shapes.append(size.tolist())
        spacings.append(spacing)
        kept.append(size.prod() / shape.prod())
        foreground = None if label is None else np.flatnonzero(np.asarray(label) > 0)
        if foreground is not None and foreground.size:
            # The same draw for every case: none depends on which cases come before it.
            drawn = foreground[np.random.default_rng(1234).integers(foreground.size, size=max(voxels // labeled, 1))]
            samples.append(np.stack([channel.ravel()[drawn] for channel in image]).astype(np.float32))
    if len(channels) != 1:
        raise PlanError(f"the cases have {sorted(channels)} channels; give cases that have equally many")
    intensities = []
    for channel in range(next(iter(channels)) if samples else 0):
        values = np.concatenate([sample[channel] for sample in samples]).astype(float)
        low, median, high = np.percentile(values, (0.5, 50, 99.5))
        entry = {"mean": values.mean(), "std": values.std(), "median": median, "min": values.min()}
        entry |= {"max": values.max(), "low": low, "high": high}
        intensities.append({name: float(value) for name, value in entry.items()})
    found = {"shapes": shapes, "spacings": spacings, "channels": next(iter(channels))}
    return found | {"kept": float(np.median(kept)), "intensities": intensities}


def nonzero_size(image):
    """The sides of the smallest box of a (C, *spatial) `image` that holds all voxels at which a channel is not 0."""
    mask = (image != 0).any(axis=0)
    if not mask.any():
        return np.array(mask.shape)
    places = (mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)) for axis in range(mask.ndim))
    return np.array([np.ptp(np.flatnonzero(place)) + 1 for place in places])


def target_spacing(spacings, shapes):
    """The spacing to resample to: the median along each axis, of cases with these spacings and shapes.

    Where one axis is more than COARSE times coarser than the others, and has more than COARSE times fewer voxels, it
    gets the 10th percentile, so that few cases lose slices, but never less than the others.
    """
    spacing, size = np.median(spacings, axis=0), np.median(shapes, axis=0)
    coarse = int(spacing.argmax())
    others = np.delete(spacing, coarse)
    if spacing[coarse] > COARSE * others.max() and size[coarse] * COARSE < np.delete(size, coarse).min():
        fine = np.percentile(np.array(spacings)[:, coarse], 10)
        spacing[coarse] = fine if fine >= others.max() else others.max() + 1e-5
    return spacing


def topology(spacing, patch, depth=None):
    """(strides, kernel sizes, patch) of the network for a patch of this size: a tuple of numbers for each downsampling;
    one for each level, that is one more; the patch, padded to what the strides divide.

    An axis is halved while it has 2 * SMALLEST voxels (alone 3 * SMALLEST) and is not twice as coarse as the finest
    such axis. Kernels are 1 along an axis as long as it is twice as coarse as the finest of all, then 3, and 3 at the
    bottom. `depth`: so many downsamplings, as a V-Net has; those too many have strides of 1.
    """
    spacing, size = np.array(spacing, dtype=float), np.array(patch, dtype=float)
    kernel, strides, kernels = np.ones(len(size), int), [], []
    while depth is None or len(strides) < depth:
        large = size >= 2 * SMALLEST
        halved = large & (spacing < 2 * spacing[large].min(initial=math.inf))
        if not halved.any() or (halved.sum() == 1 and size[halved] < 3 * SMALLEST):
            break
        kernel[spacing < 2 * spacing.min()] = 3
        kernels.append(tuple(kernel.tolist()))
        strides.append(tuple(np.where(halved, 2, 1).tolist()))
        spacing[halved] *= 2
        size[halved] = np.ceil(size[halved] / 2)
    missing = (depth or len(strides)) - len(strides)
    three = (3,) * len(size)
    strides, kernels = strides + [(1,) * len(size)] * missing, kernels + [three] * (missing + 1)
    divisors = divisors_of(strides, len(size))
    return strides, kernels, (np.ceil(np.array(patch) / divisors) * divisors).astype(int)


def divisors_of(strides, dims):
    """What the sides of a patch must be multiples of: the product of the strides along each of `dims` axes."""
    return np.prod(np.reshape(strides, (-1, dims)), axis=0, dtype=int)


def feature_map_elements(patch, strides, features, convs, decoder_convs, classes, residual=False):
    """The numbers that the convolutions of a U-Net put out for one patch: what its memory grows with.

    `features`: channels of each level. `convs`: convolutions of each level of the encoder; with `residual`, blocks,
    each of two and, where channels or size change, a third, and one convolution before the first level.
    `decoder_convs`: of each level of the decoder, which has a transposed convolution and a head beside.
    """
    sizes = np.cumprod([[1] * len(patch), *strides], axis=0)
    voxels = [math.prod(-(-np.array(patch) // size)) for size in sizes]
    total = features[0] * voxels[0] if residual else 0
    for level, (here, number, count) in enumerate(zip(features, voxels, convs, strict=True)):
        # A level's first block changes the size, or at least the channels; that of the first level neither.
        total += here * number * (2 * count + (level > 0) if residual else count)
    for here, number, count in zip(features, voxels, decoder_convs, strict=False):
        total += number * (here * (count + 1) + classes)
    return int(total)


def plan(
    found,
    dims=3,
    num_classes=2,
    memory_gb=8,
    batch_cap=0.05,
    max_patch=None,
    network="unet",
    n_filters=None,
    names=None,
):
    """The plan of a data set, as JSON holds it: flags of the training scripts, and what preparing needs.

    `found`: from `fingerprint`. `memory_gb`: of the device; patch and batch grow with it. `batch_cap`: the largest
    share of all training voxels in a batch, None for none. `max_patch`: the longest side of a patch. `network`: unet,
    or vnet, which has four downsamplings. `n_filters`: on its finest level (default: N_FILTERS). `names`: of the
    channels, 'CT', one of CHANNEL_NAMES, or any other for the z-score of each image. Memory is that of nnU-Net's
    network, of two convolutions a level, whichever is trained. Raises PlanError.
    """
    if dims > len(found["shapes"][0]):
        raise PlanError("the data set holds images, of which there is no 3-D plan; take dims 2")
    spacing = target_spacing(found["spacings"], found["shapes"])
    shapes = np.rint(np.array(found["shapes"]) * found["spacings"] / spacing)
    median = np.median(shapes, axis=0)
    n_filters, most, depth = n_filters or N_FILTERS[network], MOST_FILTERS[dims], 4 if network == "vnet" else None
    reference, reference_batch = REFERENCE[dims]
    reference *= memory_gb / 8
    wide, size = spacing[:dims], median[:dims]
    patch = np.minimum(np.rint((WHOLE[dims] * wide.prod()) ** (1 / dims) / wide), size)
    while True:
        strides, kernels, patch = topology(wide, patch, depth)
        features = [min(n_filters * 2**level, most) for level in range(len(kernels))]
        convs = [2] * len(features)
        elements = feature_map_elements(patch, strides, features, convs, convs[1:], num_classes)
        longer = patch > (max_patch or math.inf)
        if elements * 2 / reference_batch <= reference and not longer.any():
            break
        axis = int((patch / size + patch.max() * longer).argmax())
        # Where the patch without the last part is halved less often, less is taken away: from 256 comes 224, not 192.
        smaller = patch - np.where(np.arange(dims) == axis, divisors_of(strides, dims)[axis], 0)
        if smaller[axis] < SMALLEST:
            raise PlanError(
                f"a patch of {words(patch)} is too large for memory_gb {memory_gb:g} or max_patch {max_patch}, and "
                f"cannot be smaller; give more, or fewer n_filters than {n_filters}"
            )
        patch[axis] -= divisors_of(topology(wide, smaller, depth)[0], dims)[axis]
    if not strides:
        raise PlanError(f"a patch of {words(patch)} cannot be halved once; give larger cases, or more memory_gb")
    held = round(reference / elements * reference_batch)
    cap = held if batch_cap is None else round(batch_cap * median.prod() * len(shapes) / patch.prod())
    batch = max(min(held, cap), 2)

    result = {"dims": dims, "num_classes": num_classes, "network": network, "n_filters": n_filters}
    result |= {"max_filters": most, "normalization": "instancenorm", "patch_size": patch.tolist()}
    result |= {"batch_size": batch, "labeled_bs": batch // 2}
    result |= {"strides": list(map(list, strides)), "kernel_sizes": list(map(list, kernels))}
    result |= {"stride_xy": max(int(patch[:2].min()) // 2, 1), "ignore_padding": bool((shapes[:, :dims] < patch).any())}
    if dims == 3:
        result |= {"stride_z": max(int(patch[2]) // 2, 1), "in_plane": bool(patch.max() > COARSE * patch[2])}
    result |= {"spacing": spacing.tolist(), "crop": "nonzero", "over": "nonzero" if found["kept"] < MASKED else "all"}
    result["by_channel"] = normalizations(found, names)
    made_from = {name: np.median(found[f"{name}s"], axis=0).tolist() for name in ("shape", "spacing")}
    made_from |= {"cases": len(shapes), "channels": found["channels"], "intensities": found["intensities"]}
    made_from |= {"resampled_shape": median.tolist(), "memory_gb": memory_gb, "batch_cap": batch_cap}
    result["made_from"] = made_from | {"max_patch": max_patch, "feature_map_elements": elements}
    result["why"] = reasons(result, held, cap)
    return result


def normalizations(found, names=None):
    """Of each channel 'zscore' or 'minmax', of each image, or [low, high, shift, scale], the same for all images."""
    names = [name.lower() for name in names or ["?"] * found["channels"]]
    if len(names) != found["channels"]:
        raise PlanError(f"{len(names)} channels have names ({', '.join(names)}), but there are {found['channels']}")
    if "ct" in names and not found["intensities"]:
        raise PlanError("no label has a foreground, whose values would say how CT is normalised; give labelled cases")
    rows = [[c["low"], c["high"], c["mean"], max(c["std"], 1e-8)] for c in found["intensities"]] or names
    return [row if name == "ct" else CHANNEL_NAMES.get(name, "zscore") for name, row in zip(names, rows, strict=True)]


def reasons(plan, held, cap):
    """{what: what was decided and why, a sentence} of a plan, for a person. `held`, `cap`: the batches that the memory
    and the share of all voxels allow."""
    made, patch, dims = plan["made_from"], plan["patch_size"], plan["dims"]
    median = np.allclose(plan["spacing"], made["spacing"])
    apart = ", along the coarse axis the 10th percentile, so that few of them lose slices"
    over = {"nonzero": "what is not 0, since the crop cannot take all that is 0 away", "all": "all its voxels"}
    fixed = "clipped to {0:.4g} and {1:.4g}, less {2:.4g}, over {3:.4g}: the 0.5th and 99.5th percentile, mean and "
    fixed += "deviation of all foreground, since a value of CT means the same in every scan"
    rows = [f"{k} of each image over {over[plan['over']]}" if isinstance(k, str) else k for k in plan["by_channel"]]
    rows = ["by the channel's name" if row in CHANNEL_NAMES.values() else row for row in rows]
    rows = dict.fromkeys(row if isinstance(row, str) else fixed.format(*row) for row in rows)
    halved = [sum(stride == 2 for stride in along) for along in zip(*plan["strides"], strict=True)]
    thin = any(1 in kernel for kernel in plan["kernel_sizes"])
    limit = "the memory holds so many" if held <= cap else f"more would be over {made['batch_cap']} of all voxels"
    half = [plan["stride_xy"]] * 2 + ([plan["stride_z"]] if dims == 3 else [])
    why = {
        "spacing": f"{words(plan['spacing'])} mm: the median of the cases{'' if median else apart}",
        "normalisation": "; ".join(rows),
        "patch": f"{words(patch)} voxels: the largest of the median case's shape ({words(made['resampled_shape'])}) "
        f"that the memory holds, in multiples of what the strides divide",
        "strides": f"{words(halved)} halvings: each axis while {SMALLEST} voxels are left and it is not twice as "
        f"coarse as the finest one",
        "kernels": "1 along an axis as long as it is twice as coarse as the finest one, then 3" if thin else "3",
        "channels": f"{plan['n_filters']} at the finest of {len(plan['kernel_sizes'])} levels, then twice "
        f"as many each, up to {plan['max_filters']}",
        "batch": f"{plan['batch_size']} patches: {limit if min(held, cap) >= 2 else 'the smallest batch'}",
        "windows": f"{words(half)} voxels from one to the next: half a patch",
        "memory": f"{made['memory_gb']:g} GB: nnU-Net's network, of two convolutions a level, puts out "
        f"{made['feature_map_elements'] / 1e6:.1f} million numbers a patch",
    }
    if plan["ignore_padding"]:
        why["padding"] = "counts in no loss: some cases are smaller than the patch"
    if plan.get("in_plane"):
        why["strong views"] = "turned and deformed in the W-H plane alone: a patch has few slices"
    return why


def words(sides):
    """'160 x 160 x 64' and the like."""
    return " x ".join(f"{side:.4g}" for side in sides)
