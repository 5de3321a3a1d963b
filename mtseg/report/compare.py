"""Which rows of a table stand beside which: the baseline, and marks for what cannot be compared."""

import re

from mtseg.report.read import ReportError
from mtseg.report.rows import frozen, plain_setting, without_common_folders

MARKS = "†‡§¶‖"


def find_baseline(rows, words):
    """The rows that `words` names, one for each data set, number of labels and draw of the labelled cases; ReportError
    if none or several.

    Each word is one of a row's name (method, settings, weights) or its number of labels. A row whose name has no
    further word, but those of its draw, goes before those that have.
    """

    def words_of(text):
        one_word = re.sub(r"labeled_draw (\d+)", r"labeled_draw=\1", text)  # its number may be that of the labels, too
        return re.sub("[(),;]", " ", one_word).split()

    wanted = set(words_of(words))
    known = {id(row): {*words_of(row.name), str(row.labelnum)} for row in rows}
    named = [row for row in rows if wanted <= known[id(row)]]
    free = {id(row): {str(row.labelnum), f"labeled_draw={row.draw}"} for row in named}
    named = [row for row in named if known[id(row)] <= wanted | free[id(row)]] or named
    if not named:
        names = "; ".join(f"{row.name} {row.labelnum}" for row in rows)
        raise ReportError(f"--baseline {words!r} names no row; there are: {names}")
    for row in named:
        twin = next((r for r in named if _place(r) == _place(row) and r is not row), None)
        if twin:
            places = " and ".join(f"{r.name} ({r.results[0].path.parent})" for r in (row, twin))
            # What only one of them is called; a row that lacks such a word is meant by all of its words.
            more = [sorted(known[id(a)] - known[id(b)]) for a, b in ((row, twin), (twin, row))]
            calls = [[*words_of(words), *m] if m else words_of(r.name) for m, r in zip(more, (row, twin), strict=True)]
            how = " or ".join(f"--baseline {' '.join(call)!r}" for call in calls)
            how = how if any(more) else "leave one of them out"
            raise ReportError(f"--baseline {words!r} names two rows with {row.labelnum} labels, {places}; {how}")
    return named


def _place(row):
    """What `row` and its baseline share: the data set, how many cases are labelled, and by which draw."""
    return row.dataset, row.labelnum, row.draw


def baseline_of(row, baselines):
    """The baseline for `row`: that with as many labels, of the same cases, on the same data, or the only one there is;
    None without."""
    alike = [b for b in baselines if b.dataset == row.dataset]
    return next((b for b in alike if _place(b) == _place(row)), alike[0] if len(alike) == 1 else None)


def mark_rows(rows, reference):
    """Fill in the `differences` of each row from `reference`, its `faults`, whatever it stands beside, and the `mark`
    of a row that has either; returns the footnotes, sentences that begin with the mark.

    A row of a set stands beside the row of that set that has the reference's name, or else beside the set's first.
    What one of two rows does not record counts as no difference.
    """
    footnotes = {}
    for row in rows:
        other = reference
        if "set" in row.results[0].cases[0]:
            own = [r for r in rows if r.dataset == row.dataset]
            other = next((r for r in own if (r.name, r.labelnum) == (reference.name, reference.labelnum)), own[0])
        row.faults, row.differences = _faults(row, other), _differences(row, other)
        if row.incomparable:
            beside = f"not comparable with {other.name}: {'; '.join(row.differences)}"
            why = "; ".join([*row.faults, beside] if row.differences else row.faults)
            repeats, which = divmod(len(footnotes), len(MARKS))
            row.mark = footnotes.setdefault(why, MARKS[which] * (repeats + 1))
    return [f"{mark} {why}." for why, mark in footnotes.items()]


def _faults(row, reference):
    """What is wrong with a row's figures, whatever stands beside them; a selection only where it is no difference."""
    faults = []
    if looks := max(len(result.looks) for result in row.results):
        faults.append(
            f"tested at {looks + 1} iterations: all figures are the last one's, inflation is what the best of them on "
            f"these cases has more"
        )
    if row.selection == reference.selection == "test set":
        faults.append("checkpoint selected by test set")
    if count := len(row.trained_on):
        faults.append(f"tested on {count} case{'s' if count > 1 else ''} that it was trained on")
    if any(result.replaced for result in row.results):
        faults.append("the tested weights have been replaced since")
    return faults


def _differences(row, reference):
    """What keeps a row from being compared with `reference`."""
    reasons = []
    if row.dataset != reference.dataset:
        reasons.append(f"dataset {row.dataset}, not {reference.dataset}")
    elif row.case_names() != reference.case_names():
        cases, others = set(row.case_names()), set(reference.case_names())
        reasons.append(f"other test cases ({len(cases)}, of which {len(cases & others)} are among the {len(others)})")
    if set(row.classes()) != set(reference.classes()):
        reasons.append("other classes")
    if row.unit != reference.unit:
        reasons.append(f"distances in {row.unit}, not {reference.unit}")
    for name in sorted(row.protocol.keys() & reference.protocol.keys()):
        ours, theirs = row.protocol[name], reference.protocol[name]
        if frozen(ours) != frozen(theirs):
            reasons.append(f"{name} {plain_setting(ours)}, not {plain_setting(theirs)}")
    one, other = row.results[0], reference.results[0]
    if one.input != other.input:
        names = [name and f"the scans in {name}" for name in without_common_folders([one.input, other.input])]
        reasons.append(f"tested on {names[0] or 'the cases of a list'}, not on {names[1] or 'the cases of a list'}")
    elif not one.input and one.preprocessing and other.preprocessing and one.preprocessing != other.preprocessing:
        # Scans are measured on their own grid, however they were prepared; volumes of a list are not.
        reasons.append("volumes were prepared in another way")
    if row.selection != reference.selection:
        reasons.append(f"checkpoint selected by {row.selection}, not {reference.selection}")
    return reasons
