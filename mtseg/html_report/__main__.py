"""A report of runs as one HTML file that needs no network: table, box plots, curves, gallery, cases and settings.

    python -m mtseg.html_report runs/half_sup runs/half_MT --baseline supervised --out report.html
    python -m mtseg.html_report model --predictions MT=predictions/MT --out report.html

Tables sort by a click on a heading. `--predictions` adds, for each folder that `inference.py --save_result` or
`--input` filled, the best, the median and the five worst cases. The page reads on a phone and on a desk. Needs
Matplotlib: pip install "mtseg[plot]".
"""

import math
from pathlib import Path

from mtseg.checkpoint import write_whole
from mtseg.figures import boxes_of, curves, gallery_of, named_folders, read_runs, render, style
from mtseg.html_report.markup import html_notes, html_picture, html_settings, html_table, page
from mtseg.report import default_metrics, report
from mtseg.report.flags import add_flags
from mtseg.results import heading, scale
from mtseg.script.flags import Parser, one_sentence


def parse_flags(argv):
    parser = Parser(description=__doc__, prog="python -m mtseg.html_report")
    add_flags(parser)
    flag = parser.add_argument
    flag("--predictions", nargs="+", default=[], metavar="[NAME=]FOLDER", help="of inference.py, for the gallery")
    flag("--title", default="Segmentation results", help="heading of the page")
    flag("--out", type=Path, default=Path("report.html"), help="file to write")
    return parser.parse_args(argv)


def sections_of(args):
    """{heading: HTML} of the page."""
    table, rows = report(args.paths, args.baseline, args.metrics, args.published, args.per_class)
    metrics = args.metrics or default_metrics(rows)
    unit = rows[0].unit if len({row.unit for row in rows}) == 1 else ""
    sections = {"Table": html_table(table.columns, table.rows, table.keys) + html_notes(table.notes), "Cases": ""}

    if {"dice", "hd95"} <= set(metrics) and unit:
        caption = "Every case is a dot, averaged over the seeds; the box holds the middle half, the line is the median."
        sections["Cases"] = html_picture(render(boxes_of(rows)), caption)
    sections["Cases"] += f"<details><summary>Every case</summary>{case_table(rows, metrics, unit)}</details>"

    results = [(row, one) for row in rows for result in row.results for one in result.parts or [result]]
    runs = {result.run.resolve(): result.run for _, result in results if result.run}
    logged = [run for run in runs.values() if (run / "metrics.csv").is_file()]
    if logged:
        sections["Training"] = html_picture(render(curves(read_runs(logged))), "What the runs logged in training.")
    for name, folder in named_folders(args.predictions).items():
        figure, count = gallery_of(folder)
        caption = f"{name}: the best, the median and the worst of {count} cases, each in its worst slice."
        sections[f"Gallery: {name}"] = html_picture(render(figure), caption)
    settings = {}
    for row, result in results:
        seed = "" if result.seed is None else f", seed {result.seed}"
        fold = "" if result.fold is None else f", fold {result.fold}"
        settings[f"{row.title}{row.mark}{seed}{fold}"] = result.config
    return sections | {"Settings": html_settings(settings)}


def case_table(rows, metrics, unit):
    """An HTML table of every case of the report's `rows`: each metric averaged over the seeds, but for pooled ones."""
    metrics = [metric for metric in metrics if not metric.endswith("_pooled")]
    images = all(result.images for row in rows for result in row.results)
    keys, cells = [], []
    for row in rows:
        values = [row.per_case(metric) for metric in metrics]
        for case in row.case_names():
            numbers = [scale(m) * of_case[case] for m, of_case in zip(metrics, values, strict=True)]
            keys.append([row.title + row.mark, case, *numbers])
            cells.append([[text] for text in [*keys[-1][:2], *("-" if math.isnan(n) else f"{n:.2f}" for n in numbers)]])
    return html_table(["method", "case", *(heading(metric, unit, images) for metric in metrics)], cells, keys)


def main(argv=None):
    with one_sentence():
        args = parse_flags(argv)
        with style():
            write_whole(args.out, page(args.title, sections_of(args)).encode())
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
