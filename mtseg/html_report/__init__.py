"""Results as one HTML file; `python -m mtseg.html_report` is the command."""

from mtseg.html_report.markup import case_table, html_notes, html_picture, html_settings, html_table, page

__all__ = [
    "case_table",
    "html_notes",
    "html_picture",
    "html_settings",
    "html_table",
    "page",
]
