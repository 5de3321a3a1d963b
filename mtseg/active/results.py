"""What a simulation of active learning gives, as tables; figures.label_curves draws it.

`records` are dicts, one for each strategy, seed and round: "strategy"; "seed"; "round", from 0, the start that all
strategies of a seed have in common; "regions", "voxels" and "foreground", how many of each are annotated by then, and
"cases", in how many they are; and "dice", the mean of the test cases in 0..1. All figures are over the same seeds for
every strategy.
"""

import math

import numpy as np

from mtseg import label_curves
from mtseg.report.table import UNKNOWN, Table

MEASURES = ("regions", "voxels", "foreground", "cases", "dice")


def finished(records):
    """({strategy: {measure: float (seeds, R)}}, sentences on what these are of and what is left out).

    The seeds are those of which every strategy has all R rounds; a strategy without any such seed is left out. There
    is no strategy where no seed remains.
    """
    runs, done = {}, {}
    for record in records:
        runs.setdefault((record["strategy"], record["seed"]), {})[record["round"]] = record
    rounds = sorted({number for run in runs.values() for number in run})
    for (strategy, seed), run in runs.items():
        done.setdefault(strategy, set()).update({seed} if len(run) == len(rounds) else ())
    notes = [f"Left out: {strategy}, which has finished no seed." for strategy, seeds in done.items() if not seeds]
    done = {strategy: seeds for strategy, seeds in done.items() if seeds}
    seeds = sorted(set.intersection(*done.values())) if done else []
    for seed in sorted({seed for _, seed in runs} - set(seeds)):
        missing = [strategy for strategy in done if seed not in done[strategy]]
        notes.append(f"Left out: seed {seed}, not finished by {', '.join(missing)}.")
    if not seeds:
        return {}, ["No seed is finished by all strategies.", *notes]
    of = f"seeds: {', '.join(map(str, seeds))}; rounds: {rounds[0]} to {rounds[-1]}"
    return {
        strategy: {m: np.array([[runs[strategy, s][r][m] for r in rounds] for s in seeds], float) for m in MEASURES}
        for strategy in done
    }, [f"Means ± SD (n - 1); {of}.", *notes]


def beats(runs):
    """float (S, S): the penalty_matrix of the rounds after the common start; NaN with itself and of a single seed."""
    matrix = np.full((len(runs), len(runs)), math.nan)
    scores = [run["dice"].T[1:] for run in runs.values()]
    if scores and min(scores[0].shape) and scores[0].shape[1] > 1:
        matrix = label_curves.penalty_matrix(scores)
    np.fill_diagonal(matrix, math.nan)
    return matrix


def table(records, ceiling=(), reference="foreground66", foreground=None):
    """A Table with a row for each strategy, compared with the strategy `reference`.

    `ceiling`: Dice with all labels, of a seed each; `foreground`: how many foreground voxels the training cases have.
    Without either the foreground efficiency is unknown. CurveError for a strategy that annotates nothing in a round.
    """
    runs, notes = finished(records)
    areas = {
        name: np.array([label_curves.area_under(*curve) for curve in zip(run["regions"], run["dice"], strict=True)])
        for name, run in runs.items()
    }
    others = [name for name in dict.fromkeys((reference, "random")) if name in runs]
    means = {name: (run["regions"].mean(axis=0), run["dice"].mean(axis=0)) for name, run in runs.items()}
    rows = []
    for (name, run), losses in zip(runs.items(), beats(runs).T, strict=True):
        above, p, efficiency = UNKNOWN, UNKNOWN, math.nan
        if reference in runs and name != reference:
            gains = 100 * (areas[name] - areas[reference])
            above = f"{gains.mean():+.2f}"
            if len(gains) > 1:
                low, high = label_curves.paired_interval(gains)
                p = label_curves.paired_p(gains)
                above, p = f"{above} [{low:+.2f}, {high:+.2f}]", "<0.001" if p < 0.001 else f"{p:.3f}"
        if len(ceiling) and foreground:
            shares = run["foreground"] / foreground
            efficiency = label_curves.foreground_efficiency(shares, run["dice"], np.mean(ceiling))
        cells = [name, mean_sd(100 * areas[name]), above, p, mean_sd(100 * run["dice"][:, -1])]
        cells += [mean_sd(run[measure][:, -1], 0) for measure in ("foreground", "cases")]
        for other in others:
            needed = label_curves.labels_needed(*means[other], means[name][1][-1])
            cells.append(f"more than {means[other][0][-1]:.0f}" if needed == math.inf else f"{needed:.0f}")
        beaten = losses[~np.isnan(losses)]
        cells += [number(efficiency, 1), number(beaten.mean()) if len(beaten) else UNKNOWN]
        rows.append([[cell] for cell in cells])
    columns = ["strategy", "area %", f"above {reference}", "p", "last Dice %", "foreground voxels", "cases"]
    columns += [f"regions of {name}" for name in others] + ["efficiency", "beaten"]
    notes += [
        "area: under the curve of Dice over regions, scaled to [0, 1]; above: its differences, paired by seed, with "
        "95 % interval and p of Student's t, not corrected for several tests.",
        "cases: in how many the regions are; few, where they lie side by side.",
        "regions of: how many the strategy named there needs, on its mean curve, for the same last Dice.",
        "efficiency: b of Dice = c - a exp(-b (x - x0)), x the share of the foreground voxels that is annotated, x0 "
        "the least, c the Dice with all labels.",
        "beaten: share of the rounds after the start in which another is better with p < 0.05, mean over the others.",
    ]
    if len(ceiling):
        notes.append(f"With all labels: Dice {mean_sd(100 * np.asarray(ceiling))} %.")
    if reference not in runs:
        notes.append(f"No comparison: {reference} is not there or has finished no seed.")
    return Table(columns, rows, [], notes, [])


def wins(records):
    """A Table of the share of rounds in which the row's strategy is significantly better than the column's."""
    runs, notes = finished(records)
    rows = [[[text] for text in (name, *map(number, row))] for name, row in zip(runs, beats(runs), strict=True)]
    notes.append("Share of the rounds after the start in which the row beats the column: paired t-test, p < 0.05.")
    return Table(["strategy", *runs], rows, [], notes, [])


def number(value, digits=2):
    return UNKNOWN if math.isnan(value) else f"{value:.{digits}f}"


def mean_sd(values, digits=2):
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"
