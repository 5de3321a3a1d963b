"""One table of results with their uncertainty, from the metrics.json files that inference.py writes.

    python -m mtseg.report model                                       # everything tested under model/
    python -m mtseg.report runs/half_sup_8 runs/half_MT_8 --baseline supervised
    python -m mtseg.report runs --baseline supervised --published --out table.tex

A row is a method, its weights (student or teacher) and its number of labelled cases; runs that differ in the seed alone
share it. Each metric is given as

    mean ± SD over seeds        mean over seeds of the mean over cases; deviation of the seeds' means (n - 1)
    SD over cases               deviation over the test cases (n), averaged over the seeds
    95 % interval               percentile bootstrap over the test cases, each averaged over the seeds first: what
                                another draw of patients might give, not what another seed might
    p (pairs)                   two-sided Wilcoxon signed-rank test against --baseline on the same cases, each
                                averaged over the seeds first

Rows that are not comparable with the baseline (without one: the first row), because of other test cases, units,
windows or selection, carry a mark and a footnote that says why.
"""

import math
from pathlib import Path

from mtseg.checkpoint import CheckpointError, write_whole
from mtseg.report.formats import FORMATS
from mtseg.report.read import ResultError, find_results
from mtseg.report.rows import RowError, baseline_of, find_baseline, group_results, mark_incomparable, read_published
from mtseg.report.summary import RESAMPLES, average_seeds, paired_test, statistics
from mtseg.report.table import METRICS, build_table
from mtseg.script.flags import Parser, one_sentence

DEFAULT_METRICS = ("dice", "jaccard", "hd95", "asd")
SUFFIXES = {".md": "markdown", ".tex": "latex", ".csv": "csv"}
PUBLISHED = Path(__file__).resolve().parents[2] / "data/published/la.csv"


def per_case(row, metric, label="mean"):
    """{case: mean over the seeds} of a row's metric."""
    return dict(zip(row.case_names(), average_seeds(row.values(metric, label)).tolist(), strict=True))


def describe(row, metric, label, baseline, tested):
    """What the table says of one metric of a row: its statistics, and if `tested` the test against `baseline`."""
    if row.published is not None:
        return {"mean": row.published.get(metric, math.nan)}
    entry = statistics(row.values(metric, label))
    if not tested or baseline is row:
        return entry
    if baseline is None:
        return entry | {"why": f"no baseline with {row.labelnum} labels"}
    if METRICS.get(metric, ("", ""))[1] == "distance" and baseline.unit != row.unit:
        return entry | {"why": f"distances in {row.unit} and in {baseline.unit}"}
    p, pairs, why = paired_test(per_case(row, metric, label), per_case(baseline, metric, label))
    return entry | {"p": p, "pairs": pairs, "why": why}


def report(paths, baseline=None, metrics=DEFAULT_METRICS, published=None, per_class=False):
    """(Table, rows) of all results at or under `paths`. With `per_class`, a line for each class and one for the mean
    over them, else the latter alone. Raises ResultError and RowError."""
    results, untested = find_results(paths)
    rows, notes = group_results(results)
    absent = [m for m in metrics if not any(m in case for result in results for case in result.cases)]
    if absent:
        there = sorted({key for case in results[0].cases for key in case} - {"case", "class"})
        raise ResultError(f"{results[0].path}: has no metric {absent[0]!r}; there are {', '.join(there)}")
    baselines = find_baseline(rows, baseline) if baseline else []
    if published:
        wanted = {(row.dataset, row.labelnum) for row in rows}
        beside = [row for row in read_published(published) if (row.dataset, row.labelnum) in wanted]
        notes += [] if beside else [f"{published} has no figures for these data and numbers of labels."]
        rows += beside
    notes += [f"{run} has not been tested." for run in untested]
    footnotes = mark_incomparable(rows, baselines[0] if baselines else rows[0])
    lines = []
    for row in rows:
        against = baseline_of(row, baselines)
        classes = row.classes() if per_class else ()
        for label in [*(classes if len(classes) > 1 else ()), "mean"]:
            entries = {metric: describe(row, metric, label, against, bool(baselines)) for metric in metrics}
            lines.append((row, label, entries))
    return build_table(lines, metrics, baselines, footnotes, notes, RESAMPLES), rows


def parse_flags(argv):
    parser = Parser(description=__doc__, prog="python -m mtseg.report")
    add_flags(parser)
    flag = parser.add_argument
    flag("--format", choices=FORMATS, help="default: by the name of --out (.txt, .md, .tex, .csv), else text")
    flag("--out", type=Path, help="file to write to (default: print)")
    args = parser.parse_args(argv)
    if args.format is None:
        args.format = SUFFIXES.get(args.out.suffix, "text") if args.out else "text"
    return args


def add_flags(parser):
    """What a command that shows this table lets people choose."""
    flag = parser.add_argument
    flag("paths", nargs="+", type=Path, metavar="RUN", help="runs, results, metrics.json files, or folders above them")
    flag("--baseline", metavar="WORDS", help="row to test against, by words of it: supervised, 'MT teacher', 'MT 8'")
    flag("--metrics", nargs="+", default=list(DEFAULT_METRICS), metavar="NAME", help="columns of metrics.json")
    flag("--per_class", action="store_true", help="a line for each class, and one for their mean")
    flag(
        "--published",
        nargs="?",
        type=Path,
        const=PUBLISHED,
        metavar="FILE",
        help="published figures for the same data and number of labels beside (without FILE: data/published/la.csv)",
    )


def main(argv=None):
    with one_sentence(ResultError, RowError, CheckpointError):
        args = parse_flags(argv)
        table, _ = report(args.paths, args.baseline, args.metrics, args.published, args.per_class)
        text = FORMATS[args.format](table)
        if args.out is None:
            print(text, end="")
        else:
            write_whole(args.out, text.encode())
            print(f"written to {args.out}")


if __name__ == "__main__":
    main()
