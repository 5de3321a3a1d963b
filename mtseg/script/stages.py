"""Stages, each a run of a training script that may begin with the weights of an earlier one: read from a JSON file, and
all of them checked before the first one starts. recipes/stages.py says what the file holds.
"""

import contextlib
import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from mtseg.checkpoint import file_sha256, load_fitting, write_whole
from mtseg.datasets import DataError, test_cases
from mtseg.finetuning import names_of
from mtseg.script import flags, methods
from mtseg.script.build import new_network
from mtseg.script.config import words_of
from mtseg.script.data import choose_cases
from mtseg.script.endings import sentence
from mtseg.script.networks import load_pretrained, network_class
from mtseg.script.runfolder import ASIDE, run_folder
from mtseg.script.sources import Source

FILE_KEYS = {"defaults": dict, "stages": list, "test": bool}
STAGE_KEYS = {"name": str, "script": str, "flags": dict, "from": str, "parts": str, "weights": str}
CHOICES = {"parts": flags.PARTS, "weights": ("last", "best")}
# Flags that stages give themselves, and what would undo them.
NOT_GIVEN = ("pretrained", "pretrained_parts", "from_scratch", "output_dir", "resume", "overwrite", "test_only")


class StageError(ValueError):
    """Stages that cannot be run one after the other; the message is one sentence with the stage and the remedy."""


@dataclass
class Stage:
    """`folder`: of its run. `script`: its path. `words`: of its flags but those that say with what it begins. `origin`:
    the Stage, or the Path of the file, that it begins with, None from scratch; `parts`: what it takes over; `weights`:
    of a stage, its 'last' or its 'best'. `args`: all its flags, as the script reads them. `loaded`: how many weights it
    takes over, None where that is not known before."""

    name: str
    folder: Path
    script: Path
    words: list
    origin: object
    parts: str
    weights: str
    args: object = None
    loaded: int | None = None

    def first_weights(self):
        """The file that it begins with, None from scratch. That of an earlier stage may not be there yet."""
        if not isinstance(self.origin, Stage):
            return self.origin
        if self.weights == "best":
            return run_folder(self.origin.args) / f"{self.origin.args.model}_best_model.pth"
        planned = run_folder(self.origin.args) / f"iter_{self.origin.args.max_iterations}.pth"
        return methods.trained_weights(self.origin.folder) or planned

    def command(self):
        """The words of its command line, the script first."""
        start, words = self.first_weights(), [self.script, *self.words, "--output_dir", self.folder, "--resume"]
        return words if start is None else [*words, "--pretrained", start, "--pretrained_parts", self.parts]

    def test_command(self, weights, other, result):
        """The words of the command line that tests `weights` of this stage on the test cases of the Stage `other`'s
        data, read as that stage reads them, into the folder `result`."""
        words = [flags.HOME / "inference.py", "--model_path", weights, "--network", self.args.network]
        words += ["--root_path", other.args.root_path, "--split", "test", "--output_dir", result, "--continue"]
        words += ["--gpu", self.args.gpu, f"--{'' if other.args.snap else 'no-'}snap"]
        words += [f"--{'' if other.args.slices_first else 'no-'}slices_first"]
        return words if other.args.ignore_index is None else [*words, "--ignore_index", other.args.ignore_index]

    def record(self):
        """What must not change once it has begun."""
        settings = {name: value for name, value in vars(self.args).items() if name not in ASIDE}
        script = self.script.relative_to(flags.HOME) if flags.HOME in self.script.parents else self.script
        others = {"script": str(script), "from": self.origin and self.origin.name, "weights": self.weights}
        return json.loads(json.dumps(settings | others))  # as a file gives it back

    def begin(self):
        """Write down what must not change from now on."""
        write_whole(self.folder / "stage.json", json.dumps(self.record(), indent=1).encode())


def read_stages(path, out):
    """([Stage, ...], whether they are to be tested) of the JSON file `path`, whose runs lie in folders below `out`.
    Raises StageError, before anything is written."""
    if not path.is_file():
        raise StageError(f"{path}: no such file; give a JSON file of stages")
    plan = flags.read_config(path)
    check_keys(path, plan, FILE_KEYS)
    entries, defaults, stages, known = plan.get("stages", []), plan.get("defaults", {}), {}, set()
    if not entries:
        raise StageError(f"{path}: has no stages; give a list of them")
    for place, entry in enumerate(entries):
        check_keys(f"{path}: stage {place + 1}", entry, STAGE_KEYS, ("name", "script"))
    check_order(path, entries)
    for entry in entries:
        with of_stage(path, entry["name"]):
            script = methods.find_script(entry["script"])
            parser = methods.parser_of(script)
            known |= {action.dest for action in parser._actions}
            stages[entry["name"]] = stage = make_stage(path, out, entry, script, parser, defaults, stages)
            check_begun(stage, flags.defaults_of(parser))
    if unknown := [name for name in defaults if name not in known | methods.all_flags()]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        remedy = f"did you mean --{near[0]}?" if near else "leave it out"
        raise StageError(f"{path}: defaults: no script has a flag --{unknown[0]}; {remedy}")
    for stage in stages.values():
        with of_stage(path, stage.name):
            check_data(stage.args, plan.get("test", True))
            stage.loaded = fitting_weights(stage)
    return [*stages.values()], plan.get("test", True)


@contextlib.contextmanager
def of_stage(path, name):
    """A context in which a mistake becomes a StageError that says of which stage of the file `path` it is."""
    try:
        yield
    except Exception as error:
        if (text := sentence(error)) is None:
            raise
        raise StageError(f"{path}: stage {name}: {text}") from error


def check_keys(where, entry, kinds, needed=()):
    """StageError where the JSON object `entry`, found `where`, lacks a `needed` key, or has one that is not among
    `kinds`, or a value of another kind."""
    if not isinstance(entry, dict):
        raise StageError(f"{where} is {json.dumps(entry)}; give an object with {', '.join(kinds)}")
    if missing := [name for name in needed if name not in entry]:
        raise StageError(f"{where} has no {missing[0]}; give it one")
    for key, value in entry.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(kinds)}"
            raise StageError(f"{where} has an unknown key {key!r}; {remedy}")
        if not isinstance(value, kinds[key]) or (key in CHOICES and value not in CHOICES[key]):
            words = {dict: "an object", list: "a list", str: "a word", bool: "true or false"}
            remedy = ", ".join(CHOICES[key]) if key in CHOICES else words[kinds[key]]
            raise StageError(f"{where}: {key} cannot be {json.dumps(value)}; give {remedy}")


def check_order(path, entries):
    """StageError where a name cannot be a folder's or is there twice, or a stage is from one that is not before it."""
    origins = {entry["name"]: entry.get("from") for entry in entries}
    for place, name in enumerate(entry["name"] for entry in entries):
        before = [entry["name"] for entry in entries[:place]]
        if "/" in name or name in ("", ".", ".."):
            raise StageError(f"{path}: stage {place + 1}: its name {name!r} is that of its folder: it cannot be a path")
        if [entry["name"] for entry in entries].count(name) > 1:  # else, from itself, it would be a circle
            raise StageError(f"{path}: there are two stages {name}; give each a name of its own")
        chain = [name]
        while (origin := origins.get(chain[-1])) in origins and origin not in chain:
            chain.append(origin)
        if origin == name:
            circle = ", ".join([*chain, name])
            raise StageError(f"{path}: the stages {circle} form a circle; begin one from scratch or from a file")
        if len(chain) > 1 and chain[1] not in before:
            raise StageError(f"{path}: stage {name} is from {chain[1]}, which comes after it; change their order")


def make_stage(path, out, entry, script, parser, defaults, before):
    """The Stage of the JSON object `entry`, of a `script` with this parser; `before`: {name: Stage} of earlier ones."""
    own, known = entry.get("flags", {}), {action.dest for action in parser._actions if action.dest != "help"}
    for name in (*own, *defaults):
        if name in NOT_GIVEN:
            raise StageError(f'--{name} is given by the stages themselves; leave it out, and say "from" and "parts"')
    if unknown := [name for name in own if name not in known]:
        remedy = parser._remedy(unknown[0]) or "; leave it out"
        raise StageError(f"{entry['script']} has no flag --{unknown[0]}{remedy}")
    if parser.get_default("labelnum") == 0:  # pretraining looks at no label, whatever the others have
        unused = ("labelnum", *flags.NOT_IN_PRETRAINING)
        defaults = {name: value for name, value in defaults.items() if name not in unused}
    settings = {name: value for name, value in {**defaults, **own}.items() if name in known and value is not None}
    words = [word for name, value in settings.items() for word in words_of(parser, path, name, value)]
    origin, parts, weights = entry.get("from"), entry.get("parts", "all"), entry.get("weights", "last")
    if origin is None and not entry.keys().isdisjoint(CHOICES):
        raise StageError('it has "parts" or "weights" without "from", where nothing is taken over; leave them out')
    origin = before.get(origin, origin and Path(origin))
    if isinstance(origin, Path):
        if "weights" in entry:
            raise StageError(f'"weights" with a file in "from" ({origin}): it is the file\'s; leave it out')
        if not origin.is_file():
            raise StageError(f"{origin}: there is neither such a file nor such a stage before it; mend its 'from'")
        load_pretrained(origin)  # it may be damaged, or something else
    elif weights == "best" and origin.args.labelnum == 0:
        raise StageError(f"{origin.name} is pretraining, which knows no best weights; take its last")
    elif weights == "best" and not origin.args.val_list:
        raise StageError(f"{origin.name} has no --val_list to choose its best weights by; add it, or take its last")
    stage = Stage(entry["name"], out / entry["name"], script, words, origin, parts, weights)
    with parser.errors_as(StageError):
        stage.args = flags.parse(parser, stage.command()[1:])
    return stage


def check_data(args, test):
    """DataError or FlagError where there is no such network, or where cases that a script with these flags trains,
    validates or tests on are not there, or too few. Built-in data that has not been made yet is as it should be."""
    if hasattr(args, "pretext"):
        flags.check_pretext(args)
    network_class(args.network)  # a file of one's own may not be there
    together = args.batch_size // args.accumulation_steps
    flags.check_normalization(args, min(args.batch_size - getattr(args, "labeled_bs", 0), together))
    source = Source(args.root_path)
    if not source.root.is_dir():
        return
    cases, other, _ = choose_cases(args, source)
    source.dataset(args, cases["train_cases"], args.labelnum)
    source.dataset(args, cases["val_cases"], 0 if args.labelnum == 0 else None)
    if cases.get("unlabeled_cases"):
        other.dataset(args, cases["unlabeled_cases"], 0)
    if test:
        tested_channels(args)


def fitting_weights(stage):
    """How many weights a stage would take over; CheckpointError where too few fit. None where that cannot be known yet:
    without data, or of a script of one's own, whose network may be any."""
    start, scripts, args = stage.first_weights(), [stage.script], [stage.args]
    if isinstance(stage.origin, Stage) and not start.is_file():
        scripts, args = [*scripts, stage.origin.script], [*args, stage.origin.args]
    made = all(Source(one.root_path).root.is_dir() for one in args)
    if start is None or not made or not all(flags.HOME in script.parents for script in scripts):
        return None
    net, *others = map(network_of, args)
    weights = others[0].state_dict() if others else load_pretrained(start)
    return load_fitting(net, weights, start, names_of(net, stage.parts), names_of(net, "encoder"))[0]


def network_of(args):
    """The network that the scripts of the repository make by these flags; that of pretraining gives images."""
    source = Source(args.root_path)
    cases, other, _ = choose_cases(args, source)
    source, cases = (source, cases["train_cases"]) if cases["train_cases"] else (other, cases["unlabeled_cases"])
    channels = source.dataset(args, cases[:1], 0).n_channels * (2 * args.context + 1)
    return new_network(args, channels, None if args.labelnum else channels)


def tested_channels(args):
    """The channels of the test cases of the data of a stage with these flags; 0 where there are none, or where
    pretraining knows no labels of them."""
    source = Source(args.root_path)
    cases = test_cases(source.root)
    try:
        return source.dataset(args, cases).n_channels if cases else 0
    except DataError:
        if args.labelnum:
            raise
        return 0


def data_sets(stages):
    """{folder: (name, the first stage that learns from it, the channels of its images)} of all data with test cases."""
    found = {}
    for stage in sorted(stages, key=lambda stage: stage.args.labelnum == 0):  # pretraining knows no classes
        if channels := tested_channels(stage.args):
            found.setdefault(Path(stage.args.root_path).resolve(), (stage.args.dataset_name, stage, channels))
    names = [name for name, *_ in found.values()]
    return {k: (f"{n}_{s.name}" if names.count(n) > 1 else n, s, c) for k, (n, s, c) in found.items()}


def kind_of(args):
    """What two stages must share, beside channels, for the network of one to be tested on the data of the other."""
    names = args.classes and [entry["name"] for entry in args.classes["classes"]]
    return args.dims, names or args.num_classes, args.background


def check_begun(stage, defaults):
    """StageError where a stage that has begun is another one now. `defaults`: of its script's flags, {name: value},
    which those that the script has got since must still have."""
    if not (stage.folder / "model").exists():  # what was refused may be mended
        return
    before, now = flags.read_config(stage.folder / "stage.json"), stage.record()
    if not before:
        raise StageError(f"{stage.folder} holds runs that are of no stage; give another --output_dir")
    before = {**defaults, **before}
    if changed := [name for name in now if now[name] != before.get(name)]:
        shown = {name: [json.dumps(one.get(name)) for one in (now, before)] for name in changed}
        words = "; ".join(f"{name} is {is_now} and was {was}" for name, (is_now, was) in shown.items())
        raise StageError(f"{stage.folder} has begun as another ({words}); restore it, or give another --output_dir")


def check_descent(stage):
    """StageError where the run of a stage began with other weights than those that it should begin with."""
    start, configs = stage.first_weights(), list(stage.folder.glob("model/*/*/config.json"))
    if start is None:  # what a --teacher_checkpoint descends from is its own affair
        return
    began = flags.read_config(configs[0]).get("pretrained_from") if configs else None
    if began and file_sha256(start) not in [one.get("sha256") for one in began]:
        raise StageError(
            f"{stage.folder}: began with other weights than those in {start}; delete it, or give another --output_dir"
        )
