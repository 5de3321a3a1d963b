"""Make a plan of a data set: patch, batch, network, spacing and normalisation, read off it by nnU-Net's rules.

    python data/plan.py data/Heart                        # prepared data, or a folder of images: data/Heart/plan.json
    python data/plan.py Task02_Heart --memory_gb 24       # scans, which prepare_nifti.py takes with --plan FILE
    python train_mean_teacher.py --root_path data/Heart --plan data/Heart/plan.json --labelnum 4

Prints what was found, and what was decided and why. Where there are lists, the cases of train.list and unlabeled.list
are looked at, and never those of test.list or imagesTs. Only scans are resampled, so only their plan has a spacing and
statistics of its own; prepare_nifti.py --plan makes it and prepares by it at once.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for mtseg, installed or not

from mtseg.nnunet_plans import to_nnunet
from mtseg.script import plans
from mtseg.script.flags import Parser, one_sentence


def main(argv=None):
    parser = plans.add_plan_flags(Parser(description=__doc__))
    flag = parser.add_argument
    flag("root", type=Path, help="folder of the data set, or an index.json of images")
    flag("--dims", type=int, choices=(2, 3), help="2: images, or slice by slice; 3: volumes (default: the data's)")
    flag(
        "--spacing",
        type=plans.above_zero,
        nargs="+",
        metavar="MM",
        help="of prepared files that do not say theirs, across the slices last",
    )
    flag("--out", type=Path, metavar="FILE", help="default: <root>/plan.json")
    flag("--nnunet", type=Path, metavar="FILE", help="write it as nnU-Net's nnUNetPlans.json, too")
    args = parser.parse_args(argv)
    out = args.out or (args.root.parent if args.root.suffix == ".json" else args.root) / "plan.json"
    with one_sentence():
        made = plans.plan_of(args)
        plans.write_plan(out, made)
        if args.nnunet:
            plans.write_plan(args.nnunet, to_nnunet(made, made["made_from"]["axes"]))
        print(plans.description(made))
        print(f"{'plan.json':14}{out}: train with --plan {out}")
    return made


if __name__ == "__main__":
    main()
