"""Every leaf of mtseg stands alone, rooms are where leaves meet, and the scripts do nothing when they are imported."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "mtseg").rglob("*.py"))
PACKAGES = [p for p in FILES if p.name == "__init__.py"]
SCRIPTS = [ROOT / "inference.py", *sorted(ROOT.glob("train_*.py")), *sorted(ROOT.glob("recipes/train_*.py"))]
ROOMS = {"script", "report", "figures", "html_report", "export", "active"}
LEAVES = [p for p in FILES if p.parent.name not in ROOMS and p.name != "__init__.py"]
ALLOWED = {"torch", "numpy", "scipy", "h5py", "tqdm", *sys.stdlib_module_names}
# Inside functions only: what setup.py names as extras.
EXTRAS = {"matplotlib", "mpl_toolkits", "PIL", "tifffile", "skimage", "wandb", "nibabel", "nrrd", "onnx", "onnxruntime"}

IMPORT_ALONE = """
import importlib, json, shutil, sys, tempfile
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mtseg", "data"):
            raise ImportError(f"{name} is not there in an empty folder")

sys.meta_path.insert(0, Blocked())
for leaf in map(Path, json.loads(sys.argv[1])):
    folder = tempfile.mkdtemp()
    shutil.copy(leaf, folder)
    sys.path.insert(0, folder)
    module = importlib.import_module(leaf.stem)
    assert Path(module.__file__).parent == Path(folder), module.__file__
    del sys.modules[leaf.stem]
    sys.path.pop(0)
    shutil.rmtree(folder)
    print(leaf.stem)
"""


def test_each_leaf_can_be_copied_into_an_empty_folder(tmp_path):
    paths = json.dumps([str(p) for p in LEAVES])
    done = subprocess.run([sys.executable, "-c", IMPORT_ALONE, paths], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [p.stem for p in LEAVES]


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda p: p.stem)
def test_a_leaf_imports_only_what_the_library_depends_on(leaf):
    for node in ast.walk(ast.parse(leaf.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        lazy = isinstance(node, (ast.Import, ast.ImportFrom)) and node.col_offset > 0
        assert {name.split(".")[0] for name in names} <= ALLOWED | (EXTRAS if lazy else set())
        assert not (isinstance(node, ast.ImportFrom) and node.level)


def test_each_package_hands_names_on_and_does_nothing_else():
    assert PACKAGES
    for package in PACKAGES:
        for number, node in enumerate(ast.parse(package.read_text()).body):
            docstring = number == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            constant = isinstance(node, ast.Assign) and not any(
                isinstance(part, (ast.Call, ast.Lambda, ast.comprehension)) for part in ast.walk(node)
            )
            hands_on = isinstance(node, ast.ImportFrom) and node.module.startswith("mtseg.") and node.level == 0
            assert docstring or constant or hands_on, f"{package}: line {node.lineno}"


def test_scripts_do_nothing_when_they_are_imported(tmp_path):
    folders = [str(ROOT), str(ROOT / "recipes")]
    code = f"import sys; sys.path[:0] = {folders}; import {', '.join(script.stem for script in SCRIPTS)}"
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_answer_before_they_load_pytorch(script):
    blocked = "import runpy, sys; sys.modules.update(torch=None, numpy=None); sys.argv = sys.argv[1:]"
    code = f"{blocked}; runpy.run_path(sys.argv[0], run_name='__main__')"
    for words, status in (["--help"], 0), (["--model_pth", "a.pth"], 2):
        command = [sys.executable, "-c", code, str(script), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
