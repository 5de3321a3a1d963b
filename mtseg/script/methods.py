"""The training scripts that there are: a method is one file, and whoever needs all of them finds them here.

To load a script is to load PyTorch, too.
"""

import importlib.util
import sys

from mtseg.script import flags


def training_scripts():
    """The paths of all training scripts: train_*.py of the repository and of its recipes/, in this order."""
    return [*sorted(flags.HOME.glob("train_*.py")), *sorted(flags.HOME.glob("recipes/train_*.py"))]


def load_script(path):
    """The training script at `path` as a module, whose PARSER has its flags, and whose main(argv) trains."""
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def method_of(path):
    """The name of the method of the script at `path`: the default of its --model, such as 'MT'."""
    return load_script(path).PARSER.get_default("model")


def names():
    """The names of all methods."""
    return [method_of(path) for path in training_scripts()]


def all_flags():
    """The names of the flags that the training scripts have, all together."""
    return {action.dest for path in training_scripts() for action in load_script(path).PARSER._actions}
