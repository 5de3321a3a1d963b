"""Rows of metrics, a row per case and class, and what a table says of them.

A row is {'case': name, 'class': number or name, <metric>: value, ...}; 'set' names the data set it belongs to where
there are several. Rows need not hold the same metrics. A value that is missing, None (JSON has no NaN) or NaN is not
defined there. Metrics that METRICS does not name are shown as they are; what is text is no metric. Classes and sets
are in the order in which they first appear.

Two ways to sum up a score over cases: the mean over the cases, as papers on medical volumes have it, where each case
counts alike; and the score of all their pixels together, from the summed numbers of pixels, as papers on micrographs
have it. The latter is called pooled.
"""

import csv
import io
import math

import numpy as np

COUNTS = ("tp", "fp", "fn", "tn")
SHARES = ("dice", "jaccard", "precision", "recall", "specificity", "accuracy", "pixel_accuracy", "f1")
# Heading, and kind: a share of 1, shown in %; a distance, whose heading carries the unit; a count of pixels, which is
# recorded, and no column of a table.
METRICS = {name: (name.replace("_", " ").capitalize(), "share") for name in (*SHARES, "volume_similarity")}
METRICS |= {name: (name.upper(), "distance") for name in ("hd", "hd95", "asd", "assd")}
METRICS |= {"nsd": ("NSD", "share"), **{name: (name.upper(), "count") for name in COUNTS}}
POOLED = ("dice", "jaccard", "precision", "recall", "pixel_accuracy")
METRICS |= {f"{metric}_pooled": (f"{METRICS[metric][0]} pooled", "share") for metric in POOLED}
OF_LARGEST = ("dice", "jaccard", "hd95", "asd")  # of the largest connected piece of a class alone
METRICS |= {f"{metric}_largest": (f"{METRICS[metric][0]} largest piece", METRICS[metric][1]) for metric in OF_LARGEST}


def kind_of(metric):
    """'share', 'distance', 'count', or '' of a metric that METRICS does not name."""
    return METRICS.get(metric, ("", ""))[1]


def is_distance(metric):
    return kind_of(metric) == "distance"


def scale(metric):
    """100 for a share, which tables show in %, else 1."""
    return 100 if kind_of(metric) == "share" else 1


def heading(metric, unit="", images=False):
    """'Dice %', 'HD95 mm'; `unit` is that of distances, '' leaves it out. A metric not in METRICS keeps its name.

    `images`: Jaccard is called IoU, as papers on images do.
    """
    name, kind = METRICS.get(metric, (metric, ""))
    name = name.replace("Jaccard", "IoU") if images else name
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


def in_neither(row):
    """Whether a row's class is neither in the label nor in the prediction: a Dice of 1, and no distance."""
    return _is_empty(row) and _value(row, "dice") == 1


def summarize(rows):
    """Per class: mean and standard deviation over cases of each metric, and over how many cases.

    Returns a list of {'class', 'cases', 'empty', <metric>: {'mean', 'std'}, ...}. NaN (a distance to an empty mask) is
    left out of mean and deviation and counted: 'cases' counts all rows of the class, 'empty' those without a distance.
    The deviation divides by the number of cases (ddof 0), as np.std in the family's tables.
    Of several classes a last entry, 'class': 'mean', has mean and deviation over cases of what is the mean over the
    classes in each. A case in which a class has no distance has no mean distance either, and is left out and counted
    in 'empty': means over other classes would not compare.
    Where the rows hold TP, FP, FN and TN, each entry has 'pooled': {metric: value} of all its pixels, 'mean' the mean
    over the classes of these. Of several sets each has its entries, with its name as 'set', before those of all rows.
    """
    sets = _grouped(rows, "set").items()
    of_sets = [{"set": name, **entry} for name, members in sets if len(sets) > 1 for entry in _entries(members)]
    return of_sets + _entries(rows)


def _entries(rows):
    """The entries of `summarize`, of all rows together."""
    metrics = [metric for metric in metrics_of(rows) if kind_of(metric) != "count"]
    groups = {label: [[row] for row in members] for label, members in _grouped(rows, "class").items()}
    if len(groups) > 1:
        groups["mean"] = list(_grouped(rows, "case").values())
    summary = []
    for label, cases in groups.items():
        entry = {"class": label, "cases": len(cases), "empty": sum(any(map(_is_empty, case)) for case in cases)}
        for metric in metrics:
            values = [_mean_over_classes(case, metric) for case in cases]
            defined = np.array([value for value in values if not math.isnan(value)] or [math.nan])
            entry[metric] = {"mean": float(defined.mean()), "std": float(defined.std())}
        pooled = {metric: _pooled([row for case in cases for row in case], metric) for metric in POOLED}
        if pooled := {metric: value for metric, value in pooled.items() if value is not None}:
            entry["pooled"] = pooled
        summary.append(entry)
    return summary


def pooled_parts(row, metric):
    """(part, whole, pixels in either mask) of a row, whose `metric` of POOLED is part / whole: summed over rows they go
    to `share_of`. None where the row does not hold the metric and the counts."""
    if any(row.get(name) is None for name in (metric, *COUNTS)):
        return None
    tp, fp, fn, tn = (row[name] for name in COUNTS)
    wholes = {"dice": 2 * tp + fp + fn, "jaccard": tp + fp + fn, "precision": tp + fp, "recall": tp + fn}
    whole = wholes.get(metric, tp + fp + fn + tn)
    return row[metric] * whole, whole, tp + fp + fn


def share_of(parts):
    """Array (...) of part / whole of sums (..., 3) of `pooled_parts`; as of one case, 0 where one of the masks is empty
    and 1 where both are."""
    part, whole, either = np.moveaxis(np.asarray(parts, dtype=float), -1, 0)
    return np.where(whole > 0, part / np.maximum(whole, 1), either == 0)


def _pooled(rows, metric):
    """A metric of POOLED over all pixels of the rows, of several classes the mean over them; None without counts."""
    if metric == "pixel_accuracy":
        rows = {row["case"]: row | {"class": ""} for row in rows}.values()  # each class of a case has the case's
    classes = [[pooled_parts(row, metric) for row in members] for members in _grouped(rows, "class").values()]
    if any(None in parts for parts in classes):
        return None
    return float(np.mean([share_of(np.sum(parts, axis=0)) for parts in classes]))


def _grouped(rows, name):
    """{what the rows hold under `name`: those rows}, in the order of the first of each."""
    groups = {}
    for row in rows:
        groups.setdefault(row.get(name, ""), []).append(row)
    return groups


def _mean_over_classes(rows, metric):
    """The mean over those of a case's rows that hold the metric; NaN where it is NaN in one, or none holds it."""
    values = [_value(row, metric) for row in rows if metric in row]
    return sum(values) / len(values) if values else math.nan


def case_means(rows, metric):
    """{case: mean of the metric over its classes}; NaN where it is not defined in one."""
    return {case: _mean_over_classes(classes, metric) for case, classes in _grouped(rows, "case").items()}


def one_or_all(values):
    """The value that all have in common, or the list of them."""
    values = list(values)
    return values[0] if all(value == values[0] for value in values) else values


def table(rows, unit="voxel", pooled=False):
    """Rows and summary as aligned text: what lies in [0, 1] in percent, distances in `unit`, such as 'voxel' or 'um'.

    The header names the unit; the values must be in it, they are not converted. Of several sets the rows and the
    summary of each come first, then the summary of all.
    `pooled`: for images: below each mean a line with the scores of all pixels together, and IoU for Jaccard.
    """
    metrics = [metric for metric in metrics_of(rows) if kind_of(metric) != "count"]
    sets, several = _grouped(rows, "set"), len({row["class"] for row in rows}) > 1
    sets = sets if len(sets) > 1 else {}
    lines, notes = [["set", "case", "class", *(heading(metric, unit, pooled) for metric in metrics)]], []
    summary = summarize(rows)
    for name, members in {**sets, None: [] if sets else rows}.items():
        for row in members:
            cells = (f"{scale(m) * _value(row, m):.2f}" for m in metrics)
            lines.append([str(name), str(row["case"]), str(row["class"]), *cells])
        for entry in (entry for entry in summary if entry.get("set") == name):
            cells = (f"{scale(m) * entry[m]['mean']:.2f} ({scale(m) * entry[m]['std']:.2f})" for m in metrics)
            head = ["all" if name is None else name, "mean (std)", str(entry["class"])]
            lines.append([*head, *cells])
            if pooled and (shares := entry.get("pooled")):
                cells = (f"{100 * shares[m]:.2f}" if m in shares else "" for m in metrics)
                lines.append([head[0], "pooled", head[2], *cells])
            if entry["empty"] and entry["class"] != "mean" and name is None:
                where = f" of class {entry['class']}" if several else ""
                masks = f"{entry['empty']} of {entry['cases']} cases have an empty mask{where}"
                neither = sum(in_neither(row) for row in rows if row["class"] == entry["class"])
                full = f" ({neither} with 100 %, as label and prediction are empty)" if neither else ""
                notes.append(f"{masks}: they count in Dice and the like{full}, but have no distances")
    if any(line[1] == "pooled" for line in lines):
        notes.append("mean (std): over the images, each counts alike; pooled: of the pixels of all images together")
    lines = [[*line[not sets : 2], *line[2 if several else 3 :]] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = 1 + bool(sets) + several

    def aligned(line):
        cells = enumerate(zip(line, widths, strict=True))
        return "  ".join(cell.ljust(width) if i < words else cell.rjust(width + 1) for i, (cell, width) in cells)

    return "\n".join([*map(aligned, lines), *notes])


def to_csv(rows):
    """Rows as CSV text: unscaled (Dice in 0 .. 1), nan where a value is not defined, no formulas (csv_cell)."""
    metrics = metrics_of(rows)
    heads = [*(["set"] if any("set" in row for row in rows) else []), "case", "class"]
    lines = [[*heads, *metrics]]
    for row in rows:
        numbers = (row[m] if kind_of(m) == "count" and m in row else _value(row, m) for m in metrics)
        lines.append([*(row.get(head, "") for head in heads), *numbers])
    return csv_text(lines)


def csv_text(lines):
    """Lines, a list of cells each, as CSV without formulas."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(csv_cell, line) for line in lines)
    return text.getvalue()


def without_nan(value):
    """`value` with every NaN as None, all the way down: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
