"""Tables of results; `python -m mtseg.report` is the command."""

# ruff: noqa: F401  what other modules may import from here
from mtseg.report.compare import baseline_of, find_baseline, mark_rows
from mtseg.report.formats import to_csv, to_latex, to_markdown, to_text
from mtseg.report.read import ReportError, Result, find_results, read_result
from mtseg.report.rows import Row, group_results, published_beside, tell_apart
from mtseg.report.summary import average_seeds, bootstrap_interval, holm, paired_test, statistics
from mtseg.report.table import Table, default_metrics, report
