"""What README.md and docs/ show is what there is: their code runs, their tables are those of the scripts."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_data, make_images, make_stacks
from warm_python import warm_python

from mtseg.script import flag_table
from mtseg.script.methods import training_scripts

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/write_your_own_method.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METHODS = sorted((ROOT / "docs/methods").glob("*.md"))
TINY = "--labelnum 3 --max_iterations 2 --n_filters 2 --num_workers 0 --patch_size 16 16 16 --stride_xy 8 --stride_z 8"


def test_the_table_of_flags_is_the_parsers():
    assert (ROOT / "docs/flags.md").read_text() == flag_table.page(), "python -m mtseg.script.flag_table writes it anew"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the repository with the recipe of the page "Write your own method" as its one new file."""
    copy = tmp_path_factory.mktemp("repository")
    for name in ("mtseg", "recipes", "benchmarks", "tests", "docs", "configs", "data/splits"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, copy / path.relative_to(ROOT))
    (where, code), *others = re.findall(r"<!-- (recipes/\S+) -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert not others
    assert sum(map(bool, code.splitlines())) <= 40
    (copy / where).write_text(code)
    return copy


@pytest.fixture
def python(repository):
    """A function that gives what a command of Python in the repository prints; it must end well."""

    def printed(*words, cwd=repository):
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return printed


@pytest.mark.parametrize(
    ("line", "instead", "sentence"),
    [
        ("updater.step(loss)", "loss.backward()", "nothing has been learned yet; call updater.step(loss)"),
        ("run.end_iteration(", "dict(", "iteration 1 has not ended; call run.end_iteration"),
        ("loss=loss, ", "", "run.end_iteration has no loss"),
        ('{"student": model}', "{}", "run.started has no network"),
        ("entropy_loss=entropy", "entropy_loss=p", "entropy_loss has shape (2, 2, 16, 16, 16); give one number"),
    ],
)
def test_a_line_that_a_new_method_forgets_ends_in_a_sentence(data, tmp_path, capsys, line, instead, sentence):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert code.count(line) == 1
    script = tmp_path / "train_forgetful.py"
    script.write_text(code.replace(line, instead))
    main = runpy.run_path(str(script))["main"]
    with pytest.raises(SystemExit) as ended:
        main([*TINY.split(), "--root_path", str(data), "--output_dir", str(tmp_path)])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
    assert not list(tmp_path.rglob("iter_*.pth"))


def test_a_method_of_ones_own_is_one_new_file(python, repository, data, tmp_path):
    """It trains, is tested and reported through benchmarks/table.py, from any folder."""
    script = repository / "recipes/train_entropy.py"
    words = [script, *TINY.split(), "--root_path", data]
    assert "--consistency_rampup" in python(script, "--help", cwd=tmp_path)
    rows = [repository / "benchmarks/table.py", "--seeds", 1, 2, "--labels", 3, "--out", tmp_path / "runs"]
    table = python(*rows, "--methods", script, "--flags", *words[1:], cwd=tmp_path)
    assert "EntMin" in table and "mean ± SD over seeds" in table
    report = python("-m", "mtseg.report", tmp_path / "runs", cwd=tmp_path)
    assert "EntMin" in report


def test_a_recipe_that_is_being_written_is_in_nobodys_way(python, repository, data, tmp_path):
    (repository / "recipes/train_half.py").write_text("from mtseg import nothing_of_this_name\n")
    try:
        (tmp_path / "settings.json").write_text(json.dumps({"consistency_type": "kl", "seed": 2}))
        words = [*TINY.split(), "--root_path", data, "--config", tmp_path / "settings.json", "--output_dir", tmp_path]
        assert "left out" in python(repository / "train_sup.py", *words)
    finally:
        (repository / "recipes/train_half.py").unlink()


def test_a_method_of_ones_own_is_found_by_tests_and_docs(python, repository):
    python("-m", "mtseg.script.flag_table")
    assert "recipes/train_entropy.py" in (repository / "docs/flags.md").read_text()
    chosen = "EntMin and (hidden_labels or several_channels or resuming_with_every_option)"
    assert "\n3 passed" in python("-m", "pytest", "-q", "tests/test_recipe.py", "-k", chosen)


def test_every_link_leads_somewhere():
    for page in [*PAGES, *METHODS]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_method_has_a_page_and_a_row():
    scripts = {path.stem.removeprefix("train_") for path in training_scripts()} - {"sup"}
    assert {page.stem for page in METHODS} == scripts | {"README"}
    for table in (ROOT / "docs/methods/README.md", ROOT / "README.md"):
        text = table.read_text()
        assert all(f"({name}.md)" in text or f"train_{name}.py)" in text for name in scripts), table


# ------------------------------------------------------------------------------------------------- every command runs

EXTRAS = ("PIL", "tifffile", "matplotlib", "skimage", "nibabel", "nrrd", "onnx", "onnxruntime")
# Commands that other tests or .ci/run make: installing, the tests themselves, measuring, comparing commits.
MADE_ELSEWHERE = re.compile(r"pip install|python -m pytest|benchmarks/run\.py|benchmarks/same_bits\.py|--grid|simulate")
SMALL = {"--max_iterations": 2, "--n_filters": 2, "--patch_size": "32 32 16", "--stride_xy": 16, "--stride_z": 8}
SMALL |= {"--num_workers": 0, "--progress": 0}
IMAGES = re.compile(
    r"--dims 2|--patch_size \d+ \d+ --|data/(Steel|Coating|both|uhcs|ebc|ACDC)"
)  # of a command that trains on images


def commands(page):
    """The shell commands of a page, in their order."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def small(line):
    """The command `line` on tiny data, with a tiny network and two iterations."""
    line = re.sub(r"(?<=\s)/data/LA", "sets/LA", line.partition("  #")[0])
    line = re.sub(r"iter_\d+", "iter_2", line).replace("seed1337", "seed1")
    line = line.replace('"Training Set" data/LA', '"Training Set" made/LA')
    line = line.replace("torchrun ", "python -m torch.distributed.run ")
    line = line.replace("python ", "$PYTHON ")
    table = "table.py" in line or "active_learning.py" in line
    script = "--flags" if table else r"(?:recipes/)?(?:pre)?train_\w+\.py"
    before, script, rest = re.match(rf"(.*?)({script}|$)(.*)", line).groups()
    if not script:
        return line
    words = shlex.split(rest.replace("--class_weights 1 3 3 3", "--class_weights 1 3 3"))  # as many as tiny stacks have
    small = dict(SMALL)
    if IMAGES.search(line) and not re.search("slices_first|acdc_thin|plan_acdc", line):
        small |= {"--patch_size": "32 32"} | ({"--resize": "32 32"} if "--resize" in words or "acdc" in line else {})
    small |= {"--consistency_warmup": 1} if "--consistency_warmup" in words else {}
    for name in small.keys() & set(words):
        begin = words.index(name)
        end = next((i for i in range(begin + 1, len(words)) if words[i].startswith("--")), len(words))
        del words[begin:end]
    before = before.replace("table.py", "table.py --seeds 1")
    words += [w for name, value in small.items() for w in (name, *str(value).split())]
    return f"{before}{script} {shlex.join(words)}" + ("" if table or "--resume" in words else " --overwrite")


def run_page(page, workspace, python):
    """Run all commands of a page by the executable `python`; those that failed, with what they printed.

    In `runs` lie the results of README.md's commands alone, whichever pages came before: reports read all of it.
    """
    for made in ("data/LA_half", "data/Heart", "data/Planned", "data/both", "made", "runs"):
        shutil.rmtree(workspace / made, ignore_errors=True)
    if (workspace / "runs_of_readme").exists():
        shutil.copytree(workspace / "runs_of_readme", workspace / "runs")
    environment = {**os.environ, "PYTHONPATH": str(workspace), "PYTHON": str(python)}
    failed = []
    for line in commands(page):
        if not MADE_ELSEWHERE.search(line):
            words = ["bash", "-c", small(line)]
            done = subprocess.run(words, cwd=workspace, env=environment, capture_output=True, text=True)
            if done.returncode:
                failed.append(f"{line}\n{small(line)}\n{done.stdout[-500:]}{done.stderr[-1500:]}")
    return failed


def write_scans(root):
    """A folder in the Decathlon's layout: twenty labelled scans and two others."""
    nibabel = pytest.importorskip("nibabel")
    (root / "dataset.json").parent.mkdir(parents=True)
    (root / "dataset.json").write_text(
        json.dumps({"labels": {"0": "background", "1": "heart"}, "modality": {"0": "MR"}})
    )
    for number in range(22):
        rng, part = np.random.default_rng(number), "Tr" if number < 20 else "Ts"
        label = np.zeros((24, 22, 18), np.uint8)
        label[8:16, 6:14, 5:12] = 1
        image = np.float32(100 + 50 * label + 10 * rng.standard_normal(label.shape))
        for kind, array in (("images", image), ("labels", label)):
            (root / f"{kind}{part}").mkdir(exist_ok=True)
            if kind == "images" or part == "Tr":
                path = root / f"{kind}{part}/la_{number:03}.nii.gz"
                nibabel.save(nibabel.Nifti1Image(array, np.diag([1.25, 1.25, 1.4, 1])), path)


def write_challenge(root):
    """Two cases as the Atrial Segmentation Challenge has them."""
    nrrd = pytest.importorskip("nrrd")
    for name in ("train", "test"):
        case = root / (ROOT / f"data/splits/LA/{name}.list").read_text().split()[0]
        case.mkdir(parents=True)
        label = np.zeros((130, 130, 8), np.uint8)
        label[60:70, 60:70, 2:6] = 255
        nrrd.write(str(case / "lgemri.nrrd"), np.random.default_rng(0).normal(50, 20, label.shape).astype(np.float32))
        nrrd.write(str(case / "laendo.nrrd"), label)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    for extra in EXTRAS:
        pytest.importorskip(extra)
    with warm_python(tmp_path_factory.mktemp("warm")) as python:
        yield python


@pytest.fixture(scope="module")
def workspace(repository, warm):
    """The copied repository with tiny data sets in it, in which README.md's commands have run; those that failed."""
    make_data(repository / "data/Phantom", train=124, test=2)
    make_data(repository / "sets/LA", train=30, test=3)
    make_data(repository / "data/LA", train=30, test=3)
    make_images(repository / "data/Steel", train=12, test=2)
    make_images(repository / "data/Coating", train=8, test=2)
    make_data(repository / "data/LA_68", train=68, test=2)
    for name in ("uhcs", "ebc", "superalloy", "uhcs_val", "ebc_val"):
        make_images(repository / f"data/{name}", train=16, test=2)
    for made in (repository / "data/Steel", repository / "data/Coating"):
        for path in made.glob("*.list"):
            path.unlink()
    for name, train in (("ACDC", 32), ("ACDC_val", 120)):
        make_stacks(repository / f"data/{name}", train=train, test=2)
        (repository / f"data/{name}/classes.json").unlink()
    write_scans(repository / "Task02_Heart")
    write_challenge(repository / "Training Set")
    failed = run_page(PAGES[0], repository, warm)
    shutil.copytree(repository / "runs", repository / "runs_of_readme")
    return repository, failed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs(page, workspace, warm):
    repository, failed_in_readme = workspace
    failed = failed_in_readme if page == PAGES[0] else run_page(page, repository, warm)
    assert not failed, "\n\n".join(failed)


def test_commands_on_acdc_label_seven_patients():
    """As those of the published figures: train.list names the two frames of a patient one by one."""
    commands = [
        line
        for page in METHODS
        for line in page.read_text().splitlines()
        if line.startswith("python ") and "_acdc.json" in line
    ]
    assert len(commands) > 10
    for line in commands:
        config = json.loads((ROOT / re.search(r"configs/\w+\.json", line)[0]).read_text())
        assert ("--labelnum 14 " in line) != (config.get("labelnum") == 14), line
