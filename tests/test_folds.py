"""Five folds: nnU-Net's splits_final.json written and read, a run a fold, and one row of the report."""

import itertools
import json
import shutil

import h5py
import numpy as np
import pytest
from conftest import TINY, make_data
from make_splits import main as make_splits
from prepare_nifti import main as prepare_nifti
from test_report import write_run

import inference
import train_mean_teacher
import train_sup
from mtseg.figures.runs import find_runs, read_runs
from mtseg.report.__main__ import main as show
from mtseg.report.table import report
from mtseg.splits import SplitError, known_patients, make_folds, read_folds


def kfold(names):
    """What scikit-learn's KFold(5, shuffle=True, random_state=12345) makes of the sorted names, as its pages say."""
    shuffled, names = np.random.RandomState(12345).permutation(len(names)), sorted(names)
    sizes = [len(names) // 5 + (number < len(names) % 5) for number in range(5)]
    ends = np.cumsum([0, *sizes])
    held = [{names[index] for index in shuffled[a:b]} for a, b in itertools.pairwise(ends)]
    return [{"train": [n for n in names if n not in val], "val": [n for n in names if n in val]} for val in held]


@pytest.mark.parametrize("count", [5, 9, 52, 128])
def test_where_every_case_is_a_patient_folds_are_nnunets(count):
    names = [f"la_{number:03}" for number in range(count)]
    shuffled = np.random.default_rng(0).permutation(names).tolist()
    assert make_folds({name: name for name in shuffled}) == kfold(names)


def test_no_patient_of_a_fold_is_on_both_sides_and_each_case_is_tested_once():
    rng = np.random.default_rng(0)
    patients = {f"p{p:02}_{s}": f"p{p:02}" for p in range(23) for s in range(rng.integers(1, 5))}
    folds = make_folds(patients, 7)
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(patients)
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(patients)
        assert not {patients[case] for case in fold["train"]} & {patients[case] for case in fold["val"]}
    assert {len({patients[case] for case in fold["val"]}) for fold in folds} == {3, 4}
    with pytest.raises(SplitError, match="--folds 24: there are 23 patients"):
        make_folds(patients, 24)


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "LA", train=10, test=2)


def refused(capsys, main, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_the_script_writes_folds_of_the_lists_that_lie_there(data, capsys):
    lists = {name: (data / name).read_text() for name in ("train.list", "test.list")}
    make_splits([str(data), "--folds", "5"])
    assert "5 folds, which test 2, 2, 2, 2, 2 cases" in capsys.readouterr().out
    folds = json.loads((data / "splits_final.json").read_text())
    assert folds == kfold([f"case_{number}" for number in range(10)])
    assert lists == {name: (data / name).read_text() for name in lists}
    # A file that lies there is checked and kept.
    theirs = [{"train": fold["val"], "val": fold["train"]} for fold in make_folds({c: c for c in folds[0]["train"]}, 2)]
    text = json.dumps(theirs)
    (data / "splits_final.json").write_text(text)
    make_splits([str(data), "--folds", "2"])
    assert (data / "splits_final.json").read_text() == json.dumps(theirs, indent=4)
    line = refused(capsys, make_splits, data, "--folds", 5)
    assert "has 2 folds already, not 5; replace it with --overwrite" in line
    make_splits([str(data), "--folds", "5", "--overwrite"])
    assert json.loads((data / "splits_final.json").read_text()) == folds
    # With a new split, its own folds; patients by the pattern that is given, which training knows then.
    make_splits(
        [str(data), "--folds", "3", "--test", "3", "--seed", "2", "--overwrite", "--patient_id", "case_([0-9])"]
    )
    train, test = ((data / name).read_text().split() for name in lists)
    folds = json.loads((data / "splits_final.json").read_text())
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(train) and not {*train} & {*test}
    patients, _ = known_patients(data, [*train, "case_17", "other"])  # which came later
    assert patients["case_17"] == "1" and patients["other"] == "other" and patients.get("case_11", "1") == "1"
    (data / "splits.json").write_text(json.dumps({"patients": {"p01": ["p01_1", "p01_2"], "p02": ["p02_1", "p02_2"]}}))
    assert known_patients(data, ["p01_3", "p03_1"])[0] == known_patients(data, ["p01_1"])[0] | {
        "p01_3": "p01",
        "p03_1": "p03",
    }


@pytest.mark.parametrize(
    ("folds", "words"),
    [
        ("{", "no list of folds"),
        ("[]", "no list of folds"),
        ('[{"train": ["a_1"], "val": []}]', "no list of folds"),
        ('[{"train": ["a_1"]}]', "no list of folds"),
        ('[{"train": ["a_1"], "val": "b_1"}]', "no list of folds"),
        ('[{"train": ["a_1"], "val": ["b_7"]}]', "fold 0 names case b_7, which is not in train.list"),
        ('[{"train": ["a_1", "c_1"], "val": ["c_1"]}]', "fold 0 trains and validates on patient c "),
        ('[{"train": ["a_1"], "val": ["a_2"]}]', r"fold 0 trains and validates on patient a \(case a_1 and case a_2\)"),
        (
            '[{"train": ["a_1"], "val": ["b_1"]}, {"train": ["c_1"], "val": ["b_1"]}]',
            "case b_1 is validated on by fold 0 and by 1",
        ),
    ],
)
def test_a_file_that_is_none_of_folds_ends_in_a_sentence(tmp_path, folds, words):
    patients = {"a_1": "a", "a_2": "a", "b_1": "b", "c_1": "c"}
    (tmp_path / "splits_final.json").write_text(folds)
    with pytest.raises(SplitError, match=words):
        read_folds(tmp_path, patients)


def test_lists_that_share_a_patient_have_no_folds(data, capsys):
    line = refused(capsys, make_splits, data, "--folds", 5, "--patient_id", "case_([0-9])")  # 1 and 10, 11
    assert "patient 1 is on two sides" in line and not (data / "splits_final.json").exists()
    (data / "splits.json").write_text('{"patients": {"1": 7}}')
    assert "splits.json: does not say" in refused(capsys, make_splits, data, "--folds", 5)


def test_a_split_that_nobody_asked_for_says_nothing_of_patients(tmp_path, capsys):
    """Whether Sick_1 and Sick_2 are one patient, nobody has said: the folds must not go by what was never decided."""
    nibabel = pytest.importorskip("nibabel")
    for name in ("Healthy_1", "Healthy_2", "Sick_1", "Sick_2"):
        image = np.random.default_rng(len(name)).standard_normal((10, 9, 8)).astype(np.float32)
        for part, array in (("imagesTr", image), ("labelsTr", (image > 1).astype(np.uint8))):
            (tmp_path / "scans" / part).mkdir(parents=True, exist_ok=True)
            ending = "_0000.nii.gz" if part == "imagesTr" else ".nii.gz"
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "scans" / part / f"{name}{ending}")
    prepare_nifti([str(tmp_path / "scans"), str(tmp_path / "out")])
    capsys.readouterr()
    assert "the names do not tell" in refused(capsys, make_splits, tmp_path / "out", "--folds", 2)
    make_splits([str(tmp_path / "out"), "--folds", "2", "--patient_id", "(.+)_"])
    for fold in json.loads((tmp_path / "out/splits_final.json").read_text()):
        assert len({name[:3] for name in fold["val"]}) == 1


def flags(data, out, fold, labelnum=3, **more):
    given = {**TINY, "root_path": data, "output_dir": out, "labelnum": labelnum, "max_iterations": 1, "fold": fold}
    return [word for name, value in (given | more).items() for word in (f"--{name}", *str(value).split())]


def test_flags_that_ask_for_no_fold_end_in_a_sentence(data, tmp_path, capsys):
    out, mistake = tmp_path / "out", "make it with data/make_splits.py"
    assert mistake in refused(capsys, train_sup.main, *flags(data, out, 0))
    make_splits([str(data), "--folds", "5"])
    assert "has 5 folds, numbered from 0" in refused(capsys, train_sup.main, *flags(data, out, 7))
    (tmp_path / "val.list").write_text("case_1\n")
    words = flags(data, out, 0, val_list=tmp_path / "val.list")
    assert "--fold 0 with --val_list" in refused(capsys, train_sup.main, *words)
    with h5py.File(data / "data/case_2/mri_norm2.h5", "a") as file:
        del file["label"]
    fold = next(
        number for number, fold in enumerate(make_folds({f"case_{n}": n for n in range(10)})) if "case_2" in fold["val"]
    )
    assert "case case_2 has no 'label'" in refused(capsys, train_sup.main, *flags(data, out, fold))
    assert not out.exists()


def test_five_folds_end_in_one_row(data, tmp_path, capsys):
    make_splits([str(data), "--folds", "5"])
    folds = kfold([f"case_{number}" for number in range(10)])
    for fold in range(5):
        folder = train_sup.main(flags(data, tmp_path, fold))
        assert folder == tmp_path / f"model/LA_vnet_3_labeled/supervised_fold_{fold}"
        config = json.loads((folder / "config.json").read_text())
        assert config["train_cases"] == folds[fold]["train"][:3] and config["val_cases"] == []
        result = inference.main(["--model_path", str(folder / "iter_1.pth")])
        assert [row["case"] for row in result["cases"]] == folds[fold]["val"] and not result["trained_on"]
        assert result["selection"] == "last iteration" and (folder / "iter_1_fold/metrics.json").is_file()
    # Wherever the data lies by now: what tells the fold is that its cases are in the list there.
    shutil.copytree(data, tmp_path / "moved")
    moved = inference.main(["--model_path", str(folder / "iter_1.pth"), "--root_path", str(tmp_path / "moved")])
    assert [row["case"] for row in moved["cases"]] == folds[4]["val"] and moved["fold"] == 4
    result = inference.main(["--model_path", str(folder / "iter_1.pth")])
    dices = []
    for fold in range(5):
        path = tmp_path / f"model/LA_vnet_3_labeled/supervised_fold_{fold}/iter_1_fold/metrics.json"
        dices += [row["dice"] for row in json.loads(path.read_text())["cases"]]
    table, (row,) = report([tmp_path / "model"])
    (record,) = table.records
    assert row.name == "supervised (5 folds)" and row.test_cases == len(dices) == 10
    assert record["dice_mean"] == pytest.approx(np.mean(dices)) and record["dice_sd_cases"] == pytest.approx(
        np.std(dices)
    )
    assert row.mark == "" and record["seeds"] == "1337"
    # The test cases are another result of the same run, which is not pooled.
    result = inference.main(["--model_path", str(folder / "iter_1.pth"), "--split", "test"])
    assert {row["case"] for row in result["cases"]} == {"case_10", "case_11"} and "fold" not in result
    inference.main(["--model_path", str(folder.parent / "supervised_fold_0/iter_1.pth"), "--split", "test"])
    scan = str(data / "data/case_10/mri_norm2.h5")
    assert "fold" not in inference.main(["--model_path", str(folder / "iter_1.pth"), "--input", scan])
    (folder / "iter_1_mri_norm2/metrics.json").unlink()
    names = [row.name for row in report([tmp_path / "model"])[1]]
    assert len(names) == 3 and all(name.startswith("supervised (") and "_cases" not in name for name in names)
    assert {name for name, *_ in read_runs(find_runs([tmp_path / "model"]))} == {"supervised, 3 labels"}


def test_semi_supervised_runs_leave_out_every_scan_of_the_folds_patients(tmp_path):
    root = make_data(tmp_path / "LA", train=10, test=2)
    names = [
        "sub-0_a",
        "sub-0_b",
        "sub-1_a",
        "sub-1_b",
        "sub-2_a",
        "sub-3_a",
        "sub-4_a",
        "sub-0_c",
        "sub-4_c",
        "sub-9_a",
    ]
    for number, name in enumerate(names):
        (root / f"data/case_{number}").rename(root / f"data/{name}")
    (root / "train.list").write_text("\n".join(reversed(names[:7])))
    (root / "test.list").write_text("sub-10_a")
    (root / "unlabeled.list").write_text("\n".join(names[7:]))
    make_splits([str(root), "--folds", "5"])
    folds = json.loads((root / "splits_final.json").read_text())
    fold = next(number for number, fold in enumerate(folds) if "sub-0_a" in fold["val"])
    assert folds[fold]["val"] == ["sub-0_a", "sub-0_b"]
    folder = train_mean_teacher.main(flags(root, tmp_path, fold, labelnum=2))
    config = json.loads((folder / "config.json").read_text())
    assert config["train_cases"] == ["sub-4_a", "sub-3_a", "sub-2_a", "sub-1_b", "sub-1_a"]  # in train.list's order
    assert config["unlabeled_cases"] == ["sub-4_c", "sub-9_a"] and config["fold_cases"] == ["sub-0_a", "sub-0_b"]


# ----------------------------------------------------------------------------------------------------------- report


def write_results(out, folds, seed=1, method="supervised", val=None, **changes):
    """Results of the `folds` of a cross-validation of ten cases, two a fold; returns the Dice of all cases."""
    dice = np.random.default_rng(seed).uniform(0.5, 0.9, (5, 2)).round(4)
    for fold in folds:
        cases = (val or {}).get(fold, [f"case_{2 * fold}", f"case_{2 * fold + 1}"])
        config = {"fold": fold, "folds": 5, "fold_cases": cases, "train_cases": [f"t{fold}"], **changes}
        where = {"dice": dice[fold].tolist(), "cases": cases, "config": config.items()}
        write_run(out / f"fold{fold}", method, seed, fold=fold, folds=5, split="fold", **where)
    return dice


def test_each_seed_pools_its_folds_and_what_is_missing_is_said(tmp_path):
    first, second = (write_results(tmp_path / f"s{seed}", range(5), seed) for seed in (1, 2))
    table, _ = report([tmp_path])
    means = [first.mean(), second.mean()]
    (record,) = table.records
    assert (record["method"], record["seeds"], record["cases"]) == ("supervised (5 folds)", "1 2", 10)
    assert record["dice_mean"] == pytest.approx(np.mean(means))
    assert record["dice_sd_seeds"] == pytest.approx(np.std(means, ddof=1))
    assert record["dice_sd_cases"] == pytest.approx(np.mean([first.std(), second.std()]))
    write_results(tmp_path / "MT", (0, 1, 3), 3, "MT")
    table, (whole, part) = report([tmp_path], baseline="supervised")
    assert part.name == "MT (3 of 5 folds), student" and "other test cases" in part.incomparable and not whole.mark
    assert "MT (3 of 5 folds), student, 8 labels: still to be tested: fold 2, fold 4." in table.notes


def test_settings_make_another_row_and_the_same_case_twice_is_refused(tmp_path, capsys):
    write_results(tmp_path / "a", range(5), base_lr=0.1)
    write_results(tmp_path / "b", range(5), base_lr=0.2)
    _, rows = report([tmp_path])
    assert [row.name for row in rows] == ["supervised (5 folds) (base_lr 0.1)", "supervised (5 folds) (base_lr 0.2)"]
    write_results(tmp_path / "c", (0, 1), 3, val={1: ["case_0", "case_2"]})
    assert "folds 0 and 1 both test case case_0" in refused(capsys, show, tmp_path / "c")


def test_the_page_shows_curves_and_settings_of_every_fold(tmp_path, monkeypatch):
    page = pytest.importorskip("mtseg.html_report.__main__", reason="needs Matplotlib")
    write_results(tmp_path, range(5))
    for run in tmp_path.glob("fold*/seed1/model/*/supervised"):
        (run / "metrics.csv").write_text("iteration,loss\n1,0.5\n2,0.4\n")
    drawn, read = [], page.read_runs
    monkeypatch.setattr(page, "read_runs", lambda runs: drawn.extend(runs) or read(runs))
    page.main([str(tmp_path), "--out", str(tmp_path / "page.html")])
    assert sorted(str(run.relative_to(tmp_path))[:5] for run in drawn) == [f"fold{fold}" for fold in range(5)]
    text = (tmp_path / "page.html").read_text()
    assert all(f"seed 1, fold {fold}" in text and f"t{fold}" in text for fold in range(5))
