"""Halve the resolution of a data set, so that a CPU can train on it: 8 voxels become one.

    python data/halve.py data/LA data/LA_half

Images are averaged over blocks of 2 x 2 x 2 voxels (a last odd slice is dropped); a label is kept where at least half
of the block has it, class by class. Lists are copied; attributes too, 'spacing' doubled.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np


def halve(volume):
    """The mean over blocks of 2 x 2 x 2 of the last three axes, float32."""
    *channels, w, h, d = volume.shape
    w, h, d = w // 2, h // 2, d // 2
    blocks = volume[..., : 2 * w, : 2 * h, : 2 * d].astype(np.float32).reshape(*channels, w, 2, h, 2, d, 2)
    return blocks.mean(axis=(-5, -3, -1))


def halve_label(label):
    """The class that at least half of a block has; background where there is none (or a tie, the higher class)."""
    result = np.zeros([n // 2 for n in label.shape], label.dtype)
    for value in np.unique(label):
        if value:
            result[halve(label == value) >= 0.5] = value
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with train.list, test.list and data/")
    parser.add_argument("out", type=Path, help="folder to make")
    args = parser.parse_args(argv)
    files = sorted(args.root.glob("data/*/mri_norm2.h5"))
    if not files or args.out.exists():
        problem = f"{args.out} exists already" if files else f"{args.root}: no data/<case>/mri_norm2.h5 in it"
        print(f"error: {problem}; name another folder", file=sys.stderr)
        raise SystemExit(2)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".halve.", dir=args.out.parent))
    temporary.chmod(0o755)
    try:
        for path in files:
            target = temporary / path.relative_to(args.root)
            target.parent.mkdir(parents=True)
            with h5py.File(path) as whole, h5py.File(target, "w") as half:
                half.create_dataset("image", data=halve(whole["image"][...]), compression="gzip")
                half.create_dataset("label", data=halve_label(whole["label"][...]), compression="gzip")
                for name, value in whole.attrs.items():
                    half.attrs[name] = 2 * value if name == "spacing" else value
        for path in args.root.glob("*.list"):
            shutil.copy(path, temporary)
        temporary.rename(args.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{len(files)} cases in {args.out}")


if __name__ == "__main__":
    main()
