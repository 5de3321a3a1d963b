"""Rows of metrics, a row per case and class, and what a table says of them."""

import csv
import io
import math

import numpy as np

METRICS = ("dice", "jaccard", "hd95", "asd")


def summarize(rows):
    """Per class: mean and standard deviation over cases of each metric, and over how many cases.

    `rows`: dicts with 'case', 'class' and METRICS. NaN (a distance to an empty mask) is left out of mean and deviation
    and counted: 'cases' counts all rows of the class, 'empty' those with a NaN. The deviation divides by the number of
    cases (ddof 0), as np.std in the family's tables.
    """
    summary = []
    for label in sorted({row["class"] for row in rows}):
        own = [row for row in rows if row["class"] == label]
        entry = {"class": label, "cases": len(own), "empty": sum(any(math.isnan(r[m]) for m in METRICS) for r in own)}
        for metric in METRICS:
            values = np.array([row[metric] for row in own], dtype=float)
            values = values[~np.isnan(values)]
            entry[metric] = {
                "mean": float(values.mean()) if len(values) else math.nan,
                "std": float(values.std()) if len(values) else math.nan,
            }
        summary.append(entry)
    return summary


def table(rows):
    """Rows and summary as aligned text: Dice and Jaccard in percent, distances in voxels."""
    several = len({row["class"] for row in rows}) > 1
    width = max([len(str(row["case"])) for row in rows] + [len("mean (std)")]) + 2
    headers = ("Dice %", "Jaccard %", "HD95 voxel", "ASD voxel")
    lines = [f"{'case':{width}}{'class' if several else '':6}" + "".join(f"{header:>18}" for header in headers)]
    scales = dict(zip(METRICS, (100, 100, 1, 1), strict=True))
    for row in rows:
        cells = "".join(f"{scales[m] * row[m]:18.2f}" for m in METRICS)
        lines.append(f"{row['case']:{width}}{row['class'] if several else '':<6}{cells}")
    for entry in summarize(rows):
        pairs = (f"{scales[m] * entry[m]['mean']:.2f} ({scales[m] * entry[m]['std']:.2f})" for m in METRICS)
        cells = "".join(f"{pair:>18}" for pair in pairs)
        lines.append(f"{'mean (std)':{width}}{entry['class'] if several else '':<6}{cells}")
        if entry["empty"]:
            lines.append(
                f"{entry['empty']} of {entry['cases']} cases have an empty mask: they count in Dice and Jaccard, but "
                f"have no distances"
            )
    return "\n".join(lines)


def to_csv(rows):
    """Rows as CSV text; Dice and Jaccard in 0 .. 1; nan where a distance is not defined."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ("case", "class", *METRICS), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def without_nan(value):
    """`value` with every NaN as None, all the way down: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
