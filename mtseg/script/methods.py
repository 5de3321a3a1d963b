"""The training scripts that there are: a method is one file, and whoever needs all of them finds them here.

Flags and names are read from the scripts' heads, which end where they answer --help: no PyTorch is loaded.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path

from mtseg.script import flags


class MethodError(ValueError):
    """A method that is not there; the message is one sentence with its name and the remedy."""


def training_scripts():
    """The paths of all training scripts: train_*.py of the repository and of its recipes/, in this order."""
    return [*sorted(flags.HOME.glob("train_*.py")), *sorted(flags.HOME.glob("recipes/train_*.py"))]


def scripts_with_runs():
    """The paths of all scripts that train a run: those of `training_scripts`, and those that learn without labels."""
    return [*training_scripts(), *sorted(flags.HOME.glob("recipes/pretrain_*.py"))]


def load_script(path):
    """The script at `path` as a module, with its main(argv); it loads PyTorch."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[path.stem] = module
    return sys.modules[path.stem]


def parser_of(path):
    """The PARSER of the script at `path`. Raises MethodError."""
    try:
        head = path.read_text(encoding="utf-8").partition("\nflags.answer_help(")[0]
        namespace = {"__name__": path.stem, "__file__": str(path)}
        exec(compile(head, path, "exec"), namespace)
        return namespace["PARSER"]
    except Exception as error:
        raise MethodError(f"{path}: cannot be loaded ({type(error).__name__}: {error}); mend it") from error


def parsers(paths):
    """{path: parser} of the scripts `paths`. One that cannot be loaded, being written perhaps, is left out."""
    loaded = {}
    for path in paths:
        with contextlib.suppress(MethodError):
            loaded[path] = parser_of(path)
    return loaded


def method_of(path):
    """The name of the method of the script at `path`: the default of its --model, such as 'MT'."""
    return parser_of(path).get_default("model")


def names():
    """The names of all methods."""
    return [parser.get_default("model") for parser in parsers(scripts_with_runs()).values()]


def all_flags():
    """The names of the flags that the scripts have, all together."""
    return {action.dest for parser in parsers(scripts_with_runs()).values() for action in parser._actions}


def scripts_with(flag):
    """The names of the scripts, inference.py too, that have the flag `flag`, such as '--input'."""
    training = training_scripts()
    scripts = parsers([*scripts_with_runs(), flags.HOME / "inference.py"])
    names = [path.name for path, parser in scripts.items() if flag in parser._option_string_actions]
    everywhere = {path.name for path in training} <= {*names}
    return ["every training script", *names[len(training) :]] if everywhere else names


def find_script(word):
    """The path of the training script that `word` names: a file, here or in the repository; a script of the repository,
    with or without its ending, or its method. Raises MethodError."""
    for path in (Path(word), flags.HOME / word):
        if path.suffix == ".py" and path.is_file():
            return path.resolve()
    scripts = training_scripts()
    by_name = {path.stem: path for path in scripts}
    if (name := word.removesuffix(".py")) in by_name:
        return by_name[name]
    of_method = [path for path, parser in parsers(scripts).items() if parser.get_default("model") == word]
    if len(of_method) > 1:
        own = " and ".join(str(path.relative_to(flags.HOME)) for path in of_method)
        raise MethodError(f"{word}: is the method of {own}; name the script, or give the copy a name of its own")
    if of_method:
        return of_method[0]
    raise MethodError(f"{word}: no such training script; there are {', '.join(by_name)}, or give the path of your own")


def trained_weights(folder, weights="student"):
    """The weights of the last iteration of the run below `folder`, of its network `weights`; None until it has ended.

    With --keep_last, which leaves such files on the way, the last of --max_iterations, or what --patience ended with.
    """
    from mtseg.script.run import PREFIXES
    from mtseg.script.runfolder import numbered_weights, stopped_early  # here, as both load PyTorch

    configs = list(Path(folder).glob("model/*/*/config.json"))
    files = numbered_weights(configs[0].parent) if configs else []
    if not files:
        return None
    config, last = flags.read_config(configs[0]), files[-1]
    on_the_way = config.get("keep_last") and last.stem != f"iter_{config.get('max_iterations')}"
    if on_the_way and not stopped_early(last, config):
        return None
    return last.with_name(f"{PREFIXES.get(weights, f'{weights}_')}{last.name}")
