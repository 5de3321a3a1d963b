"""Pictures of cases and of runs, for papers: colours for the colour-blind, line styles and hatches for grey print.

    python inference.py --model_path model/LA_vnet_8_labeled/MT/iter_6000.pth --save_result predictions/MT
    python -m mtseg.figures overlay  predictions/MT --out overlay.png             # the median case, or --case NAME
    python -m mtseg.figures gallery  predictions/MT --out gallery.png             # best, median, five worst cases
    python -m mtseg.figures compare  supervised=predictions/supervised MT=predictions/MT --out compare.png
    python -m mtseg.figures surfaces supervised=predictions/supervised MT=predictions/MT --out surfaces.png
    python -m mtseg.figures curves   model/LA_vnet_8_labeled/* --out curves.png   # from each run's metrics.csv
    python -m mtseg.figures boxes    model/LA_vnet_8_labeled --out boxes.png      # Dice and HD95 per method

Predictions are folders of <case>.h5 with 'image' (W, H, D) or (C, W, H, D), 'label' and 'prediction' (W, H, D), as
`inference.py --save_result` writes them. Needs Matplotlib, and scikit-image for surfaces: pip install "mtseg[plot]".
"""

import math
from pathlib import Path

from mtseg.checkpoint import CheckpointError, write_whole
from mtseg.figures.canvas import SUFFIXES, CanvasError, render, style
from mtseg.figures.cases import (
    CaseError,
    best_median_worst,
    case_files,
    named_folders,
    order_cases,
    read_case,
    read_everywhere,
)
from mtseg.figures.meshes import MeshError, surfaces
from mtseg.figures.runs import RunError, boxes, curves, read_curves
from mtseg.figures.slices import compare, gallery, overlay
from mtseg.metrics import dice, hd95
from mtseg.report import ResultError, RowError, find_results, group_results, mark_rows
from mtseg.script.flags import FlagError, Parser, one_sentence, positive

ERRORS = (CanvasError, CaseError, MeshError, RunError, ResultError, RowError, FlagError, CheckpointError)


def parse_flags(argv):
    parser = Parser(description=__doc__, prog="python -m mtseg.figures")
    flag = parser.add_argument
    flag("kind", choices=("overlay", "gallery", "compare", "surfaces", "curves", "boxes"), help="which picture")
    flag("paths", nargs="+", metavar="[NAME=]FOLDER", help="predictions; for curves runs; for boxes runs or results")
    flag("--case", help="case to draw (default: the one of median Dice in the last folder)")
    flag("--out", type=Path, help="file to write: .png, .pdf or .svg (default: <kind>.png)")
    flag("--dpi", type=positive, default=150, help="dots per inch of a .png")
    flag("--spacing", type=float, nargs=3, default=(1.0, 1.0, 1.0), metavar=("X", "Y", "Z"), help="mm of a voxel")
    args = parser.parse_args(argv)
    args.out = args.out or Path(f"{args.kind}.png")
    if args.out.suffix not in SUFFIXES:
        raise FlagError(f"--out {args.out}: name a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    if not all(0 < side < math.inf for side in args.spacing):
        raise FlagError(f"--spacing {' '.join(map(str, args.spacing))}: a voxel is wider than 0 mm in each direction")
    return args


def score(case):
    return dice(case["prediction"] > 0, case["label"] > 0)


def unit_of(spacing):
    return "voxel" if tuple(spacing) == (1, 1, 1) else "mm"


def caption(case, spacing=(1, 1, 1)):
    """Dice and HD95 of all classes together, a line each."""
    distance = hd95(case["prediction"] > 0, case["label"] > 0, spacing)
    return f"Dice {100 * score(case):.1f} %\nHD95 {distance:.1f} {unit_of(spacing)}"


def draw_gallery(folder, spacing=(1, 1, 1)):
    """(figure, number of cases) of the best, the median and the worst of the predictions in `folder`."""
    picked, count = best_median_worst(folder, score)
    return gallery([(f"{place}: {caption(case, spacing)}", name, case) for place, name, case in picked], spacing), count


def draw_curves(paths):
    runs = [config.parent for path in paths for config in sorted(Path(path).rglob("config.json"))]
    if not runs:
        raise RunError(f"{', '.join(paths)}: no run with a config.json there; give runs' folders")
    return curves([read_curves(run) for run in dict.fromkeys(runs)])


def draw_boxes(paths):
    rows, _ = group_results(find_results(paths)[0])
    mark_rows(rows, rows[0])
    odd = next((row for row in rows if row.mark), None)
    if odd:
        raise RowError(f"{odd.name} is not comparable with {rows[0].name} ({odd.incomparable}); leave it out")
    methods = {
        f"{row.name}, {row.labelnum} labels": {m: list(row.per_case(m).values()) for m in ("dice", "hd95")}
        for row in rows
    }
    return boxes(methods, rows[0].unit)


def draw_one_case(args):
    """The figure of one case: overlay, compare or surfaces."""
    folders = named_folders(args.paths)
    case = args.case
    if case is None:
        scores = {name: score(read_case(path)) for name, path in case_files(list(folders.values())[-1]).items()}
        case = order_cases(scores)[(len(scores) - 1) // 2]
    cases = read_everywhere(folders, case)
    captions = {name: caption(content, args.spacing) for name, content in cases.items()}
    said = {name: text.replace("\n", ", ") for name, text in captions.items()}
    print(f"case {case}: " + "; ".join(f"{name} {text}" for name, text in said.items()))
    if args.kind == "overlay":
        name, content = list(cases.items())[-1]
        return overlay(content, f"{case}: {said[name]}", args.spacing)
    if args.kind == "compare":
        return compare(cases, captions, args.spacing)
    masks = {name: content["prediction"] for name, content in cases.items()}
    label = next(iter(cases.values()))["label"]
    return surfaces(label, masks, captions, args.spacing, unit_of(args.spacing))


def main(argv=None):
    with one_sentence(*ERRORS):
        args = parse_flags(argv)
        with style():
            if args.kind == "curves":
                figure = draw_curves(args.paths)
            elif args.kind == "boxes":
                figure = draw_boxes(args.paths)
            elif args.kind == "gallery":
                figure, _ = draw_gallery(list(named_folders(args.paths).values())[-1], args.spacing)
            else:
                figure = draw_one_case(args)
            write_whole(args.out, render(figure, args.out.suffix[1:], args.dpi))
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
