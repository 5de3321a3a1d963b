"""Results as one HTML file; `python -m mtseg.html_report` is the command."""

# ruff: noqa: F401  what other modules may import from here
from mtseg.html_report.markup import html_notes, html_picture, html_settings, html_table, page
