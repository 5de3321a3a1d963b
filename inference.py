"""Segment the cases of a list with a trained network and measure the result against their labels.

    python inference.py --model_path model/LA_vnet_25_labeled/MT/iter_6000.pth
    python inference.py --model_path model/LA_vnet_25_labeled/MT/ema_iter_6000.pth --save_result predictions
    python inference.py --model_path theirs.pth --root_path /data/LA --n_filters 16       # weights without config.json

Prints a row per case and mean (standard deviation), and writes metrics.csv and metrics.json into
<folder of the checkpoint>/<its name>_<split>/. Settings come from the flags, else from the run's config.json beside
the checkpoint, else they are those of the UA-MT protocol: windows of 112 x 112 x 80 voxels, strides 18 and 4.
"""

import gzip
import io
import json
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from data.make_phantom import PhantomError, make_phantom
from mtseg.checkpoint import CheckpointError, file_sha256, load_checkpoint, load_weights, write_whole
from mtseg.datasets import DataError, LAHeart
from mtseg.flags import FlagError, Parser, classes, one_sentence, patch_side, positive, read_config
from mtseg.metrics import calculate_metric_percase
from mtseg.networks.unet import UNet
from mtseg.networks.vnet import VNet
from mtseg.results import summarize, table, to_csv, without_nan
from mtseg.runfolder import RunError, choose_device
from mtseg.sliding_window import test_single_case

HERE = Path(__file__).resolve().parent
NETWORK = ("network", "n_channels", "num_classes", "n_filters", "normalization", "has_dropout")
DEFAULTS = {
    "root_path": str(HERE / "data/LA"),
    "dataset_name": "LA",
    "network": "vnet",
    "n_channels": 1,
    "num_classes": 2,
    "n_filters": 16,
    "normalization": "batchnorm",
    "has_dropout": True,
    "patch_size": [112, 112, 80],
    "stride_xy": 18,
    "stride_z": 4,
    "max_iterations": None,
    "selection": "unknown",
    "val_cases": [],
}


def parse_flags(argv):
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("--model_path", type=Path, required=True, help="weights: iter_<N>.pth, ema_iter_<N>.pth, latest.pth, ...")
    flag("--root_path", help="folder with <split>.list and data/ (default: the run's)")
    flag("--split", default="test", help="cases to segment: those of <root_path>/<split>.list")
    flag("--num", type=positive, help="only the first cases of the list (default: all)")
    flag("--output_dir", type=Path, help="folder for the results (default: beside the checkpoint)")
    flag("--save_result", type=Path, metavar="DIR", help="also write image, label and prediction of each case there")
    flag("--save_format", choices=("hdf5", "nifti"), default="hdf5", help="nifti needs NiBabel")
    flag("--gpu", default="0", help="number of the GPU; without one the CPU is used")
    flag = parser.add_argument_group("settings, by default the run's").add_argument
    flag("--network", choices=("vnet", "unet"), help="architecture")
    flag("--n_channels", type=positive, help="channels of the image")
    flag("--num_classes", type=classes, help="classes, background included")
    flag("--n_filters", type=positive, help="channels on the finest level")
    flag("--normalization", choices=("none", "batchnorm", "groupnorm", "instancenorm"), help="after each convolution")
    flag("--patch_size", type=patch_side, nargs=3, metavar=("W", "H", "D"), help="voxels of a window")
    flag("--stride_xy", type=positive, help="voxels between windows along W and H")
    flag("--stride_z", type=positive, help="voxels between windows along D")
    args = parser.parse_args(argv)
    config = read_config(args.model_path.parent / "config.json")
    for name, default in DEFAULTS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, config.get(name, default))
    return args


def save_case(folder, case, format, volumes):
    """Write the arrays in `volumes` to `folder`: as <case>.h5, or as <case>_<name>.nii.gz with voxels of 1 mm.

    A NIfTI image of several channels has them on its last axis.
    """
    if format == "hdf5":
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            for name, volume in volumes.items():
                file.create_dataset(name, data=volume, compression="gzip")
        write_whole(folder / f"{case}.h5", buffer.getbuffer())
        return
    import nibabel

    for name, volume in volumes.items():
        volume = np.moveaxis(volume, 0, -1) if volume.ndim == 4 else volume
        content = nibabel.Nifti1Image(volume, np.eye(4)).to_bytes()
        write_whole(folder / f"{case}_{name}.nii.gz", gzip.compress(content, compresslevel=1, mtime=0))


def infer(args):
    if args.save_result and args.save_format == "nifti":
        try:
            import nibabel  # noqa: F401
        except ImportError as error:
            raise FlagError("--save_format nifti needs NiBabel: pip install nibabel, or use hdf5") from error

    # ------------------------------------------------------------------------------------------ data and network
    root = Path(args.root_path)
    if root == HERE / "data/Phantom":
        make_phantom(root)
    dataset = LAHeart(root / "data", split=args.split, num=args.num, num_classes=args.num_classes)
    if dataset.n_channels != args.n_channels:
        raise FlagError(f"the network takes {args.n_channels} channels, the cases in {root} have {dataset.n_channels}")
    for case in dataset.image_list:
        dataset.read(case)  # a broken file is better found now than after an hour of segmenting

    device = choose_device(args.gpu)
    net = {"vnet": VNet, "unet": UNet}[args.network](
        n_channels=args.n_channels,
        n_classes=args.num_classes,
        n_filters=args.n_filters,
        normalization=args.normalization,
        has_dropout=args.has_dropout,
    )
    checkpoint, sha256 = load_checkpoint(args.model_path), file_sha256(args.model_path)
    net = load_weights(net, checkpoint, args.model_path).to(device).eval()

    # --------------------------------------------------------------------------------------------------- inference
    rows = []
    for case in tqdm(dataset.image_list, unit="case", dynamic_ncols=True):
        sample = dataset.read(case)
        prediction, _ = test_single_case(
            net, sample["image"], args.stride_xy, args.stride_z, args.patch_size, args.num_classes
        )
        for label in range(1, args.num_classes):
            dice, jaccard, hd95, asd = calculate_metric_percase(prediction == label, sample["label"] == label)
            rows.append({"case": case, "class": label, "dice": dice, "jaccard": jaccard, "hd95": hd95, "asd": asd})
        if args.save_result:
            save_case(args.save_result, case, args.save_format, {**sample, "prediction": prediction.astype(np.uint8)})

    # ------------------------------------------------------------------------------------------------------ results
    output_dir = args.output_dir or args.model_path.parent / f"{args.model_path.stem}_{args.split}"
    shared = sorted(set(args.val_cases) & set(dataset.image_list))
    selection = "test set" if shared else args.selection
    if selection == "validation list" and not args.model_path.stem.endswith("best_model"):
        selection = "last iteration"
    if selection == "last iteration" and checkpoint.get("iteration", args.max_iterations) != args.max_iterations:
        selection = f"iteration {checkpoint['iteration']} of an unfinished run"
    result = {
        "checkpoint": str(args.model_path),
        "checkpoint_sha256": sha256,
        "selection": selection,
        "dataset": args.dataset_name,
        "split": args.split,
        "protocol": {"patch_size": args.patch_size, "stride_xy": args.stride_xy, "stride_z": args.stride_z},
        "unit": "voxel",
        "network": {name: getattr(args, name) for name in NETWORK},
        "torch": str(torch.__version__),
        "summary": summarize(rows),
        "cases": rows,
    }
    write_whole(output_dir / "metrics.csv", to_csv(rows).encode())
    write_whole(output_dir / "metrics.json", json.dumps(without_nan(result), indent=1).encode())
    print(table(rows))
    print(f"checkpoint selected by: {selection}" + " (the cases it was monitored on are tested here)" * bool(shared))
    print(f"written to {output_dir}/metrics.csv and metrics.json")
    return result


def main(argv=None):
    with one_sentence(FlagError, DataError, PhantomError, CheckpointError, RunError):
        return infer(parse_flags(argv))


if __name__ == "__main__":
    main()
