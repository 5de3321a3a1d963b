"""What a simulation of active learning gives, against SciPy's tests, closed forms and the lines that are drawn."""

import json

import numpy as np
import pytest
from scipy import integrate, stats

from mtseg import figures
from mtseg.active import simulation
from mtseg.active.results import finished, table, wins
from mtseg.report import to_latex, to_markdown, to_text

RATES = {"random": 4.0, "foreground66": 7.0, "clasp_pe": 8.0}
FOREGROUND = 10**6


def simulated(seeds=(1, 2, 3, 4), rates=RATES, rounds=5, noise=0.01):
    """Dice 0.9 - 0.35 exp(-b x) of the share x of foreground voxels, with noise; the same start for all of a seed."""
    records = []
    for number, (strategy, rate) in enumerate(rates.items()):
        for seed in seeds:
            start, rng = np.random.default_rng(seed), np.random.default_rng([seed, number])
            for r in range(rounds):
                regions, share = 20 + 10 * r, 0.05 * (1 + r)
                dice = 0.9 - 0.35 * np.exp(-rate * (share - 0.05)) + noise * (rng if r else start).standard_normal()
                record = {"strategy": strategy, "seed": seed, "round": r, "regions": regions, "cases": 5 + r}
                records.append(record | {"voxels": regions * 4096, "foreground": share * FOREGROUND, "dice": dice})
    return records


def dices(records, strategy):
    of = [r for r in records if r["strategy"] == strategy]
    seeds = sorted({r["seed"] for r in of})
    return np.array([[r["dice"] for r in of if r["seed"] == seed] for seed in seeds])


def cells_of(table):
    return {cells[0][0]: dict(zip(table.columns, ("\n".join(c) for c in cells), strict=True)) for cells in table.rows}


def test_the_table_against_scipy():
    records = simulated()
    cells = cells_of(table(records, [0.9, 0.91, 0.89], foreground=FOREGROUND))
    assert list(cells) == list(RATES)
    areas = {name: 100 * integrate.trapezoid(dices(records, name), dx=1 / 4, axis=1) for name in RATES}
    for name, area in areas.items():
        last = 100 * dices(records, name)[:, -1]
        assert cells[name]["area %"] == f"{area.mean():.2f} ± {area.std(ddof=1):.2f}"
        assert cells[name]["last Dice %"] == f"{last.mean():.2f} ± {last.std(ddof=1):.2f}"
        assert (cells[name]["foreground voxels"], cells[name]["cases"]) == ("250000 ± 0", "9 ± 0")
        if name != "foreground66":
            test = stats.ttest_rel(area, areas["foreground66"])
            low, high = test.confidence_interval(0.95)
            mean = (area - areas["foreground66"]).mean()
            assert cells[name]["above foreground66"] == f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
            assert cells[name]["p"] == ("<0.001" if test.pvalue < 0.001 else f"{test.pvalue:.3f}")
    assert cells["foreground66"]["above foreground66"] == cells["foreground66"]["p"] == "-"


def test_regions_and_efficiency_without_noise():
    records = simulated(noise=0)
    shown = table(records, [0.9], foreground=FOREGROUND)
    cells = cells_of(shown)
    assert [cells[name]["efficiency"] for name in RATES] == ["4.0", "7.0", "8.0"]
    # Chance has by its last round what the reference has by 4 / 7 of the way from 20 to 60, and by chords a bit later.
    dice = dices(records, "foreground66")[0]
    needed = np.interp(dices(records, "random")[0, -1], dice, [20, 30, 40, 50, 60])
    assert cells["random"]["regions of foreground66"] == f"{needed:.0f}" == "43"
    assert cells["foreground66"]["regions of foreground66"] == cells["random"]["regions of random"] == "60"
    assert cells["clasp_pe"]["regions of foreground66"] == cells["clasp_pe"]["regions of random"] == "more than 60"
    assert "With all labels: Dice 90.00 %." in shown.notes
    for ceiling, foreground in (([], FOREGROUND), ([0.9], None), ([0.3], FOREGROUND)):
        assert {row["efficiency"] for row in cells_of(table(records, ceiling, foreground=foreground)).values()} == {"-"}
    assert "regions of random" in table(records, reference="random").columns  # once
    none = table(records, reference="random33")
    assert {row["above random33"] for row in cells_of(none).values()} == {"-"}
    assert none.notes[-1] == "No comparison: random33 is not there or has finished no seed."


def test_who_beats_whom_after_the_common_start():
    records = simulated()
    cells, beaten = cells_of(wins(records)), cells_of(table(records))
    for one in RATES:
        assert cells[one][one] == "-"
        lost = []
        for other in set(RATES) - {one}:
            a, b = dices(records, other)[:, 1:], dices(records, one)[:, 1:]
            tests = [stats.ttest_rel(a[:, r], b[:, r], alternative="greater").pvalue < 0.025 for r in range(4)]
            lost.append(np.mean(tests))
            assert cells[other][one] == f"{lost[-1]:.2f}"
        assert beaten[one]["beaten"] == f"{np.mean(lost):.2f}"
    assert float(beaten["random"]["beaten"]) > float(beaten["clasp_pe"]["beaten"])


def test_test_cases_that_were_learned_from_are_said(tmp_path, monkeypatch, capsys):
    weights = tmp_path / "run/iter_1.pth"
    monkeypatch.setattr(simulation.methods, "trained_weights", lambda *_: weights)
    (tmp_path / "run/iter_1_test").mkdir(parents=True)
    rows = [{"case": case, "class": 1, "dice": dice} for case, dice in (("a", 0.5), ("b", 1.0))]
    for known in ([], ["a"]):
        result = tmp_path / "run/iter_1_test/metrics.json"
        result.write_text(json.dumps({"checkpoint": str(weights), "cases": rows, "trained_on": known}))
        assert simulation.dice_of(None, None, [], tmp_path / "run", tmp_path, 1) == 0.75
        assert ("1 of the cases of" in capsys.readouterr().out) == bool(known)


def test_only_seeds_that_all_have_finished():
    records = simulated()
    last = {("random", 4, 4), ("clasp_pe", 2, 4), ("clasp_pe", 2, 3)}
    cut = [r for r in records if (r["strategy"], r["seed"], r["round"]) not in last]
    cut += simulated(seeds=(1,), rates={"mean_teacher: margin": 5.0}, rounds=3)
    both = [r for r in records if r["seed"] in (1, 3)]
    shown = table(cut, [0.9], foreground=FOREGROUND)
    assert shown.rows == table(both, [0.9], foreground=FOREGROUND).rows
    assert wins(cut).rows == wins(both).rows
    said = [
        "Means ± SD (n - 1); seeds: 1, 3; rounds: 0 to 4.",
        "Left out: mean_teacher: margin, which has finished no seed.",
        "Left out: seed 2, not finished by clasp_pe.",
        "Left out: seed 4, not finished by random.",
    ]
    assert shown.notes[:4] == wins(cut).notes[:4] == finished(cut)[1] == said
    assert table(records[::-1]).rows == table(records).rows[::-1]  # in the order of the records


def test_one_seed_one_round_and_nothing():
    one = cells_of(table(simulated(seeds=(7,))))
    assert "±" not in one["clasp_pe"]["area %"] and "[" not in one["clasp_pe"]["above foreground66"]
    assert one["clasp_pe"]["p"] == one["clasp_pe"]["beaten"] == "-"
    assert {cell for row in wins(simulated(seeds=(7,))).rows for (cell,) in row[1:]} == {"-"}
    start = cells_of(table(simulated(rounds=1), [0.9], foreground=FOREGROUND))
    assert start["random"]["area %"] == start["clasp_pe"]["last Dice %"]
    assert start["random"]["efficiency"] == start["random"]["beaten"] == "-"
    for records in ([], simulated(seeds=(1,), rates={"random": 4}) + simulated(seeds=(2,), rates={"entropy": 4})):
        for empty in (table(records), wins(records)):
            assert empty.rows == [] and empty.notes[0] == "No seed is finished by all strategies."
            assert all(write(empty) for write in (to_text, to_markdown, to_latex))
    assert "seed 2, not finished by random." in " ".join(table(records).notes)


def test_the_curves_show_means_deviations_and_the_ceiling():
    plt = pytest.importorskip("matplotlib.pyplot", reason="pictures need Matplotlib")
    from test_figures import texts_that_overlap

    records = simulated()
    with figures.style():
        figure = figures.label_curves(records, [0.9, 0.92])
        axes = figure.axes
        assert [a.get_xlabel() for a in axes] == [
            "annotated regions",
            "annotated voxels",
            "annotated foreground voxels",
        ]
        for a, xs in zip(axes, ([20, 30, 40, 50, 60], None, FOREGROUND * 0.05 * np.arange(1, 6)), strict=True):
            assert a.lines[0].get_ydata() == pytest.approx([91, 91])
            for name, drawn in zip(RATES, a.containers, strict=True):
                dice = 100 * dices(records, name)
                assert drawn.lines[0].get_ydata() == pytest.approx(dice.mean(axis=0))
                ends = np.array(drawn.lines[2][0].get_segments())[:, :, 1]
                assert (ends[:, 1] - ends[:, 0]) / 2 == pytest.approx(dice.std(axis=0, ddof=1))
                assert xs is None or drawn.lines[0].get_xdata() == pytest.approx(xs)
        plt.close(figure)
        many = {f"{learner}{n}": 4.0 + n for learner in ("strategy ", "mean_teacher: strategy ") for n in range(9)}
        figure = figures.label_curves(simulated(rates=many), [0.9])
        looks = {
            (c.lines[0].get_color(), c.lines[0].get_linestyle(), str(c.lines[0]._dash_pattern))
            for c in figure.axes[0].containers
        }
        assert len(looks) == len(many)
        assert texts_that_overlap(figure) == []
        figure = figures.label_curves(simulated(seeds=(1,)))
        assert [a.get_xlabel() for a in figure.axes] == [
            *map("annotated ".__add__, ("regions", "voxels", "foreground voxels"))
        ]
        assert figures.render(figure).startswith(b"\x89PNG")
        with pytest.raises(figures.FigureError, match="no seed is finished by all strategies; go on with"):
            figures.label_curves([])
