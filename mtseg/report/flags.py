"""The flags of the commands that show a table of results."""

from pathlib import Path

PUBLISHED = Path(__file__).resolve().parents[2] / "benchmarks/published.json"


def add_flags(parser):
    flag = parser.add_argument
    flag("paths", nargs="+", type=Path, metavar="RUN", help="runs, results, metrics.json files, or folders above them")
    flag("--baseline", metavar="WORDS", help="row to test against, by words of it: supervised, 'MT teacher', 'MT 8'")
    flag("--metrics", nargs="+", metavar="NAME", help="columns of metrics.json, or dice_pooled and the like")
    flag("--per_class", action="store_true", help="a line for each class, and one for their mean")
    what = "figures that were published of the same data and number of labels (without FILE: benchmarks/published.json)"
    flag("--published", nargs="?", type=Path, const=PUBLISHED, metavar="FILE", help=what)
