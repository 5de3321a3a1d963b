"""The table of results: its numbers against SciPy, the statistics module and closed forms; and what it must say."""

import csv
import hashlib
import io
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mtseg import metrics, report
from mtseg.report.__main__ import main
from mtseg.report.flags import PUBLISHED
from mtseg.report.table import OF_TEST

ROOT = Path(__file__).resolve().parents[1]
PROTOCOL = {"patch_size": [48, 48, 32], "stride_xy": 16, "stride_z": 4}


def write_run(out, method="MT", seed=1337, labelnum=8, dice=(), weights="iter_6", cases=None, config=(), **changes):
    """A run folder as the scripts leave it, with the result of a test; returns {case: dice}."""
    folder = out / f"seed{seed}" / "model" / f"LA_vnet_{labelnum}_labeled" / method
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": method,
        "seed": seed,
        "labelnum": labelnum,
        "dataset_name": "LA",
        "exp": "vnet",
        **dict(config),
    }
    (folder / "config.json").write_text(json.dumps(settings | ({"ema_decay": 0.99} if method == "MT" else {})))
    names = cases or [f"case_{n}" for n in range(len(dice))]
    rows = [
        {"case": c, "class": 1, "dice": d, "jaccard": d / (2 - d), "hd95": 10 * (1 - d), "asd": None if d == 0 else 1.0}
        for c, d in zip(names, dice, strict=True)
    ]
    result = {"checkpoint": f"{folder}/{weights}.pth", "checkpoint_sha256": f"{method}{seed}{labelnum}{weights}{dice}"}
    result |= {"selection": "last iteration", "dataset": "LA", "unit": "voxel", "protocol": PROTOCOL, "cases": rows}
    (folder / f"{weights}_test").mkdir(exist_ok=True)
    (folder / f"{weights}_test/metrics.json").write_text(json.dumps(result | changes))
    return dict(zip(names, dice, strict=True))


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    supervised = rng.uniform(0.4, 0.8, (3, 12))
    return {
        "supervised": supervised.round(4),
        "MT": np.clip(supervised + rng.normal(0.02, 0.05, (3, 12)), 0, 1).round(4),
    }


@pytest.fixture
def runs(tmp_path, scores):
    for method, values in scores.items():
        for seed, dice in zip((1337, 1, 2), values, strict=True):
            write_run(tmp_path / method, method, seed, dice=dice.tolist())
    return tmp_path


def records(table):
    return {(r["method"], r["weights"]): r for r in csv.DictReader(io.StringIO(report.to_csv(table)))}


def test_every_number_of_a_row(runs, scores):
    table, _ = report.report([runs], baseline="supervised")
    row = records(table)["MT", "student"]
    values = scores["MT"]
    number = {name: float(row[f"dice_{name}"]) for name in ("mean", "sd_seeds", "sd_cases", "low", "high", *OF_TEST)}
    means = [statistics.fmean(seed) for seed in values]
    assert number["mean"] == pytest.approx(statistics.fmean(means))
    assert number["sd_seeds"] == pytest.approx(statistics.stdev(means))
    assert number["sd_cases"] == pytest.approx(statistics.fmean(statistics.pstdev(seed) for seed in values))
    differences = (values - scores["supervised"]).mean(axis=0)
    assert number["difference"] == pytest.approx(differences.mean())
    for of, low, high in ((values.mean(axis=0), "low", "high"), (differences, "difference_low", "difference_high")):
        how = {"method": "percentile", "n_resamples": 9999, "rng": np.random.default_rng(5)}
        interval = stats.bootstrap((of,), np.mean, **how).confidence_interval
        assert (number[low], number[high]) == pytest.approx(tuple(interval), abs=0.002)
    expected = stats.wilcoxon(values.mean(axis=0), scores["supervised"].mean(axis=0)).pvalue
    assert number["p"] == pytest.approx(expected)
    assert (row["dice_pairs"], row["seeds"], row["cases"]) == ("12", "1 2 1337", "12")
    unknown = ("parameters", "training_seconds", "inference_seconds_a_case", "not_comparable")
    assert {row[name] for name in unknown} == {""}
    text = report.to_text(table)
    assert f"{100 * number['mean']:.2f} ± {100 * number['sd_seeds']:.2f}" in text
    assert f"{number['p']:.3f} (12)" in text
    low, high = (f"{100 * number[name]:+.2f}" for name in ("difference_low", "difference_high"))
    assert f"{100 * number['difference']:+.2f} [{low}, {high}]" in text
    assert "HD95 voxel" in text


def test_the_signed_rank_test_is_exact_or_declined():
    baseline = {f"case_{n}": 0.5 for n in range(6)}
    better = {case: value + 0.01 * (n + 1) for n, (case, value) in enumerate(baseline.items())}
    test, why = report.paired_test(better, baseline)
    assert (test["p"], test["pairs"], why) == (pytest.approx(2 / 2**6), 6, "")  # all six signs alike, either way
    test, why = report.paired_test({**better, "case_5": 0.5, "case_9": 1.0, "case_4": float("nan")}, baseline)
    assert ("p" in test, test["pairs"], why) == (False, 5, "of 5 pairs fewer than 6 differ")
    assert test["difference"] == pytest.approx((0.01 + 0.02 + 0.03 + 0.04) / 5)
    assert report.paired_test({"a": 1.0}, {"b": 1.0}) == ({"pairs": 0}, "no case was tested by both")


def test_the_signed_rank_test_does_not_depend_on_the_unit():
    """Means over seeds differ in float's last digits, which are no difference, and break no tie."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(2, 12, (3, 12)), rng.integers(3, 14, (3, 12))
    of_case = [dict(zip("abcdefghijkl", one.sum(0) / 3, strict=True)) for one in (ours, theirs)]
    expected = stats.wilcoxon((ours - theirs).sum(0)).pvalue  # of integers, whose ties are exact
    for size in (1, 0.7, 1.1, 1 / 3):
        one, other = ({case: size * value for case, value in values.items()} for values in of_case)
        assert report.paired_test(one, other)[0]["p"] == expected


def test_a_result_that_records_its_own_figures(tmp_path):
    write_run(
        tmp_path, dice=[0.5, 0.7], parameters=9449922, inference_seconds=5.0, training_seconds=7300.0, unit="mm", seed=3
    )
    table, _ = report.report([tmp_path])
    row = records(table)["MT", "student"]
    assert (row["parameters"], row["training_seconds"], row["unit"]) == ("9449922", "7300.0", "mm")
    assert float(row["inference_seconds_a_case"]) == 2.5
    text = report.to_text(table)
    assert all(words in text for words in ("9.45 M", "2.0 h", "2.5 s", "HD95 mm", "last iteration"))
    assert (
        "training: all iterations, each from waiting for its batch to the updated weights; without validation" in text
    )


def test_holms_correction_is_that_of_all_intersections(tmp_path):
    """Against the closed test with Bonferroni's: the largest corrected p of the sets of hypotheses that hold one."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 5):
        p = rng.uniform(0, 0.4, count)
        sets = [list(s) for size in range(1, count + 1) for s in itertools.combinations(range(count), size)]
        closed = [max(min(1, len(s) * p[s].min()) for s in sets if i in s) for i in range(count)]
        np.testing.assert_allclose(report.holm(p), closed)
    assert report.holm([]).shape == (0,)
    # In a table over all rows that are tested, in each metric apart.
    dice = rng.uniform(0.5, 0.8, 12)
    for number, method in enumerate(("supervised", "A", "B")):
        write_run(tmp_path, method, dice=[float(d) for d in dice + 0.05 * number * rng.normal(0.4, 1, 12)])
    table, _ = report.report([tmp_path], baseline="supervised")
    for metric in ("dice", "hd95"):
        p, corrected = (
            [r[f"{metric}_{name}"] for r in table.records if r["method"] != "supervised"] for name in ("p", "p_holm")
        )
        np.testing.assert_allclose(corrected, report.holm(p))
    text = report.to_text(table)
    assert "p, Holm" in text and f"{table.records[1]['dice_p_holm']:.3f}" in text


def test_iterations_that_were_looked_at_give_the_inflation_and_a_mark(tmp_path):
    """latest.pth holds the weights of the last file: tested, too, it counts once; left before the end, it is a look."""
    looks = {1: ([0.5, 0.7], [0.8, 0.6], [0.6, 0.6]), 2: ([0.4, 0.4], [0.3, 0.3], [0.5, 0.5])}
    for seed, (early, middle, end) in looks.items():
        write_run(tmp_path, seed=seed, dice=early, weights="iter_2", selection="iteration 2 of 6")
        write_run(tmp_path, seed=seed, dice=middle, weights="latest", selection="iteration 4 of 6")
        write_run(tmp_path, seed=seed, dice=end)
    write_run(tmp_path, seed=3, dice=[0.5, 0.5])  # of whose earlier iterations nobody knows
    write_run(tmp_path, "supervised", seed=1, dice=[0.5, 0.6])
    write_run(tmp_path, "supervised", seed=1, dice=[0.5, 0.6], weights="latest")
    table, (supervised, row) = report.report([tmp_path])
    np.testing.assert_allclose(row.inflation(), [0.7 - 0.6, 0], atol=1e-12)
    assert supervised.inflation() is None and supervised.mark == "" and len(supervised.results) == 1
    assert sum("counts once" in note for note in table.notes) == 1
    assert [record["dice_inflation"] for record in table.records] == [None, pytest.approx(0.05)]
    for text in (report.to_text(table), report.to_markdown(table), report.to_latex(table)):
        assert "MT, student†" in text.replace(r"$^{\dagger}$", "†") and "5.00 ± 7.07" in text.replace(r"$\pm$", "±")
        assert "tested at 3 iterations: all figures are the last one's" in text.replace("\n  ", " ")


def test_a_table_of_checkpoints_all_selected_on_the_test_cases_marks_each(tmp_path):
    for method in ("supervised", "MT"):
        write_run(tmp_path, method, dice=[0.5, 0.6], selection="test set")
    table, rows = report.report([tmp_path])
    assert [(row.mark, row.incomparable) for row in rows] == [("†", "checkpoint selected by test set")] * 2
    assert table.notes[0] == "† checkpoint selected by test set."


def test_published_figures_of_a_json_file_stand_in_a_column(tmp_path, capsys):
    every = json.loads((ROOT / "benchmarks/published.json").read_text())
    assert all(
        entry["selection"] and entry["source"] and 0 < entry.get("jaccard", 1) < entry["dice"] < 100 for entry in every
    )
    write_run(tmp_path, "UAMT", dice=[0.5, 0.6], dataset="LA_half", iteration_seconds=0.5, peak_memory_mb=2500)
    write_run(tmp_path, "supervised", dice=[0.5, 0.6], dataset="LA_half", iteration_seconds=0.25, peak_memory_mb=1500)
    table, _ = report.report([tmp_path], published=ROOT / "benchmarks/published.json")
    cells = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [cell["published"] for cell in cells] == [
        [
            "79.99 (selection not stated; tables of UA-MT's family)",
            "82.74 (selection not stated; later papers' tables)",
        ],
        ["84.25 (last iteration; DTC's table)", "85.81 (selection not stated; CrossMatch's table)"],
    ]
    assert [(cell["iteration"], cell["memory"]) for cell in cells] == [
        (["0.25 s"], ["1.50 GB"]),
        (["0.5 s"], ["2.50 GB"]),
    ]
    assert any("not comparable with the rows here" in note for note in table.notes)
    odd = [[{"method": "A"}], [every[0] | {"method": None}], [every[0] | {"labels": [8]}]]
    for wrong in (*map(json.dumps, odd), "data,labels"):
        (tmp_path / "wrong.json").write_text(wrong)
        said = run_report(capsys, tmp_path, "--published", tmp_path / "wrong.json")
        assert "wrong.json: holds no published figures" in said


def test_rows_that_are_not_comparable_say_why(tmp_path):
    dice = [0.5, 0.6, 0.7]
    write_run(tmp_path, "supervised", dice=dice)
    write_run(tmp_path, "A", dice=dice[:2])
    write_run(tmp_path, "B", dice=dice, unit="mm")
    write_run(tmp_path, "C", dice=dice, protocol={**PROTOCOL, "stride_xy": 8, "overlap": 0.5})
    write_run(tmp_path, "D", dice=dice, selection="test set")
    write_run(tmp_path, "E", dice=dice, dataset="Phantom")
    write_run(tmp_path, "F", dice=dice)
    table, rows = report.report([tmp_path], baseline="supervised")
    why = {row.method: row.incomparable for row in rows}
    assert why["A"] == "other test cases (2, of which 2 are among the 3)"
    assert why["B"] == "distances in mm, not voxel"
    assert why["C"] == "stride_xy 8, not 16"
    assert why["D"] == "checkpoint selected by test set, not last iteration"
    assert why["E"] == "dataset Phantom, not LA"
    assert why["supervised"] == why["F"] == ""
    assert len({row.mark for row in rows}) == 6
    text = report.to_text(table)
    for row in rows:
        assert row.name + row.mark in text
        footnote = f"{row.mark} not comparable with supervised: {row.incomparable}."
        assert not row.mark or footnote in text.replace("\n  ", " ")
    assert "HD95 mm" not in text  # in a table of both units the heading names neither, and each cell its own
    assert "4.00 mm" in text


def test_rows_that_were_tested_otherwise_say_so(tmp_path):
    dice = [0.5, 0.6, 0.7]
    as_usual = {"tolerance": 1.0, "preprocessing": {"spacing": [1, 1, 1]}}
    write_run(tmp_path, "supervised", dice=dice, **as_usual)
    protocol = {**PROTOCOL, "tta": "flips", "postprocessing": ["largest_component", "fill_holes"]}
    write_run(tmp_path, "A", dice=dice, **{**as_usual, "protocol": protocol})
    write_run(tmp_path, "B", dice=dice, **{**as_usual, "tolerance": 5.0})
    write_run(tmp_path, "C", dice=dice, **{**as_usual, "preprocessing": {"spacing": [2, 2, 2]}})
    write_run(tmp_path, "D", dice=dice, input="here/imagesTs", **as_usual)
    write_run(tmp_path, "E", dice=dice, trained_on=["case_1"], **as_usual)
    _, rows = report.report([tmp_path], baseline="supervised")
    why = {row.method: row.incomparable for row in rows}
    assert why["A"] == "postprocessing largest_component and fill_holes, not none; tta flips, not none"
    assert why["B"] == "tolerance 5.0, not 1.0"
    assert why["C"] == "volumes were prepared in another way"
    assert why["D"] == "tested on the scans in imagesTs, not on the cases of a list"
    assert why["E"] == "tested on 1 case that it was trained on"
    assert why["supervised"] == ""

    # What is measured on the scans' own grid compares, however they were prepared; on other scans it does not.
    scans = {"input": "here/imagesTs", "tolerance": 1.0}
    write_run(tmp_path / "scans", "F", dice=dice, preprocessing={"spacing": [1, 1, 1]}, **scans)
    write_run(tmp_path / "scans", "G", dice=dice, preprocessing={"spacing": [2, 2, 2]}, **scans)
    write_run(tmp_path / "scans", "H", dice=dice, **{**scans, "input": "there/imagesTs"})
    _, rows = report.report([tmp_path / "scans"], baseline="F")
    assert [row.incomparable for row in rows] == [
        *("", "", "tested on the scans in there/imagesTs, not on the scans in here/imagesTs"),
    ]


@pytest.mark.parametrize(
    "otherwise", [{"tolerance": 5.0}, {"preprocessing": {"spacing": [2, 2, 2]}}, {"input": "imagesTs"}]
)
def test_what_was_tested_otherwise_is_no_seed_of_the_same_row(tmp_path, otherwise):
    as_usual = {"tolerance": 1.0, "preprocessing": {"spacing": [1, 1, 1]}}
    write_run(tmp_path, seed=1, dice=[0.5, 0.6], **as_usual)
    write_run(tmp_path, seed=2, dice=[0.5, 0.7], **as_usual)
    _, rows = report.report([tmp_path])
    assert [len(row.results) for row in rows] == [2]
    write_run(tmp_path, seed=2, dice=[0.5, 0.7], **(as_usual | otherwise))
    _, rows = report.report([tmp_path])
    assert [len(row.results) for row in rows] == [1, 1]
    assert len({row.name for row in rows}) == 2


def test_scans_without_labels_are_no_result_and_no_obstacle(tmp_path):
    write_run(tmp_path, dice=[0.5, 0.6], segmented=10, inference_seconds=5.0)
    folder = next(tmp_path.glob("seed1337/model/*/MT"))
    (folder / "iter_6_imagesTs").mkdir()
    (folder / "iter_6_imagesTs/metrics.json").write_text(json.dumps({"cases": [], "segmented": 3}))
    table, rows = report.report([tmp_path])
    assert len(rows) == 1 and not any("not been tested" in note for note in table.notes)
    # Ten scans were segmented, two of them measured.
    assert float(next(iter(records(table).values()))["inference_seconds_a_case"]) == 0.5
    with pytest.raises(report.ReportError, match=r"nothing was measured.*--labels"):
        report.report([folder / "iter_6_imagesTs/metrics.json"])


def test_published_figures_of_other_methods_stand_below(tmp_path, capsys):
    """--published without a file has those of the repository."""

    def said(method, labels):
        write_run(tmp_path / method, method, labelnum=labels, dice=[0.5, 0.6], dataset="LA")
        main([str(tmp_path / method), "--published"])
        return " ".join(capsys.readouterr().out.split())

    below = "Published Dice % of other methods on LA with 25 labels, not comparable with the rows here: supervised "
    text = said("MT", 25)
    assert "90.28 (selection not stated; LASeg, 31 test cases of 154)" in text
    assert below + "88.35 (selection not stated; LASeg, 31 test cases of 154), URPC" in text
    assert "UA-MT" not in text and "no figures" not in text
    assert "test cases of 154), MT 90.28 (selection" in said("mine", 25).partition(below)[2]
    assert "has no figures for these data" in said("nobodys", 7)
    write_run(tmp_path / "lower", labelnum=25, dice=[0.5, 0.6], dataset="la")
    main([str(tmp_path / "lower"), "--published"])
    assert "90.28 (selection" in " ".join(capsys.readouterr().out.split())


def test_a_results_folder_called_like_the_checkpoint_is_not_the_runs(tmp_path, capsys):
    for seed, rate in ((1, 0.1), (2, 0.001)):
        write_run(tmp_path, seed=seed, dice=[0.5, 0.6], config={"base_lr": rate})
        found = next(tmp_path.glob(f"seed{seed}/**/metrics.json"))
        (tmp_path / f"results/{seed}/iter_6").mkdir(parents=True)
        content = json.loads(found.read_text()) | {"method": "MT", "seed": seed, "labelnum": 8}
        found.unlink()
        (tmp_path / f"results/{seed}/iter_6/metrics.json").write_text(json.dumps(content))
    text = report.to_text(report.report([tmp_path / "results"])[0])
    assert "base_lr 0.1" in text and "base_lr 0.001" in text and "config.json is gone" not in text
    for config in tmp_path.glob("seed*/**/config.json"):
        config.unlink()
    text = " ".join(report.to_text(report.report([tmp_path / "results"])[0]).split())
    assert "whether its runs had one setting is not known; their config.json is gone" in text


@pytest.mark.parametrize("wrong", [{"parameters": math.nan}, {"config": {"labeled_draw": "x"}}])
def test_values_that_are_no_numbers_are_left_out(tmp_path, wrong):
    write_run(tmp_path, dice=[0.5, 0.6], **wrong)
    write_run(tmp_path, "supervised", dice=[0.5, 0.6])
    assert len(records(report.report([tmp_path])[0])) == 2


def test_empty_masks_are_counted_and_left_out(tmp_path):
    write_run(tmp_path, dice=[0.0, 0.5, 0.7])
    table, _ = report.report([tmp_path])
    row = records(table)["MT", "student"]
    assert (row["asd_undefined"], float(row["asd_mean"]), float(row["dice_mean"])) == ("1", 1.0, pytest.approx(0.4))
    assert "not defined for an empty mask, and left out: 1 of ASD" in report.to_text(table)


def test_a_table_says_how_many_cases_were_tested(tmp_path):
    write_run(tmp_path / "a", seed=1, dice=[0.5, 0.7])
    assert "the seeds' means over the 2 test cases, n - 1" in report.to_text(report.report([tmp_path])[0])
    write_run(tmp_path / "b", method="PL", dice=[0.5])
    assert "bootstrap over the 1 or 2 test cases, each" in report.to_text(report.report([tmp_path])[0])


def test_empty_labels_that_were_left_empty_are_said_to_count_in_full(tmp_path):
    write_run(tmp_path, dice=[1.0, 0.5, 0.7, 0.7])
    said = "MT, student, 8 labels: Dice is 100 where label and prediction are empty: in 25 %."
    assert said not in report.report([tmp_path])[0].notes
    path = next(tmp_path.rglob("metrics.json"))
    result = json.loads(path.read_text())
    result["cases"][0] |= {"hd95": None, "asd": None}
    path.write_text(json.dumps(result))
    assert said in report.report([tmp_path])[0].notes


def test_a_row_of_several_versions_of_its_script_says_so(tmp_path):
    for seed, code in ((1, "a"), (2, "b"), (3, "a")):
        write_run(tmp_path, seed=seed, dice=[0.5], config={"code": {"script": code, "mtseg": "c"}})
    (said,) = (note for note in report.report([tmp_path])[0].notes if "versions" in note)
    assert said == "MT, student, 8 labels: its runs are of 2 versions of the code."


def test_seeds_are_pooled_only_where_nothing_else_differs(tmp_path):
    write_run(tmp_path, seed=1, dice=[0.5], config={"base_lr": 0.01, "python": "3.11"})
    write_run(tmp_path, seed=2, dice=[0.7], config={"base_lr": 0.01, "python": "3.12"})
    write_run(tmp_path, seed=3, dice=[0.9], config={"base_lr": 0.1, "python": "3.12"})
    _, rows = report.report([tmp_path])
    assert {row.method: [r.seed for r in row.results] for row in rows} == {
        "MT (base_lr 0.01)": [1, 2],
        "MT (base_lr 0.1)": [3],
    }


def test_runs_on_other_voxels_of_the_same_names_are_no_seeds_of_one_row(tmp_path):
    for seed, checksum in ((1, 11), (2, 11), (3, 12)):
        write_run(tmp_path, seed=seed, dice=[0.5, 0.25], config={"data_crc32": checksum})
    assert [[result.seed for result in row.results] for row in report.report([tmp_path])[1]] == [[1, 2], [3]]


def test_runs_whose_pretrainings_differ_in_their_seeds_are_seeds_of_one_row(tmp_path):
    """By what the runs record of them; without that, of other settings and of a seed that is there twice they are not.
    What --from_scratch leaves out makes no row either."""

    def began(seed, settings="a", number=9, before=()):
        file = f"/runs/{settings}_{len(before)}_{seed}/iter_{number}.pth"
        chain = [{"file": file, "settings": settings}, *before]
        return {"pretrained": file, "pretrained_from": chain, "from_scratch": False}

    def rows_of(out):
        return sorted([result.seed for result in row.results] for row in report.report([out])[1])

    for seed in (1, 2, 3):
        scratch = began(seed) | {"from_scratch": True, "pretrained_from": None}
        chained = began(seed, before=began(seed)["pretrained_from"])
        for name, config in (("masked", began(seed)), ("scratch", scratch), ("chained", chained)):
            write_run(tmp_path / "one" / name, "CPS", seed=seed, dice=[seed / 10], config=config)
    assert rows_of(tmp_path / "one") == [[1, 2, 3]] * 3
    for name, other in (
        ("settings", began(2, "b")),
        ("iteration", began(2, number=8)),
        ("unknown", began(2, settings=None)),
        ("nothing", {"pretrained": None, "from_scratch": False}),
    ):
        write_run(tmp_path / name, "CPS", seed=1, dice=[0.1], config=began(1))
        write_run(tmp_path / name, "CPS", seed=2, dice=[0.2], config=other)
        assert rows_of(tmp_path / name) == [[1], [2]], name
    for seed in (1, 2):
        for first in (1, 2):
            write_run(tmp_path / f"all/{first}", "CPS", seed=seed, dice=[(seed + 2 * first) / 10], config=began(first))
    assert rows_of(tmp_path / "all") == [[1, 2], [1, 2]]


def test_a_run_that_began_with_nothing_is_not_named_by_parts_of_it(tmp_path):
    write_run(tmp_path, dice=[0.5], config={"pretrained": None, "pretrained_parts": "all"})
    write_run(tmp_path / "b", dice=[0.5], config={"pretrained": "/runs/a.pth", "pretrained_parts": "encoder"})
    names = {row.method for row in report.report([tmp_path])[1]}
    assert names == {"MT", "MT (pretrained a.pth; pretrained_parts encoder)"}


def test_a_recipe_in_a_file_is_named_by_it_and_what_old_runs_do_not_record_is_no_difference(tmp_path):
    recipe = {"consistency": 2.0, "init": "none", "wandb": None}
    write_run(tmp_path / "a", seed=1, dice=[0.5, 0.6], config={"consistency": 0.1, "init": "none"})
    write_run(tmp_path / "b", seed=1, dice=[0.7, 0.6], config=recipe | {"config": "mine.json"})
    write_run(tmp_path / "b", seed=2, dice=[0.7, 0.8], config={"consistency": 2.0, "progress": 0})
    rows = records(report.report([tmp_path])[0])
    assert {method: row["seeds"] for (method, _), row in rows.items()} == {"MT": "1", "MT (config mine.json)": "1 2"}


def test_an_old_run_hides_no_setting_in_which_others_differ(tmp_path):
    write_run(tmp_path, seed=1, dice=[0.5, 0.6], config={"noise": 0.0})
    write_run(tmp_path, seed=2, dice=[0.5, 0.7], config={"noise": 0.1})
    write_run(tmp_path, seed=3, dice=[0.5, 0.8], config={"progress": 0})
    assert [len(row.results) for row in report.report([tmp_path])[1]] == [1, 1, 1]
    assert len({row.name for row in report.report([tmp_path])[1]}) == 3


def test_what_has_no_seed_is_no_seed(tmp_path):
    """Weights of strangers, and ensembles, of the students and of the teachers of the same runs."""
    for name, dice in (("one", 0.9), ("two", 0.5)):
        folder = tmp_path / name / "model" / "LA_vnet_8_labeled" / "UAMT"
        write_run(tmp_path / name, "UAMT", 1, dice=[dice, dice])
        shutil.move(tmp_path / name / "seed1" / "model", tmp_path / name / "model")
        (folder / "config.json").unlink()
        (folder / "iter_6_test").rename(folder.parent / "iter_6_test")
    _, rows = report.report([tmp_path])
    assert [len(row.results) for row in rows] == [1, 1] and len({row.name for row in rows}) == 2
    assert all("tested in" in row.name for row in rows)

    files = {"students": "iter_6", "teachers": "ema_iter_6"}
    for name, weights in files.items():
        write_run(tmp_path / "runs", seed=1, dice=[0.6, 0.7])
        paths = [f"{tmp_path}/runs/seed{seed}/model/LA_vnet_8_labeled/MT/{weights}.pth" for seed in (1, 2)]
        both = {"checkpoint": paths, "checkpoint_sha256": [name, f"{name}2"], "seed": [1, 2]}
        write_run(tmp_path / name, dice=[0.6, 0.8])
        run = tmp_path / name / "seed1337/model/LA_vnet_8_labeled/MT"
        result = json.loads((run / "iter_6_test/metrics.json").read_text())
        (run / "iter_6_test/metrics.json").write_text(json.dumps(result | both | {"method": "MT", "labelnum": 8}))
        (run / "config.json").unlink()
    _, rows = report.report([tmp_path / name for name in files])
    assert sorted(row.weights for row in rows) == ["ensemble of 2", "ensemble of 2, teacher"]


def test_a_metric_that_a_file_does_not_hold_is_not_called_undefined(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, seed=seed, dice=[0.5, 0.6])
    file = next(tmp_path.glob("seed1/model/*/MT/iter_6_test/metrics.json"))
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"cases": [row | {"nsd": 0.9} for row in result["cases"]]}))
    table, _ = report.report([tmp_path], metrics=["dice", "nsd"])
    assert "No test of MT, student, 8 labels: 1 of 2 results do not hold it; test them again (NSD %)." in table.notes
    assert not any("not defined" in note for note in table.notes) and math.isnan(table.records[0]["nsd_mean"])


def test_a_tolerance_in_mm_is_not_compared_with_one_in_voxels(tmp_path):
    for method, unit in (("supervised", "voxel"), ("MT", "mm")):
        write_run(tmp_path, method, 1, dice=[0.5 + n / 50 for n in range(8)], unit=unit, tolerance=1.0)
        file = next(tmp_path.glob(f"seed1/model/*/{method}/iter_6_test/metrics.json"))
        result = json.loads(file.read_text())
        rows = [row | {"nsd": row["dice"] + 0.01 * n * (unit == "mm")} for n, row in enumerate(result["cases"])]
        file.write_text(json.dumps(result | {"cases": rows}))
    table, _ = report.report([tmp_path], "supervised", ["nsd"])
    assert any("distances in mm and in voxel" in note for note in table.notes)


def test_the_interval_of_many_cases_is_drawn_in_parts_as_at_once():
    values = np.random.default_rng(1).uniform(size=3001)  # more than fit into one part
    draws = np.random.default_rng(0).integers(3001, size=(10000, 3001))
    expected = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    assert report.summary.bootstrap_interval(values) == tuple(expected)


def test_a_result_without_its_runs_settings_pools_no_runs_that_differ(tmp_path):
    """A metrics.json that was copied elsewhere: other runs of the method stay apart, and it is no seed of either."""
    for seed, base_lr in ((1, 0.01), (2, 0.01), (3, 0.1), (4, 0.1)):
        write_run(tmp_path, seed=seed, dice=[0.5, 0.6 + seed / 100], config={"base_lr": base_lr})
    run = next(tmp_path.glob("seed4/model/*/MT"))
    result = json.loads((run / "iter_6_test/metrics.json").read_text())
    (run / "iter_6_test/metrics.json").write_text(json.dumps(result | {"method": "MT", "seed": 4, "labelnum": 8}))
    (run / "config.json").unlink()
    _, rows = report.report([tmp_path])
    assert {row.name: [r.seed for r in row.results] for row in rows} == {
        "MT (base_lr 0.01), student": [1, 2],
        "MT (base_lr 0.1), student": [3],
        "MT": [4],
    }
    # Where it is called the same, a word tells it from the others.
    for seed in (1, 2, 3):
        file = next(tmp_path.glob(f"seed{seed}/model/*/MT/config.json"))
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "ema_decay"}))
    names = {row.name for row in report.report([tmp_path])[1]}
    assert names == {"MT (base_lr 0.01)", "MT (base_lr 0.1)", "MT (settings not recorded)"}


def test_what_is_found_twice_counts_once(tmp_path):
    write_run(tmp_path / "a", dice=[0.5])
    write_run(tmp_path / "b", dice=[0.5])
    one = next((tmp_path / "a").rglob("metrics.json"))
    table, rows = report.report([tmp_path / "a", one, one.parent, tmp_path / "b"])
    assert len(rows) == len(rows[0].results) == 1
    assert sum("counts once" in note for note in table.notes) == 1


def test_classes_one_by_one_and_their_mean(tmp_path):
    cases = [
        {"case": "a", "class": 1, "dice": 0.8, "hd95": 2.0},
        {"case": "a", "class": 2, "dice": 0.4, "hd95": None},
        {"case": "a", "class": "mean", "dice": 0.6, "hd95": None},
        {"case": "b", "class": 1, "dice": 0.6, "hd95": 4.0},
        {"case": "b", "class": 2, "dice": 0.2, "hd95": 8.0},
    ]
    write_run(tmp_path, dice=[0.5])
    path = next(tmp_path.rglob("metrics.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cases": cases}))
    table, _ = report.report([tmp_path], metrics=["dice", "hd95"], per_class=True)
    found = {r["class"]: (r["dice_mean"], r["hd95_mean"], r["hd95_undefined"]) for r in table.records}
    assert found == {
        1: (pytest.approx(0.7), 3.0, 0),
        2: (pytest.approx(0.3), 8.0, 1),
        "mean": (pytest.approx(0.5), 6.0, 1),
    }
    table, _ = report.report([tmp_path], metrics=["dice"])
    assert [r["class"] for r in table.records] == ["mean"]


def test_formats_hold_the_same_table(runs):
    table, _ = report.report([runs], baseline="supervised")
    markdown, latex = report.to_markdown(table), report.to_latex(table)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {len(table.columns) + 1}
    body = latex.split("\\midrule")[1].split("\\bottomrule")[0]
    assert {line.count("&") for line in body.splitlines() if line.endswith(r"\\")} == {len(table.columns) - 1}
    assert body.count(r"\\") == 10
    assert latex.count("{") == latex.count("}")
    odd = report.Table(["a_b"], [[["5 % & $x^2$ \\ | ü"]]], [["x"]], [], [])
    assert r"5 \% \& \$x\textasciicircum{}2\$ \textbackslash{} | ü \\" in report.to_latex(odd)
    assert r"5 % &amp; $x^2$ \\ \| ü |" in report.to_markdown(odd)


def test_a_latex_engine_takes_the_table(runs, tmp_path):
    engine = shutil.which("pdflatex")
    if not engine:
        pytest.skip("no LaTeX was found (Debian: apt-get install texlive-latex-recommended)")
    write_run(runs / "odd", "A_b & c^2 ~ <50%", dice=[0.5], unit="mm", selection="test set")
    table, rows = report.report([runs], baseline="supervised", published=PUBLISHED)
    assert {row.mark for row in rows} > {"", "†"}
    document = "\\documentclass{article}\\usepackage[utf8]{inputenc}\\usepackage{booktabs}\\begin{document}\n"
    (tmp_path / "paper.tex").write_text(document + report.to_latex(table) + "\\end{document}\n")
    words = [engine, "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_baseline_that_is_not_one_row_says_how_to_name_it(tmp_path):
    dice = [0.5, 0.6]
    write_run(tmp_path, dice=dice)
    write_run(tmp_path, dice=dice, weights="ema_iter_6")
    write_run(tmp_path / "small", dice=dice, weights="iter_6", protocol={**PROTOCOL, "stride_xy": 8})
    with pytest.raises(report.ReportError) as error:
        report.report([tmp_path], baseline="MT")
    said = str(error.value)
    folders = [str(path.parent) for path in tmp_path.rglob("metrics.json")]
    assert sum(f"({folder})" in said for folder in folders) == 2
    # What the sentence proposes names one row each.
    calls = re.findall("--baseline '([^']*)'", said)[1:]
    named = [report.find_baseline(report.report([tmp_path])[1], words) for words in calls]
    assert [len(rows) for rows in named] == [1, 1]
    assert {str(rows[0].results[0].path.parent) in said for rows in named} == {True}
    names = {row.name for row in report.report([tmp_path], baseline="teacher")[1]}
    assert names == {"MT (stride_xy 16), student", "MT (stride_xy 8), student", "MT, teacher"}


def run_report(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_mistakes_end_in_a_sentence(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no such file" in run_report(capsys, tmp_path / "nowhere")
    assert "inference.py" in run_report(capsys, tmp_path / "empty")
    assert "supervised 8; MT, student 8" in run_report(capsys, runs, "--baseline", "UA-MT")
    assert "'jacard'" in run_report(capsys, runs, "--metrics", "jacard")
    assert "no.json" in run_report(capsys, runs, "--published", tmp_path / "no.json")
    assert "report.docx: its name says no format" in run_report(capsys, runs, "--out", tmp_path / "report.docx")
    for content in (
        "{",
        "[]",
        "{}",
        '{"cases": [{"case": "a"}]}',
        '{"cases": [{"case": "a", "class": 1, "dice": "x"}]}',
        '{"cases": [{"case": "a", "class": "mean", "dice": 0.5}]}',
    ):
        (tmp_path / "metrics.json").write_text(content)
        assert str(tmp_path / "metrics.json") in run_report(capsys, tmp_path / "metrics.json")
    (tmp_path / "metrics.json").unlink()
    write_run(tmp_path / "again", dice=[0.1])
    write_run(tmp_path / "and_again", dice=[0.2])
    assert "two results of MT with 8 labels and seed 1337" in run_report(
        capsys, tmp_path / "again", tmp_path / "and_again"
    )


def test_the_command_writes_the_file_it_is_asked_for(runs, tmp_path):
    words = [sys.executable, "-m", "mtseg.report", runs, "--baseline", "supervised", "--out", tmp_path / "table.tex"]
    done = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table, _ = report.report([runs], baseline="supervised")
    assert (tmp_path / "table.tex").read_text() == report.to_latex(table)


def test_results_of_replaced_weights_are_left_out_and_named(tmp_path):
    """What --overwrite leaves of the run before: the weights' SHA-256 is another one now."""
    for seed in (1, 2):
        write_run(tmp_path, seed=seed, dice=[0.5, 0.6])
        file = next(tmp_path.glob(f"seed{seed}/model/*/MT/iter_6_test/metrics.json"))
        weights = file.parent.parent / "iter_6.pth"
        weights.write_bytes(b"weights of %d" % seed)
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        file.write_text(json.dumps(json.loads(file.read_text()) | {"checkpoint_sha256": sha256}))
    assert [len(row.results) for row in report.report([tmp_path])[1]] == [2]
    weights.write_bytes(b"other weights")
    table, rows = report.report([tmp_path])
    assert [r.seed for row in rows for r in row.results] == [1]
    assert any(f"{file} is left out" in note and str(weights) in note for note in table.notes)
    with pytest.raises(report.ReportError, match=r"holds other weights than those it tested"):
        report.report([file])
    # Beside the weights lies another run's config.json by now; a result that lies elsewhere stays, marked, without it.
    elsewhere = tmp_path / "results"
    elsewhere.mkdir()
    (elsewhere / "metrics.json").write_text(file.read_text())
    (row,) = report.report([elsewhere])[1]
    assert row.incomparable == "the tested weights have been replaced since"
    assert row.results[0].config == {}


def test_cases_that_were_trained_on_are_marked_in_every_format(tmp_path):
    """Unlabelled cases count, and so do results that were written before inference.py counted them."""
    write_run(tmp_path, "supervised", dice=[0.5, 0.6])
    write_run(tmp_path, dice=[0.5, 0.6], config={"train_cases": ["x"], "unlabeled_cases": ["case_1", "y"]})
    table, rows = report.report([tmp_path], baseline="supervised")
    assert {row.method: sorted(row.trained_on) for row in rows} == {"supervised": [], "MT": ["case_1"]}
    for text in (report.to_text(table), report.to_markdown(table), report.to_latex(table)):
        assert "tested on 1 case that it was trained on" in text
    assert "MT, student†" in report.to_markdown(table)
    assert records(table)["MT", "student"]["not_comparable"] == "tested on 1 case that it was trained on"


def test_rows_are_named_as_people_would(tmp_path):
    """No None, no folder of one machine, no unit behind an unknown number."""
    write_run(tmp_path / "a", dice=[0.5, 0.6])
    write_run(tmp_path / "b", dice=[0.5, 0.6], input="/home/someone/data/imagesTs", unit="mm")
    names = {row.name for row in report.report([tmp_path])[1]}
    assert names == {
        "MT (tested on a list; unit voxel), student",
        "MT (tested on imagesTs; unit mm), student",
    }
    write_run(tmp_path / "c", seed=3, dice=[0.5], config={"pretrained": "/home/someone/runs/a/iter_9.pth"})
    write_run(tmp_path / "c", seed=4, dice=[0.5], config={"pretrained": "/home/someone/runs/b/iter_9.pth"})
    write_run(tmp_path / "c", seed=5, dice=[0.5], config={"pretrained": None})
    names = {row.method for row in report.report([tmp_path / "c"])[1]}
    assert names == {"MT", "MT (pretrained a/iter_9.pth)", "MT (pretrained b/iter_9.pth)"}
    write_run(tmp_path / "d", "supervised", dice=[0.5, 0.6], labelnum=None)
    write_run(tmp_path / "d", dice=[0.0, 0.0], unit="mm", labelnum=None)
    text = report.to_text(report.report([tmp_path / "d"], metrics=["dice", "asd"])[0])
    assert "- mm" not in text and "None" not in text


def test_footnotes_of_a_table_of_classes_name_the_class(tmp_path):
    cases = [
        {"case": str(n), "class": label, "dice": 0.1 * n, "hd95": None if label == 2 and n == 3 else 5.0 + n}
        for n in range(8)
        for label in (1, 2)
    ]
    for method, moved in (("supervised", cases), ("MT", [case | {"dice": case["dice"] / 2} for case in cases])):
        write_run(tmp_path, method, dice=[0.5])
        file = next(tmp_path.glob(f"seed1337/model/*/{method}/*/metrics.json"))
        file.write_text(json.dumps(json.loads(file.read_text()) | {"cases": moved}))
    table, _ = report.report([tmp_path], baseline="supervised", metrics=["dice", "hd95"], per_class=True)
    notes = "\n".join(table.notes)
    assert "MT, student, 8 labels, class 2: not defined for an empty mask, and left out: 1 of HD95" in notes
    assert "class 1: not defined" not in notes
    assert "No test of MT, student, 8 labels, class 1: of 8 pairs fewer than 6 differ (HD95)." in notes


EVIL = '=cmd|"/c calc"!A0'


def test_cells_that_a_spreadsheet_would_run_are_text(tmp_path):
    write_run(tmp_path, EVIL, dice=[0.5, 0.6], dataset="@SUM(A1)")
    (record,) = csv.DictReader(io.StringIO(report.to_csv(report.report([tmp_path])[0])))
    assert (record["method"], record["dataset"]) == (f"'{EVIL}", "'@SUM(A1)")
    assert all(not cell.startswith(tuple("=+-@")) or float(cell) for cell in record.values())


def test_markdown_holds_no_markup_of_a_name(tmp_path):
    """Against a Markdown reader: what comes out are the names, and no tag but the table's."""
    markdown = pytest.importorskip("markdown_it", reason="needs markdown-it-py")
    name = "<img src=x onerror=alert(1)> a|b `c` [d](javascript:alert) \\|"
    write_run(tmp_path, name, dice=[0.5], dataset="<script>1</script>")
    text = report.to_markdown(report.report([tmp_path])[0])
    html = markdown.MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    tags = {tag.lower() for tag in re.findall(r"</?([a-zA-Z]+)", html)}
    assert tags <= {"table", "thead", "tbody", "tr", "th", "td", "p", "br"}
    assert "onerror" in html and "alert" in html  # as text
    assert {row.count("<td") for row in html.split("<tr>")[2:]} == {len(report.report([tmp_path])[0].columns)}


def test_a_latex_line_does_not_begin_with_an_argument():
    odd = report.Table(["method"], [[["[x] *"]], [["*"]]], [["x"], ["x"]], [], [])
    lines = report.to_latex(odd).splitlines()
    assert r"{}[x] * \\" in lines and r"{}* \\" in lines


def test_files_of_other_programs_and_types_end_in_a_sentence(tmp_path, capsys):
    write_run(tmp_path, dice=[0.5])
    file = next(tmp_path.rglob("metrics.json"))
    whole = json.loads(file.read_text())
    wrong = {"input": 3, "preprocessing": "none", "network": [], "protocol": 1, "trained_on": "case_0", "seed": "x"}
    file.write_text("\ufeff" + json.dumps(whole | wrong))  # a BOM, as editors on Windows write it
    (row,) = report.report([tmp_path])[1]
    assert row.trained_on == {"case_0"}
    file.with_name("metrics.json").write_text(json.dumps(whole | {"method": "A\n\x1b[31mB"}))
    (row,) = report.report([tmp_path])[1]
    assert row.method == "A  [31mB"
    file.write_bytes(b"\xff\xfe\x00")
    assert "metrics.json" in run_report(capsys, file)


def test_rows_name_the_network_whose_weights_were_tested(tmp_path):
    for weights in ("iter_6", "ema_iter_6", "second_iter_6", "MT_best_model", "ema_MT_best_model"):
        write_run(tmp_path, dice=[0.5], weights=weights, selection=weights)
    write_run(tmp_path, "CPS", dice=[0.5])
    names = [row.name.split(" (")[0] + row.name.partition(")")[2] for row in report.report([tmp_path])[1]]
    assert sorted(names) == ["CPS", *["MT, second"], *["MT, student"] * 2, *["MT, teacher"] * 2]


NAMES = ("ferrite", "a_b & $c$ <i>", "=1+1")  # of classes; the numbers of pixels decide the order, not the alphabet


def write_images(out, method, seed, sets=("",), unit="pixel", count=9, without=(), **changes):
    """A run tested on images of several sizes, with its rows as inference.py writes them, of each of the `sets`, whose
    names stand in the rows where there are any; returns {set: [(prediction, label)]}."""
    write_run(out, method, seed, dice=[0.5], unit=unit, **changes)
    file = next(out.glob(f"seed{seed}/model/*/{method}/iter_6_test/metrics.json"))
    rows, maps = [], {name: [] for name in sets}
    for number in range(count * len(sets)):
        rng = np.random.default_rng(number)  # every run is tested on the same images
        label = rng.choice(3, rng.integers(5, 30, 2), p=(0.7, 0.25, 0.05))
        rng = np.random.default_rng([seed, number, len(method)])
        prediction = np.where(rng.random(label.shape) < rng.uniform(0.1, 0.5), rng.choice(3, label.shape), label)
        name = sets[number % len(sets)]
        maps[name].append((prediction, label))
        case = {"case": f"image_{number}"} | ({"set": name} if name else {})
        case["pixel_accuracy"] = float((prediction == label).mean())
        for value, of_class in enumerate(NAMES):
            found = metrics.all_metrics(prediction == value, label == value)
            found = {key: None if np.isnan(number) else number for key, number in found.items()}
            rows.append({key: v for key, v in (case | {"class": of_class} | found).items() if key not in without})
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cases": rows}))
    return maps


def pooled(pairs, score):
    """The mean over the classes of a score of all pixels of the images laid end to end."""
    prediction, label = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    return np.mean([score(prediction == value, label == value) for value in range(3)])


@pytest.mark.parametrize("recorded", [False, True])
def test_patients_are_drawn_and_paired_whole(tmp_path, recorded):
    """Frames of one patient are no two patients: against SciPy on the patients' means, by names and as recorded."""
    rng, patients = np.random.default_rng(3), np.repeat(np.arange(9), 2)
    scores = {"supervised": 0.5 + rng.normal(0, 0.1, 9)[patients] + rng.normal(0, 0.01, (3, 18))}
    scores["MT"] = scores["supervised"] + rng.normal(0.02, 0.04, 9)[patients]
    names = [f"patient{p:03}_frame{n % 2 + 1:02}" for n, p in enumerate(patients)]
    told = {}
    if recorded:  # of names that say nothing
        names = [f"{'abcdefghi'[p]}{'xyz'[n % 2]}" for n, p in enumerate(patients)]
        told = {"patients": {name: f"p{p}" for name, p in zip(names, patients.tolist(), strict=True)}}
    for method, values in scores.items():
        for seed, dice in zip((1, 2, 3), values.tolist(), strict=True):
            write_run(tmp_path / method, method, seed, dice=dice, cases=names, **told)
    table, _ = report.report([tmp_path], baseline="supervised")
    row = records(table)["MT", "student"]
    of_patients = {m: values.mean(axis=0).reshape(9, 2).mean(axis=1) for m, values in scores.items()}
    gains = of_patients["MT"] - of_patients["supervised"]
    assert float(row["dice_p"]) == pytest.approx(stats.wilcoxon(gains).pvalue)
    assert (row["dice_pairs"], row["cases"]) == ("9", "18")
    for of, low, high in ((of_patients["MT"], "low", "high"), (gains, "difference_low", "difference_high")):
        how = {"method": "percentile", "n_resamples": 9999, "rng": np.random.default_rng(5)}
        interval = stats.bootstrap((of,), np.mean, **how).confidence_interval
        assert (float(row[f"dice_{low}"]), float(row[f"dice_{high}"])) == pytest.approx(tuple(interval), abs=0.004)
    text = " ".join(report.to_text(table).split())
    assert "over the 18 test cases, drawn by patient (there are 9), each averaged over the seeds first" in text
    assert "in brackets the pairs, of a patient's cases the mean." in text


def test_the_interval_of_patients_with_several_scans_each():
    """A patient counts as often as it has scans: against SciPy's bootstrap of a ratio of means."""
    values, patients = [0.1, 0.5, 0.6, 0.9, 0.8, 0.7, 0.3], ["a", "b", "b", "c", "c", "c", "d"]
    sums, counts = np.array([0.1, 1.1, 2.4, 0.3]), np.array([1, 2, 3, 1])
    how = {"method": "percentile", "paired": True, "n_resamples": 9999, "rng": np.random.default_rng(5)}
    expected = stats.bootstrap((sums, counts), lambda s, n, axis: s.sum(axis) / n.sum(axis), **how).confidence_interval
    assert report.bootstrap_interval(values, patients) == pytest.approx(tuple(expected), abs=0.02)
    assert all(map(math.isnan, report.bootstrap_interval(values, ["a"] * 7)))


def test_tables_of_images_name_what_is_pooled(tmp_path):
    """Against the scores of the pixels themselves, and SciPy's bootstrap of the images' numbers."""
    for method in ("MT", "supervised"):
        maps = {seed: write_images(tmp_path, method, seed)[""] for seed in (1, 2, 3)}
    table, _ = report.report([tmp_path], baseline="MT")
    columns = [c for c in table.columns if c.endswith(("%", "pixel"))]
    assert columns == [
        *("Dice %", "Dice pooled %", "IoU %", "IoU pooled %", "Pixel accuracy pooled %", "HD95 pixel"),
    ]
    row = records(table)["supervised", ""]
    scores = {"dice": metrics.dice, "jaccard": metrics.jaccard, "pixel_accuracy": None}
    not_of_pooled = ("sd_cases", "p", "difference")
    for metric, score in scores.items():

        def value(images, pairs, score=score):
            images = [pairs[int(i)] for i in images]
            right = [(prediction == label).ravel() for prediction, label in images]
            return np.concatenate(right).mean() if score is None else pooled(images, score)

        number = {name: row[f"{metric}_pooled_{name}"] for name in ("mean", "sd_seeds", "low", "high", *not_of_pooled)}
        of_seeds = [value(range(9), pairs) for pairs in maps.values()]
        assert float(number["mean"]) == pytest.approx(statistics.fmean(of_seeds))
        assert float(number["sd_seeds"]) == pytest.approx(statistics.stdev(of_seeds))
        assert {number[name] for name in not_of_pooled} == {""}
        interval = stats.bootstrap(
            (np.arange(9),),
            lambda images, value=value: np.mean([value(images, pairs) for pairs in maps.values()]),
            method="percentile",
            vectorized=False,
            n_resamples=1000,
            rng=np.random.default_rng(5),
        ).confidence_interval
        assert (float(number["low"]), float(number["high"])) == pytest.approx(tuple(interval), abs=0.01)
    assert float(row["dice_mean"]) == pytest.approx(
        np.mean([[pooled([pair], metrics.dice) for pair in pairs] for pairs in maps.values()])
    )
    text = " ".join(report.to_text(table).split())
    assert f"{100 * float(row['dice_pooled_mean']):.2f} ± {100 * float(row['dice_pooled_sd_seeds']):.2f}" in text
    assert "pooled: of the pixels of all test images together" in text and "mean over the images" not in text
    assert report.to_latex(table).count(r"IoU pooled \%") == report.to_markdown(table).count("IoU pooled %") == 1
    # Asked for by name, other columns; and in other units than the pixel.
    table, _ = report.report([tmp_path], metrics=["jaccard", "precision_pooled", "pixel_accuracy"])
    assert [c for c in table.columns if "%" in c] == ["IoU %", "Precision pooled %", "Pixel accuracy %"]
    with pytest.raises(report.ReportError, match="has no metric 'f1_pooled'"):
        report.report([tmp_path], metrics=["f1_pooled"])


def test_which_tables_are_of_images(tmp_path):
    def columns(name, **changes):
        write_images(tmp_path / name, "MT", 1, **changes)
        return " ".join(report.report([tmp_path / name])[0].columns)

    for unit in ("um", "mm"):
        assert "IoU pooled % Pixel accuracy pooled % HD95 " + unit in columns(unit, unit=unit)
    # Volumes have counts, and no pixel accuracy.
    assert "Jaccard % HD95 mm ASD mm" in columns("volumes", unit="mm", without=("pixel_accuracy",))
    assert "pooled" not in columns("volumes", unit="mm", without=("pixel_accuracy",))
    assert "pooled" not in columns("without counts", without=("tp", "fp", "fn", "tn"))


def test_each_set_of_a_result_is_a_row(tmp_path):
    sets = ("steel", "EVIL\x1b_{x}")
    for method in ("MT", "supervised"):
        maps = write_images(tmp_path, method, 1, sets, trained_on=["image_2", "image_3"])
    table, rows = report.report([tmp_path], baseline="supervised")
    assert [(row.dataset, row.method, row.test_cases) for row in rows] == [
        *(("EVIL _{x}", "supervised", 9), ("EVIL _{x}", "MT", 9), ("steel", "supervised", 9), ("steel", "MT", 9)),
    ]
    assert [sorted(row.trained_on) for row in rows[1:3]] == [["image_3"], ["image_2"]]
    assert all(row.differences == [] for row in rows)  # each beside the baseline of its own set
    record = next(r for r in table.records if (r["dataset"], r["method"]) == ("steel", "supervised"))
    assert record["dice_pooled_mean"] == pytest.approx(pooled(maps["steel"], metrics.dice))
    record = next(r for r in table.records if (r["dataset"], r["method"]) == ("steel", "MT"))
    assert record["dice_pairs"] == 9 and record["dice_p"] > 0
    # Fewer images in one set of one run: that row is marked, and no other.
    file = next(tmp_path.glob("seed1/model/*/MT/*/metrics.json"))
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"cases": result["cases"][3:], "trained_on": []}))
    _, rows = report.report([tmp_path], baseline="supervised")
    assert [row.differences for row in rows if row.differences] == [
        ["other test cases (8, of which 8 are among the 9)"]
    ]
    assert rows[3].differences


def test_names_of_classes_are_text_in_every_format_and_in_their_order(tmp_path):
    write_images(tmp_path, "MT", 1, trained_on=[])
    table, (row,) = report.report([tmp_path], per_class=True)
    assert row.classes() == NAMES and [r["class"] for r in table.records] == [*NAMES, "mean"]
    assert r"a\_b \& \$c\$ $<$i$>$" in report.to_latex(table)
    assert "a_b &amp; $c$ &lt;i&gt;" in report.to_markdown(table)
    assert [r["class"] for r in csv.DictReader(io.StringIO(report.to_csv(table)))] == [*NAMES[:2], "'=1+1", "mean"]
    # Another order of the classes in a second seed is no other row.
    write_images(tmp_path, "MT", 2, trained_on=[])
    file = next(tmp_path.glob("seed2/model/*/MT/*/metrics.json"))
    file.write_text(json.dumps((r := json.loads(file.read_text())) | {"cases": r["cases"][::-1]}))
    assert [len(row.results) for row in report.report([tmp_path])[1]] == [2]
