"""Pictures of cases and of runs, for papers: colours for the colour-blind, line styles and hatches for grey print.

    python inference.py --model_path model/LA_vnet_8_labeled/MT/iter_6000.pth --save_result predictions/MT
    python -m mtseg.figures overlay  predictions/MT --out overlay.png             # the median case, or --case NAME
    python -m mtseg.figures gallery  predictions/MT --out gallery.png             # best, median, five worst cases
    python -m mtseg.figures compare  supervised=predictions/supervised MT=predictions/MT --out compare.png
    python -m mtseg.figures surfaces supervised=predictions/supervised MT=predictions/MT --out surfaces.png
    python -m mtseg.figures curves   model/LA_vnet_8_labeled/* --out curves.png   # from each run's metrics.csv
    python -m mtseg.figures boxes    model/LA_vnet_8_labeled --out boxes.png      # Dice and HD95 per method
    python -m mtseg.figures reconstructions model/LA_vnet_0_labeled/masked        # of recipes/pretrain_masked.py

Predictions are folders that `inference.py --save_result` filled, or the folder of the results of `inference.py
--input`. Dice and HD95 are those of the tables: of several classes the mean. Of images, and of stacks of them slice by
slice, image, label, prediction and errors stand side by side. Needs Matplotlib, and scikit-image for
surfaces: pip install "mtseg[plot]".
"""

import math
from pathlib import Path

from mtseg.checkpoint import write_whole
from mtseg.figures.canvas import SUFFIXES, FigureError, render, style
from mtseg.figures.cases import caption, median_case, named_folders, read_everywhere, set_spacing
from mtseg.figures.meshes import surfaces
from mtseg.figures.reconstructions import reconstructions
from mtseg.figures.runs import boxes_of, curves, find_runs, read_runs
from mtseg.figures.slices import compare, gallery_of, overlay
from mtseg.report import ReportError, find_results, group_results, mark_rows
from mtseg.script.flags import FlagError, Parser, one_sentence, positive


def parse_flags(argv):
    parser = Parser(description=__doc__, prog="python -m mtseg.figures")
    flag = parser.add_argument
    flag(
        "kind",
        choices=("overlay", "gallery", "compare", "surfaces", "curves", "boxes", "reconstructions"),
        help="which picture",
    )
    flag("paths", nargs="+", metavar="[NAME=]FOLDER", help="predictions; for curves runs; for boxes runs or results")
    flag("--case", help="case to draw (default: the one of median Dice in the last folder)")
    flag("--out", type=Path, help="file to write: .png, .pdf or .svg (default: <kind>.png)")
    flag("--dpi", type=positive, default=150, help="dots per inch of a .png")
    flag("--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help="mm of a voxel (default: the files')")
    args = parser.parse_args(argv)
    args.out = args.out or Path(f"{args.kind}.png")
    if args.out.suffix not in SUFFIXES:
        raise FlagError(f"--out {args.out}: name a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    if args.spacing and not all(0 < side < math.inf for side in args.spacing):
        raise FlagError(f"--spacing {' '.join(map(str, args.spacing))}: a voxel is wider than 0 mm in each direction")
    return args


def comparable_rows(paths):
    """The rows of the report on `paths`; ReportError where two of them cannot stand in one picture."""
    rows, _ = group_results(find_results(paths)[0])
    mark_rows(rows, rows[0])
    odd = next((row for row in rows if row.differences), None)
    if odd:
        raise ReportError(f"{odd.name} is not comparable with {rows[0].name} ({odd.incomparable}); leave it out")
    return rows


def draw_one_case(args):
    """The figure of one case: overlay, compare or surfaces."""
    folders = named_folders(args.paths)
    name = args.case or median_case(list(folders.values())[-1])
    cases = read_everywhere(folders, name)
    set_spacing(cases.values(), args.spacing)
    captions = {method: caption(case) for method, case in cases.items()}
    lines = {method: text.replace("\n", ", ") or "no label" for method, text in captions.items()}
    print(f"case {name}: " + "; ".join(f"{method} {line}" for method, line in lines.items()))
    if args.kind == "overlay":
        method, case = list(cases.items())[-1]
        return overlay(case, f"{name}: {lines[method]}")
    if args.kind == "compare":
        return compare(cases, captions)
    first = next(iter(cases.values()))
    if first["prediction"].ndim == 2:
        raise FigureError(f"case {name} is an image, which has no surfaces; draw its overlay")
    if first["label"] is None:
        raise FigureError(f"case {name} has no label: there is no surface to measure the distance to; draw its overlay")
    masks = {method: case["prediction"] for method, case in cases.items()}
    return surfaces(first["label"], masks, captions, first["spacing"], first["unit"])


def main(argv=None):
    with one_sentence():
        args = parse_flags(argv)
        with style():
            if args.kind == "curves":
                figure = curves(read_runs(find_runs(args.paths)))
            elif args.kind == "boxes":
                figure = boxes_of(comparable_rows(args.paths))
            elif args.kind == "reconstructions":
                figure = reconstructions(args.paths[-1], args.case)
            elif args.kind == "gallery":
                figure, _ = gallery_of(list(named_folders(args.paths).values())[-1], args.spacing)
            else:
                figure = draw_one_case(args)
            write_whole(args.out, render(figure, args.out.suffix[1:], args.dpi))
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
