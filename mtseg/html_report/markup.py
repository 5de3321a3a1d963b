"""A page of tables and pictures as one HTML file that needs no network; its tables sort by a click."""

import base64
import html
import json
import math

from mtseg.report.rows import differing

# Nothing but what stands in the file itself may be loaded or run.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 0 auto; padding: 1rem; max-width: 72rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
nav a { margin-right: 1rem; } a { color: #0058a3; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; white-space: pre; }
th { border-bottom: 2px solid #444; vertical-align: bottom; } td { border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th button:hover, th button:focus-visible { text-decoration: underline; }
th button::after { content: " \\2195"; color: #777; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: #000; }
th[aria-sort=descending] button::after { content: " \\2193"; color: #000; }
.notes { font-size: .875rem; color: #444; max-width: 60rem; } .notes p { margin: .3rem 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0; overflow-x: auto; } img { max-width: 100%; min-width: 36rem; height: auto; }
figcaption { font-size: .875rem; color: #444; }
tr.differs td { background: #fff6d6; } tr.differs td:first-child { font-weight: 600; background: #fff6d6; }
summary { cursor: pointer; padding: .4rem 0; }
@media print { nav, th button::after { display: none; } }
"""
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const descending = heading.getAttribute("aria-sort") === "ascending";
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.key;
    const order = (a, b) => {
      if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
      const x = Number(key(a)), y = Number(key(b));
      const way = Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
      return descending ? -way : way;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  }));
}
"""


def sort_key(value):
    """What the page sorts a cell by: a number, or text; '' is unknown and stays at the end."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value)


def html_table(columns, rows, keys, differs=()):
    """A table whose columns sort by a click. `rows`: for each a list of cells, a cell a list of lines; `keys`: for each
    a list of what to sort by; `differs`: indices of rows to highlight."""
    numbers = [all(isinstance(row[i], (int, float, type(None))) for row in keys) for i in range(len(columns))]
    kinds = [" class=number" if numeric else "" for numeric in numbers]
    lines = ['<div class="wide"><table class="sortable"><thead><tr>']
    for name, kind in zip(columns, kinds, strict=True):
        label = f'<button type="button">{html.escape(name)}</button>'
        lines.append(f'<th scope="col"{kind}>{label}</th>')
    lines.append("</tr></thead><tbody>")
    for number, (row, key) in enumerate(zip(rows, keys, strict=True)):
        lines.append('<tr class="differs">' if number in differs else "<tr>")
        for cell, value, kind in zip(row, key, kinds, strict=True):
            text = "\n".join(html.escape(line) for line in cell)
            lines.append(f'<td{kind} data-key="{html.escape(sort_key(value))}">{text}</td>')
        lines.append("</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def html_picture(png, caption):
    """The bytes of a PNG image inside the page."""
    data = base64.b64encode(png).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def html_notes(notes):
    return '<div class="notes">' + "".join(f"<p>{html.escape(note)}</p>" for note in notes) + "</div>"


def html_settings(settings):
    """The settings of several runs, {run: {setting: value}}, as a table; those that differ first, and highlighted."""
    names = list(dict.fromkeys(name for values in settings.values() for name in values))

    def text(run, name):
        value = settings[run].get(name, "")
        if isinstance(value, list) and len(value) > 4:
            return f"{len(value)} entries: {value[0]} .. {value[-1]}"
        return value if isinstance(value, str) else json.dumps(value)

    differ = set(differing(settings.values(), names))
    names.sort(key=lambda name: name not in differ)
    rows = [[name, *(text(run, name) for run in settings)] for name in names]
    return html_table(["setting", *settings], [[[cell] for cell in row] for row in rows], rows, range(len(differ)))


def page(title, sections):
    """The whole page as text. `sections`: {heading: HTML of the functions above}."""
    names = {heading: f"section{number}" for number, heading in enumerate(sections)}
    links = " ".join(f'<a href="#{name}">{html.escape(heading)}</a>' for heading, name in names.items())
    parts = "\n".join(
        f'<h2 id="{names[heading]}">{html.escape(heading)}</h2>\n{content}' for heading, content in sections.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{CSS}</style></head><body>
<h1>{html.escape(title)}</h1>
<nav>{links}</nav>
{parts}
<script>{SCRIPT}</script>
</body></html>
"""
