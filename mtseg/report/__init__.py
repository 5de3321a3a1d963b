"""Tables of results; `python -m mtseg.report` is the command."""

from mtseg.report.formats import to_csv, to_latex, to_markdown, to_text
from mtseg.report.read import Result, ResultError, find_results, read_result
from mtseg.report.rows import (
    Row,
    RowError,
    baseline_of,
    find_baseline,
    group_results,
    mark_incomparable,
    read_published,
)
from mtseg.report.summary import average_seeds, bootstrap_interval, paired_test, statistics
from mtseg.report.table import METRICS, Table, build_table

__all__ = [
    "METRICS",
    "Result",
    "ResultError",
    "Row",
    "RowError",
    "Table",
    "average_seeds",
    "baseline_of",
    "bootstrap_interval",
    "build_table",
    "find_baseline",
    "find_results",
    "group_results",
    "mark_incomparable",
    "paired_test",
    "read_published",
    "read_result",
    "statistics",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_text",
]
