"""Tables of results; `python -m mtseg.report` is the command."""

from mtseg.report.compare import baseline_of, find_baseline, mark_rows
from mtseg.report.formats import to_csv, to_latex, to_markdown, to_text
from mtseg.report.read import Result, ResultError, find_results, read_result
from mtseg.report.rows import Row, RowError, group_results, read_published, tell_apart
from mtseg.report.summary import average_seeds, bootstrap_interval, paired_test, statistics
from mtseg.report.table import DEFAULT_METRICS, Table, report

__all__ = [
    "DEFAULT_METRICS",
    "Result",
    "ResultError",
    "Row",
    "RowError",
    "Table",
    "average_seeds",
    "baseline_of",
    "bootstrap_interval",
    "find_baseline",
    "find_results",
    "group_results",
    "mark_rows",
    "paired_test",
    "read_published",
    "read_result",
    "report",
    "statistics",
    "tell_apart",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_text",
]
