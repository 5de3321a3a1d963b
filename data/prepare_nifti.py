"""Turn NIfTI or NRRD scans into the HDF5 layout that the scripts read: a data set of one's own.

    python data/prepare_nifti.py Task02_Heart data/Heart --spacing 1.25 1.25 1.4 --test 4 --labelnum 4
    python data/prepare_nifti.py BraTS2021 data/BraTS --test 250 --val 50 --labelnum 100
    python data/prepare_nifti.py Task09_Spleen data/Spleen --normalization ct --window 40 400 --crop none --test 8
    python data/prepare_nifti.py Task09_Spleen data/Spleen --plan       # all that by nnU-Net's rules: see data/plan.py

Understands the nnU-Net and Medical Segmentation Decathlon layout (imagesTr, labelsTr, imagesTs, dataset.json),
BraTS's case folders (<case>/<case>_t1.nii.gz, ..., <case>_seg.nii.gz), and a folder of files with --labels. NIfTI
needs NiBabel (pip install nibabel), NRRD pynrrd.

Writes <out>/data/<case>/mri_norm2.h5 with 'image' (float32, (W, H, D) or (C, W, H, D)) and, where the case has one,
'label' (uint8, classes 0, 1, 2, ...), preprocessing.json with how that was made, so that inference.py can do the same
to a new scan, and the lists of a split by patient. Cases without a label are in unlabeled.list; labelled cases of
imagesTs in test.list. Attributes of each file keep the voxel spacing in millimetres, the scan's affine and shape, its
crop and its normalisation: inference.py puts predictions back onto the scan's own grid with them.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for mtseg, installed or not

from mtseg.layouts import LayoutError, find_cases, masks_without_image
from mtseg.preprocess import CHOICES, IGNORED, PreprocessError, check_settings, grid_attributes, prepare
from mtseg.script import plans
from mtseg.script.flags import Parser, given_flags, natural, one_sentence
from mtseg.script.newdata import add_split_flags, new_folder, told_by, write_case
from mtseg.splits import describe, patients_of, split_by_patient, write_split
from mtseg.volumes import read_channels, read_on_grid

PLAN = (
    "choose spacing, crop and normalization, and patch, batch and network for training, by nnU-Net's rules, and write "
    "plan.json; without --test a fifth of the patients is for testing; FILE: by a plan that is there"
)


def settings_of(args, cases, channels):
    """(the preprocessing's settings, from the flags, --like, and dataset.json or the labels themselves; the channels'
    names or None)."""
    if args.like:
        try:
            settings = check_settings(json.loads(args.like.read_text(encoding="utf-8-sig")))
        except (OSError, ValueError) as error:
            raise PreprocessError(f"{args.like}: not a preprocessing.json ({error}); name another") from error
        if settings["channels"] != channels:
            raise PreprocessError(f"{args.like}: has channels {settings['channels']}, {args.source} has {channels}")
        return settings, None
    settings = {name: getattr(args, name) for name in ("orientation", "crop", "normalization", "window", "spacing")}
    told, names = told_by(args.source, cases, channels, args.ignore)
    return check_settings({**settings, **told}), names


def planned(args, cases, split, settings, names):
    """(the plan, the settings that it changes): of the split's training cases, or the one in the file --plan."""
    training, labelnum = {*split["train"], *split["unlabeled"]}, split["labelnum"] or len(split["train"])
    if args.plan is True:
        cases = [case for case in cases if case.name in training]
        made = plans.plan_of_scans(args, cases, split["train"][:labelnum], settings, names)
    else:
        made = plans.read_plan(args.plan)
    settings = plans.preparation_of(args.plan, made, settings)
    made |= {"num_classes": len(settings["labels"]), "intensity": "none"} | ({"labelnum": labelnum} if labelnum else {})
    return made | ({} if settings.get("ignore") is None else {"ignore_index": IGNORED}), settings


def prepare_case(case, settings):
    """(data sets, attributes, labelled voxels cut away) of a case's HDF5 file."""
    volume = read_channels(case.images)
    label = None if case.label is None else read_on_grid(case.label, volume)
    try:
        done = prepare(volume.array, volume.affine, volume.spacing, settings, label)
    except PreprocessError as error:
        raise PreprocessError(f"{case.images[0]}: {error}") from error
    arrays = {"image": done.image} | ({} if label is None else {"label": done.label})
    attributes = {**grid_attributes(done.grid), "normalization": done.normalization}
    for name, value in (("spacing", done.spacing), ("original_affine", volume.affine)):
        if value is not None:
            attributes[name] = value
    return arrays, attributes, done.cut


def prepare_all(args, folder):
    """Write all cases of `args.source` to the new folder `folder`; returns (split, settings)."""
    cases, channels = find_cases(args.source, labels=args.labels)
    if alone := args.labels is None and masks_without_image(args.source, cases):
        remedy = "add the image, remove it, or say by --labels where the labels lie"
        raise LayoutError(f"{alone[0]}: a label without an image; {remedy}")
    prepared = next((case for case in cases if case.images[0].suffix in (".h5", ".hdf5")), None)
    if prepared:
        raise LayoutError(f"{prepared.images[0]}: is HDF5 already; give the folder with the scans")
    labeled = [case.name for case in cases if case.label and case.part != "Ts"]
    if args.test is None:
        own = not labeled or any(case.label and case.part == "Ts" for case in cases)
        patients = 0 if own else len({*patients_of(labeled, args.patient_id)[0].values()})
        args.test = max(patients // 5, int(patients > 2))  # as many as a fold of nnU-Net's has
    asked = {name: getattr(args, name) for name in ("labelnum", "unlabeled", "val", "test", "seed", "patient_id")}
    split = split_by_patient(
        labeled,
        [case.name for case in cases if not case.label],
        fixed_test=[case.name for case in cases if case.label and case.part == "Ts"],
        **asked,
    )
    settings, names = settings_of(args, cases, channels)
    if args.plan:
        made, settings = planned(args, cases, split, settings, names)
    settings |= {} if args.like or settings["spacing"] is None else {"coarse_axis": "nearest"}
    for case in cases:
        arrays, attributes, cut = prepare_case(case, settings)
        write_case(folder, case.name, arrays, {**attributes, "fixed_test": bool(case.label and case.part == "Ts")})
        note = "" if case.label else "; without a label"
        if cut:
            note = f"; {cut} labelled voxels lie where all channels are 0 and were cut off"
        print(f"{case.name}: {' x '.join(map(str, arrays['image'].shape))}{note}", flush=True)
    (folder / "preprocessing.json").write_text(json.dumps(settings, indent=1))
    write_split(folder, split, asked)
    if args.plan:
        plans.write_plan(folder / "plan.json", made)
        if "why" in made:  # nnU-Net's plans do not say
            print(plans.description(made))
    return split, settings


def print_summary(out, split, settings):
    """What was made, and the flags of the training scripts that go with it."""
    print(f"{sum(map(len, split['patients'].values()))} cases in {out}: {describe(split)}")
    classes = ", ".join(f"{number} is {value}" for number, value in enumerate(settings["labels"]))
    ignored = " --ignore_index 255" if settings.get("ignore") is not None else ""
    plan = out / "plan.json"
    how = f"--plan {plan}" if plan.exists() else f"--num_classes {len(settings['labels'])}{ignored}"
    print(f"train with {how}; of the label's values, class {classes}")


def parse_flags(argv):
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("source", type=Path, help="folder with the scans")
    flag("out", type=Path, help="folder to make, e.g. data/Heart")
    flag(
        "--labels", type=Path, metavar="DIR", help="folder with the labels, called as the cases (default: the layout's)"
    )
    flag(
        "--ignore",
        type=natural,
        metavar="VALUE",
        help="the labels' value where nobody labelled; such voxels become 255 (default: dataset.json's 'ignore')",
    )
    flag = parser.add_argument_group("preparation").add_argument
    flag("--spacing", nargs="+", default=["none"], metavar="MM", help="resample to X Y Z millimetres")
    flag("--crop", choices=CHOICES["crop"], default="nonzero", help="to the box of what is not 0")
    flag(
        "--normalization",
        choices=CHOICES["normalization"][:-1],
        default="zscore",
        help="of each channel: zscore: zero mean, unit variance; percentile: the same, clipped to the 0.5th and 99.5th "
        "before; ct: a window to [0, 1]; minmax: to [0, 1]; over what is not 0, or with --crop none over all voxels",
    )
    flag("--window", type=float, nargs=2, metavar=("CENTRE", "WIDTH"), help="of ct, in Hounsfield units, e.g. 40 400")
    flag(
        "--orientation",
        choices=CHOICES["orientation"],
        default="RAS",
        help="RAS: W to the right, H to the front, D upwards, by turning and mirroring; file: as stored",
    )
    flag("--like", type=Path, metavar="FILE", help="prepare as another data set: its preprocessing.json")
    add_split_flags(parser)
    plans.add_plan_flags(parser).add_argument("--plan", nargs="?", const=True, metavar="FILE", help=PLAN)
    given = given_flags(parser, argv)
    args = parser.parse_args(argv)
    try:
        args.spacing = None if args.spacing == ["none"] else [float(side) for side in args.spacing]
    except ValueError:
        args.spacing = []
    if args.spacing is not None and not (len(args.spacing) == 3 and all(0 < side < 1e4 for side in args.spacing)):
        parser.error("--spacing takes three lengths in millimetres, or none")
    args.test = None if args.plan and "test" not in given else args.test
    if args.plan and (decided := given.keys() & {"spacing", "crop", "normalization", "window", "like"}):
        parser.error(f"--plan decides --{min(decided)}; leave that out")
    by_like = {"spacing", "crop", "normalization", "window", "orientation", "ignore"}
    if args.like and (decided := given.keys() & by_like):
        parser.error(f"--like decides --{min(decided)}; leave that out")
    if args.plan is not True and (unused := given.keys() & plans.FLAGS):
        parser.error(f"--{min(unused)} is about the plan to be made; add --plan, without a file")
    if (args.normalization == "ct") != (args.window is not None) and not args.like:
        parser.error("--normalization ct and --window CENTRE WIDTH go together")
    if args.window and not args.window[1] > 0:
        parser.error(f"--window: its width is {args.window[1]}, but must be above 0")
    return args


def main(argv=None):
    args = parse_flags(argv)
    with one_sentence():
        with new_folder(args.out) as folder:
            split, settings = prepare_all(args, folder)
        print_summary(args.out, split, settings)
    return split


if __name__ == "__main__":
    main()
