"""What README.md and docs/ show is what there is: their code runs, their tables are those of the scripts."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtseg.script import flag_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/write_your_own_method.md"
TINY = "--labelnum 3 --max_iterations 2 --n_filters 2 --num_workers 0 --patch_size 16 16 16 --stride_xy 8 --stride_z 8"


def test_the_table_of_flags_is_the_parsers():
    assert (ROOT / "docs/flags.md").read_text() == flag_table.page(), "python -m mtseg.script.flag_table writes it anew"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the repository with the recipe of the page "Write your own method" as its one new file."""
    copy = tmp_path_factory.mktemp("repository")
    for name in ("mtseg", "recipes", "benchmarks", "tests", "docs", "data"):
        ignored = shutil.ignore_patterns("__pycache__", "LA", "Phantom", "*.png")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, copy)
    (where, code), *others = re.findall(r"<!-- (recipes/\S+) -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert not others
    assert sum(map(bool, code.splitlines())) <= 40
    (copy / where).write_text(code)
    return copy


def python(repository, *words, cwd=None):
    """What the command prints, which must end well."""
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd or repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_method_of_ones_own_is_one_new_file(repository, data, tmp_path):
    """It trains, is tested and reported through benchmarks/seeds.py, from any folder."""
    script = repository / "recipes/train_entropy.py"
    words = [script, *TINY.split(), "--root_path", data]
    assert "--consistency_rampup" in python(repository, script, "--help", cwd=tmp_path)
    seeds = [repository / "benchmarks/seeds.py", "--seeds", 1, 2, "--out", tmp_path / "runs"]
    table = python(repository, *seeds, *words, cwd=tmp_path)
    assert "EntMin" in table and "mean ± SD over seeds" in table
    report = python(repository, "-m", "mtseg.report", tmp_path / "runs", cwd=tmp_path)
    assert "EntMin" in report


def test_a_method_of_ones_own_is_found_by_tests_and_docs(repository):
    python(repository, "-m", "mtseg.script.flag_table")
    assert "recipes/train_entropy.py" in (repository / "docs/flags.md").read_text()
    chosen = "EntMin and (hidden_labels or several_channels or resuming_with_every_option)"
    assert "\n3 passed" in python(repository, "-m", "pytest", "-q", "tests/test_recipe.py", "-k", chosen)
