"""A table as aligned text, Markdown, LaTeX or CSV.

A table is a table.Table; a cell of "-" is unknown. Names come from files of other people: no format lets one of them
become a command, a link, a tag or a formula.
"""

import itertools
import math
import re
import textwrap

from mtseg.results import csv_text

# The columns of words; all others are set flush right.
WORDS = ("dataset", "method", "statistic", "published", "selection")
WORDS += ("stage", "script", "data", "from", "parts", "strategy", "round", "network")


def to_text(table):
    """The table as aligned text, and its notes beneath."""
    lines = [table.columns, *(line for row in table.rows for line in itertools.zip_longest(*row, fillvalue=""))]
    padded = []
    for name, column in zip(table.columns, zip(*lines, strict=True), strict=True):
        width = max(map(len, column))
        padded.append([text.ljust(width) if name in WORDS else text.rjust(width) for text in column])
    lines = ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]
    lines.insert(1, "-" * max(map(len, lines)))
    notes = (textwrap.fill(note, max(80, min(120, len(lines[1]))), subsequent_indent="  ") for note in table.notes)
    return "\n".join([*lines, "", *notes]) + "\n"


# What would be a tag, a link, an image, code or the end of a cell.
MARKDOWN = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "\\\\", "`": "\\`", "|": "\\|", "](": "]\\("}


def to_markdown(table):
    """The table in GitHub's Markdown, lines of a cell parted by <br>."""

    def escape(text):
        return re.sub(r"\]\(|[&<>\\`|]", lambda special: MARKDOWN[special[0]], text)

    def line(cells):
        return "| " + " | ".join("<br>".join(map(escape, cell)) for cell in cells) + " |"

    lines = [line([name] for name in table.columns), "|" + "---|" * len(table.columns), *map(line, table.rows)]
    return "\n".join([*lines, "", *(f"{escape(note)}  " for note in table.notes)]) + "\n"


LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"},
    **{"†": r"$^{\dagger}$", "‡": r"$^{\ddagger}$", "§": r"\S{}", "¶": r"\P{}", "‖": r"$^{\|}$"},
    **{"<": "$<$", ">": "$>$"},
}


def to_latex(table):
    """The table as a LaTeX tabular in the style of booktabs, the notes beneath it."""

    def escape(text):
        return "--" if text == "-" else "".join(LATEX.get(character, character) for character in text)

    def line(cells):
        joined = " & ".join(map(escape, cells)) + r" \\"
        return "{}" + joined if joined.startswith(("[", "*")) else joined  # not arguments of the line's end before it

    alignment = "".join("l" if name in WORDS else "r" for name in table.columns)
    blocks = ["\n".join(map(line, itertools.zip_longest(*row, fillvalue=""))) for row in table.rows]
    lines = [
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{@{{}}{alignment}@{{}}}}",
        r"\toprule",
        line(table.columns),
        r"\midrule",
        "\n\\addlinespace\n".join(blocks),
        r"\bottomrule",
        r"\end{tabular}",
        "",
        r"{\footnotesize",
        *(escape(note) + r"\par" for note in table.notes),
        "}",
    ]
    return "\n".join(lines) + "\n"


def to_csv(table):
    """A line per row and class with every number, shares in 0 .. 1; what is unknown or not defined is empty."""

    def cell(value):
        return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value

    return csv_text([[*table.records[0]], *(map(cell, record.values()) for record in table.records)])


FORMATS = {"text": to_text, "markdown": to_markdown, "latex": to_latex, "csv": to_csv}
