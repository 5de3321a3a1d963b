"""The rows of a report as lines on the screen and as a table in Markdown, and the table's place in a file."""

import sys
from statistics import median

from measure import ratio

from mtseg.checkpoint import write_whole

VERDICTS = {True: "reached", False: "not reached", None: "not judged"}


def verdicts(entry):
    goals = [f"{words}: {VERDICTS[reached]}" for words, reached in entry["goals"].items()]
    return "; ".join([*goals, *(f"NOT THE SAME: {sentence}" for sentence in entry.get("differs", ()))])


def show(entry):
    print(f"\n{entry['what']}")
    for name, times in entry.get("seconds", {}).items():
        low, middle, high = (1000 * value for value in (min(times), median(times), max(times)))
        print(f"  {name:22}{middle:12.3f} ms   [{low:.3f} .. {high:.3f}]   {ratio(entry['seconds'], name):9.2f} x")
    for line in filter(None, (entry["note"], verdicts(entry) and f"to reach: {verdicts(entry)}")):
        print(f"  {line}")
    sys.stdout.flush()


def table(report):
    """The rows of a report as a table in Markdown, below a line about the machine."""

    def words(times):
        low, middle, high = (f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms" for value in spread(times))
        return f"{middle} ({low} .. {high})"

    def spread(times):
        return min(times), median(times), max(times)

    lines = [
        f"`python benchmarks/run.py {' '.join(report['command'])}`, {report['minutes']:.0f} minutes; "
        + ", ".join(f"{name} {value}" for name, value in report["machine"].items()),
        "",
        "| what | mtseg: median (smallest .. largest) | beside it, and mtseg is so many times as fast | to reach |",
        "|---|---|---|---|",
    ]
    for entry in report["rows"]:
        times = entry.get("seconds", {"mtseg": []})
        others = [f"{way} {words(times[way])}: {ratio(times, way):.2f} x" for way in times if way != "mtseg"]
        ours = words(times["mtseg"]) if times["mtseg"] else entry["note"]
        note = f" ({entry['note']})" if entry["note"] and times["mtseg"] else ""
        lines.append(f"| {entry['what']}{note} | {ours} | {'; '.join(others)} | {verdicts(entry)} |")
    return "\n".join(lines) + "\n"


def put_figures(path, text):
    """Put `text` between the marks in the file `path`; ValueError where it has none."""
    before, start, rest = path.read_text().partition("<!-- figures -->\n")
    _, end, after = rest.partition("<!-- end of figures -->")
    if not end:
        raise ValueError(f"{path}: no lines <!-- figures --> and <!-- end of figures -->; mark where the table goes")
    write_whole(path, (before + start + text + end + after).encode())
