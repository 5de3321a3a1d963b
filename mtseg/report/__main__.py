"""One table of results with their uncertainty, from the metrics.json files that inference.py writes.

    python -m mtseg.report model                                       # everything tested under model/
    python -m mtseg.report runs/half_sup runs/half_MT --baseline supervised
    python -m mtseg.report runs --baseline supervised --published --out table.tex

A row is a method, its weights (student or teacher) and its number of labelled cases; runs that differ in the seed alone
share it. Each metric is given as

    mean ± SD over seeds        mean over seeds of the mean over cases; deviation of the seeds' means (n - 1)
    SD over cases               deviation over the test cases (n), averaged over the seeds
    95 % interval               percentile bootstrap over the test cases, each averaged over the seeds first: what
                                another draw of patients might give, not what another seed might
    difference, 95 % interval   what the row has more than --baseline on the same cases, each averaged over the seeds
                                first, and its bootstrap interval over the cases
    p (pairs)                   two-sided Wilcoxon signed-rank test of these differences
    p, Holm                     the same, corrected for the tests of all rows in that metric

Of images, Dice, IoU and pixel accuracy also stand there as those of the pixels of all images together, called pooled; a
result on several data sets has a row for each.

Rows that are not comparable with the baseline (without one: the first row), because of other test cases, units,
windows or selection, carry a mark and a footnote that says why; so do rows tested on cases of their own training, and
rows of which several iterations were tested: these are no rows, but the column `inflation` says what the best of them
has more than the last. --published fills a column beside, and names the figures of other methods below the table.
"""

from pathlib import Path

from mtseg.checkpoint import write_whole
from mtseg.report.flags import add_flags
from mtseg.report.formats import FORMATS
from mtseg.report.table import report
from mtseg.script.flags import Parser, one_sentence

SUFFIXES = {".txt": "text", ".md": "markdown", ".tex": "latex", ".csv": "csv"}


def parse_flags(argv):
    parser = Parser(description=__doc__, prog="python -m mtseg.report")
    add_flags(parser)
    flag = parser.add_argument
    flag("--format", choices=FORMATS, help="default: by the name of --out (.txt, .md, .tex, .csv), else text")
    flag("--out", type=Path, help="file to write to (default: print)")
    args = parser.parse_args(argv)
    if args.format is None:
        args.format = SUFFIXES.get(args.out.suffix.lower()) if args.out else "text"
    if args.format is None:
        parser.error(f"--out {args.out}: its name says no format; end it in {', '.join(SUFFIXES)}, or give --format")
    return args


def main(argv=None):
    with one_sentence():
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
