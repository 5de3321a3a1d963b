"""nnU-Net v2's nnUNetPlans.json, written from a plan of plan.py and read as one.

nnU-Net orders the axes of a NIfTI file (D, H, W), and puts the coarsest one first (`transpose_forward`); here they are
those of the arrays, (W, H, D). What its network has and ours has not (strided convolutions, deep supervision) is not
carried over, nor is what its other planners choose (blocks with more than two convolutions).
"""

import numpy as np

SCHEMES = {"zscore": "ZScoreNormalization", "minmax": "RescaleTo01Normalization"}
CT, NONE, RGB = "CTNormalization", "NoNormalization", "RGBTo01Normalization"
ROWS = {NONE: [-1e30, 1e30, 0, 1], RGB: [0, 255, 0, 255]}
KINDS = {2: "2d", 3: "3d_fullres"}
INTENSITIES = {"mean": "mean", "std": "std", "median": "median", "min": "min", "max": "max"}
INTENSITIES |= {"low": "percentile_00_5", "high": "percentile_99_5"}


class NnUnetPlanError(ValueError):
    """A file that is no nnUNetPlans.json, or has no such configuration; the message is one sentence without its name"""


def to_nnunet(plan, axes=(2, 1, 0)):
    """The nnUNetPlans.json of a `plan`, as JSON holds it, with the one configuration that the plan is.

    `axes`: which axis of nnU-Net's arrays each axis of ours is: (2, 1, 0) for volumes (W, H, D), (1, 2) for images
    (H, W), whose first axis there has one pixel.
    """
    dims, strides = plan["dims"], plan["strides"]
    spacing = np.full(3, 999.0)
    spacing[list(axes)] = plan["spacing"]
    coarse = int(spacing.argmax()) if dims == len(axes) else axes[-1]  # the 2-D plan's slices are along D
    forward = [coarse, *(axis for axis in range(3) if axis != coarse)]
    order = [axes.index(axis) for axis in forward if axis in axes][-dims:]  # of ours, along nnU-Net's axes

    def turned(sides):
        return [sides[axis] for axis in order]

    rows = plan["by_channel"]
    known = {tuple(row): name for name, row in ROWS.items()}
    names = [SCHEMES[row] if isinstance(row, str) else known.get(tuple(row), CT) for row in rows]
    features = [min(plan["n_filters"] * 2**i, plan["max_filters"]) for i in range(len(strides) + 1)]
    network = {"n_stages": len(features), "features_per_stage": features}
    network |= {"kernel_sizes": list(map(turned, plan["kernel_sizes"]))}
    network |= {"strides": [[1] * dims, *map(turned, strides)]}
    network |= {"n_conv_per_stage": [2] * len(features), "n_conv_per_stage_decoder": [2] * len(strides)}
    classes = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    configuration = {
        "batch_size": plan["batch_size"],
        "patch_size": turned(plan["patch_size"]),
        "median_image_size_in_voxels": turned(plan["made_from"]["resampled_shape"]),
        "spacing": turned(plan["spacing"]),
        "normalization_schemes": names,
        "use_mask_for_norm": [name != CT and plan["over"] == "nonzero" for name in names],
        "architecture": {"network_class_name": classes, "arch_kwargs": network},
    }
    intensities = [{INTENSITIES[name]: value for name, value in c.items()} for c in plan["made_from"]["intensities"]]
    return {
        "plans_name": "nnUNetPlans",
        "transpose_forward": forward,
        "transpose_backward": np.argsort(forward).tolist(),
        "configurations": {KINDS[dims]: configuration},
        "foreground_intensity_properties_per_channel": {str(i): entry for i, entry in enumerate(intensities)},
    }


def from_nnunet(content, dims=3, axes=(2, 1, 0)):
    """The plan in an nnUNetPlans.json: its configuration 3d_fullres, or with `dims` 2 its 2d. `content`: as JSON gave;
    `axes`: as in `to_nnunet`. num_classes, which the file does not say, is missing. Raises NnUnetPlanError."""
    try:
        configuration = content["configurations"][KINDS[dims]]
        forward, network = content["transpose_forward"], configuration["architecture"]["arch_kwargs"]
        along = [axis for axis in forward if axis in axes][-dims:]
        if sorted(axes.index(axis) for axis in along) != list(range(dims)):
            raise NnUnetPlanError("its slices are not along D; take the 3-D plan, --dims 3")
        order = np.argsort([axes.index(axis) for axis in along])

        def turned(sides):
            return [sides[axis] for axis in order]

        features = network["features_per_stage"]
        result = {"dims": dims, "network": "unet", "n_filters": features[0], "max_filters": max(features)}
        result |= {"normalization": "instancenorm", "patch_size": turned(configuration["patch_size"])}
        result |= {"batch_size": configuration["batch_size"], "labeled_bs": configuration["batch_size"] // 2}
        result |= {"strides": [turned(stride) for stride in network["strides"][1:]]}
        result |= {"kernel_sizes": [turned(kernel) for kernel in network["kernel_sizes"]]}
        patch = result["patch_size"]
        result |= {"stride_xy": max(min(patch[:2]) // 2, 1)}
        result |= {"stride_z": max(patch[2] // 2, 1)} if dims == 3 else {}
        result |= {"spacing": turned(configuration["spacing"]), "crop": "nonzero"}
        result["over"] = "nonzero" if any(configuration["use_mask_for_norm"]) else "all"
        rows, found = {name: row for row, name in SCHEMES.items()} | ROWS, []
        for number, scheme in enumerate(configuration["normalization_schemes"]):
            told = content["foreground_intensity_properties_per_channel"].get(str(number))
            found += [{name: told[theirs] for name, theirs in INTENSITIES.items()}] if told else []
            rows[CT] = [found[-1][name] for name in ("low", "high", "mean", "std")] if told else None
            result.setdefault("by_channel", []).append(rows.get(scheme, "zscore"))
        result["made_from"] = {"channels": len(result["by_channel"]), "intensities": found}
        return result
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise NnUnetPlanError(f"no nnU-Net plan with a configuration {KINDS[dims]} ({error!r})") from error
