"""A table as aligned text, Markdown, LaTeX or CSV.

A table is an object with `columns`: headings; `rows`: for each a list of cells, a cell a list of lines; `notes`:
sentences beneath; `records`: the same as flat dicts, for CSV. A cell of "-" is unknown.
"""

import csv
import io
import math
import textwrap

# The columns of words; all others are set flush right.
WORDS = ("dataset", "method", "statistic", "selection", "source")


def to_text(table):
    """The table as aligned text, and its notes beneath."""
    numeric = [name not in WORDS for name in table.columns]
    blocks = [[[name] for name in table.columns], *table.rows]
    widths = [max(len(line) for block in blocks for line in block[i]) for i in range(len(table.columns))]
    lines = []
    for block in blocks:
        for n in range(max(map(len, block))):
            texts = [cell[n] if n < len(cell) else "" for cell in block]
            padded = (t.rjust(w) if right else t.ljust(w) for t, w, right in zip(texts, widths, numeric, strict=True))
            lines.append("  ".join(padded).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    notes = (textwrap.fill(note, max(80, min(120, len(lines[1]))), subsequent_indent="  ") for note in table.notes)
    return "\n".join([*lines, "", *notes]) + "\n"


def to_markdown(table):
    """The table in GitHub's Markdown, lines of a cell parted by <br>."""

    def cell(lines):
        return "<br>".join(line.replace("|", "\\|").replace("<0", "&lt;0") for line in lines)

    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in table.rows]
    return "\n".join([*lines, "", *(f"{note}  " for note in table.notes)]) + "\n"


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

    numeric = [name not in WORDS for name in table.columns]
    blocks = []
    for row in table.rows:
        texts = ([escape(cell[n]) if n < len(cell) else "" for cell in row] for n in range(max(map(len, row))))
        blocks.append("\n".join(" & ".join(line) + r" \\" for line in texts))
    return (
        "\n".join(
            [
                r"% needs \usepackage{booktabs}",
                r"\begin{tabular}{@{}" + "".join("r" if right else "l" for right in numeric) + "@{}}",
                r"\toprule",
                " & ".join(map(escape, table.columns)) + r" \\",
                r"\midrule",
                "\n\\addlinespace\n".join(blocks),
                r"\bottomrule",
                r"\end{tabular}",
                "",
                r"{\footnotesize",
                *(escape(note) + r"\par" for note in table.notes),
                "}",
            ]
        )
        + "\n"
    )


def to_csv(table):
    """A line per row and class with every number, shares in 0 .. 1; what is unknown or not defined is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table.records[0]), lineterminator="\n")
    writer.writeheader()
    for record in table.records:
        unknown = {k for k, v in record.items() if v is None or (isinstance(v, float) and math.isnan(v))}
        writer.writerow({k: "" if k in unknown else v for k, v in record.items()})
    return text.getvalue()


FORMATS = {"text": to_text, "markdown": to_markdown, "latex": to_latex, "csv": to_csv}
