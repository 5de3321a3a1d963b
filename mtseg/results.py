"""Rows of metrics, a row per case and class, and what a table says of them.

A row is {'case': name, 'class': label, <metric>: value, ...}; rows need not hold the same metrics. A value that is
missing, None (JSON has no NaN) or NaN is not defined there. Metrics that METRICS does not name are shown as they are;
what is text is no metric.
"""

import csv
import io
import math

import numpy as np

# Heading, and kind: a share of 1, shown in %; a distance, whose heading carries the unit.
METRICS = {
    "dice": ("Dice", "share"),
    "jaccard": ("Jaccard", "share"),
    "precision": ("Precision", "share"),
    "recall": ("Recall", "share"),
    "specificity": ("Specificity", "share"),
    "accuracy": ("Accuracy", "share"),
    "f1": ("F1", "share"),
    "volume_similarity": ("Volume similarity", "share"),
    "hd": ("HD", "distance"),
    "hd95": ("HD95", "distance"),
    "asd": ("ASD", "distance"),
    "assd": ("ASSD", "distance"),
    "nsd": ("NSD", "share"),
}


def is_distance(metric):
    return METRICS.get(metric, ("", ""))[1] == "distance"


def scale(metric):
    """100 for a share, which tables show in %, else 1."""
    return 100 if METRICS.get(metric, ("", ""))[1] == "share" else 1


def heading(metric, unit=""):
    """'Dice %', 'HD95 mm'; `unit` is that of distances, '' leaves it out. A metric not in METRICS keeps its name."""
    name, kind = METRICS.get(metric, (metric, ""))
    return f"{name} {({'share': '%', 'distance': unit}).get(kind, '')}".strip()


def csv_cell(value):
    """`value` for a cell of a CSV file. Text that a spreadsheet would run as a formula gets a ' in front."""
    if not isinstance(value, str) or value[:1] not in tuple("=+-@\t\r"):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def metrics_of(rows):
    """The metrics that the rows hold: those of METRICS in its order, then others in the rows' order."""
    held = [key for row in rows for key in row if key not in ("case", "class") and not isinstance(row[key], str)]
    return [key for key in METRICS if key in held] + [key for key in dict.fromkeys(held) if key not in METRICS]


def _value(row, metric):
    value = row.get(metric)
    return math.nan if value is None else float(value)


def _is_empty(row):
    return any(math.isnan(_value(row, key)) for key in METRICS if is_distance(key) and key in row)


def _mean_std(values):
    values = np.array([value for value in values if not math.isnan(value)] or [math.nan])
    return {"mean": float(values.mean()), "std": float(values.std())}


def summarize(rows):
    """Per class: mean and standard deviation over cases of each metric, and over how many cases.

    Returns a list of {'class', 'cases', 'empty', <metric>: {'mean', 'std'}, ...}. NaN (a distance to an empty mask) is
    left out of mean and deviation and counted: 'cases' counts all rows of the class, 'empty' those without a distance.
    The deviation divides by the number of cases (ddof 0), as np.std in the family's tables.
    Of several classes a last entry, 'class': 'mean', has mean and deviation over cases of what is the mean over the
    classes in each. A case in which a class has no distance has no mean distance either, and is left out and counted
    in 'empty': means over other classes would not compare.
    """
    metrics, labels = metrics_of(rows), sorted({row["class"] for row in rows})
    groups = {label: [[row] for row in rows if row["class"] == label] for label in labels}
    if len(labels) > 1:
        groups["mean"] = list(_by_case(rows).values())
    summary = []
    for label, cases in groups.items():
        entry = {"class": label, "cases": len(cases), "empty": sum(any(map(_is_empty, case)) for case in cases)}
        for metric in metrics:
            entry[metric] = _mean_std(_mean_over_classes(case, metric) for case in cases)
        summary.append(entry)
    return summary


def _by_case(rows):
    cases = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def _mean_over_classes(rows, metric):
    """The mean over those of a case's rows that hold the metric; NaN where it is NaN in one, or none holds it."""
    values = [_value(row, metric) for row in rows if metric in row]
    return sum(values) / len(values) if values else math.nan


def case_means(rows, metric):
    """{case: mean of the metric over its classes}; NaN where it is not defined in one."""
    return {case: _mean_over_classes(classes, metric) for case, classes in _by_case(rows).items()}


def one_or_all(values):
    """The value that all have in common, or the list of them."""
    values = list(values)
    return values[0] if all(value == values[0] for value in values) else values


def table(rows, unit="voxel"):
    """Rows and summary as aligned text: what lies in [0, 1] in percent, distances in `unit`, 'voxel' or 'mm'.

    The header names the unit; the values must be in it, they are not converted. Another unit raises ValueError.
    """
    if unit not in ("voxel", "mm"):
        raise ValueError(f"distances are in 'voxel' or in 'mm', not in {unit!r}")
    metrics, several = metrics_of(rows), len({row["class"] for row in rows}) > 1
    lines = [["case", "class", *(heading(metric, unit) for metric in metrics)]]
    for row in rows:
        lines.append([str(row["case"]), str(row["class"]), *(f"{scale(m) * _value(row, m):.2f}" for m in metrics)])
    notes = []
    for entry in summarize(rows):
        cells = (f"{scale(m) * entry[m]['mean']:.2f} ({scale(m) * entry[m]['std']:.2f})" for m in metrics)
        lines.append(["mean (std)", str(entry["class"]), *cells])
        if entry["empty"] and entry["class"] != "mean":
            where = f" of class {entry['class']}" if several else ""
            notes.append(
                f"{entry['empty']} of {entry['cases']} cases have an empty mask{where}: they count in Dice and "
                f"the like, but have no distances"
            )
    lines = lines if several else [[case, *cells] for case, _, *cells in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = 2 if several else 1

    def aligned(line):
        cells = enumerate(zip(line, widths, strict=True))
        return "  ".join(cell.ljust(width) if i < words else cell.rjust(width + 1) for i, (cell, width) in cells)

    return "\n".join([*map(aligned, lines), *notes])


def to_csv(rows):
    """Rows as CSV text: unscaled (Dice in 0 .. 1), nan where a value is not defined, no formulas (csv_cell)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metrics = metrics_of(rows)
    writer.writerow(map(csv_cell, ("case", "class", *metrics)))
    for row in rows:
        writer.writerow([csv_cell(row["case"]), csv_cell(row["class"]), *(_value(row, metric) for metric in metrics)])
    return text.getvalue()


def without_nan(value):
    """`value` with every NaN as None, all the way down: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
