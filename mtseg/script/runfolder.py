"""Where a run lies and what it runs on, whether it may start, and whether what is resumed is the same run."""

import errno
import hashlib
import json
import platform
import re
import shutil
from pathlib import Path

import torch

from mtseg.checkpoint import file_sha256, load_checkpoint
from mtseg.script.checks import is_own
from mtseg.script.config import FAST_DECIDES, LEARNED

# What config.json says of the weights that a run began with: the chain of files, and all cases that these have seen.
ANCESTRY = ("pretrained_from", "pretrained_cases")
VERSIONS = ("python", "torch", "device", "instructions", "threads", "ranks", "code")
# Settings that say where, by which means and how often: never what is computed.
ASIDE = {"output_dir", "resume", "config", "plan", "pretrained", "gpu", "num_workers", "cache", "keep_memory"}
ASIDE |= {"save_freq", "keep_last", "log_freq", "tensorboard", "wandb", "progress"}
# Settings that may differ when a run goes on: these, how far and by what it is judged, its name and its folders. (The
# cases themselves, train_cases and val_cases, must be the same, wherever they lie.)
FREE_SETTINGS = {
    *("root_path", "unlabeled_root", "val_list", "dataset_name", "exp", "model", "overwrite", "test_only", *ASIDE),
    *("max_iterations", "patience", "val_freq", "stride_xy", "stride_z", "selection", "data_crc32", *ANCESTRY),
    "teacher_checkpoint",
}
BEGINNINGS = ("pretrained", "teacher_checkpoint")  # the files of weights that a run begins with
# Runs that differ in these alone are of one method. What else may differ when a run goes on, makes another one of it.
MADE_ANOTHER = {"max_iterations", "patience", "data_crc32", *BEGINNINGS}
ALIKE = {"seed", *VERSIONS, *FREE_SETTINGS} - MADE_ANOTHER
# What the folds of one cross-validation differ in.
OF_FOLD = {"fold", "fold_cases", "train_cases", "unlabeled_cases", "data_crc32"}
# With these schedules the length of a run decides every learning rate, or the validations do.
LENGTH_SCHEDULES = ("poly", "cosine", "warmup", "sawtooth")
PLATEAU_SETTINGS = {"val_freq", "stride_xy", "stride_z"}
# What inference.py writes into the folder with a checkpoint's results.
RESULT_FILES = ("metrics.csv", "metrics.json", "cases.jsonl")
RESULT_FOLDERS = ("predictions", "probabilities", "uncertainty", "colors")


class RunError(ValueError):
    """A run that cannot start or go on; the message is one sentence with the folder and the remedy."""


def run_folder(args):
    """`<output_dir>/model/<dataset>_<exp>_<labelnum>_labeled/<model>`, of a fold `<model>_fold_<K>`, from the flags."""
    for name in ("dataset_name", "exp", "model"):
        if "/" in getattr(args, name) or getattr(args, name) in ("", ".", ".."):
            raise RunError(f"--{name} {getattr(args, name)!r} names a folder of the run: it cannot be or hold a path")
    name = args.model if args.fold is None else f"{args.model}_fold_{args.fold}"
    exp = f"{args.exp}_from_scratch" if args.from_scratch else args.exp
    return Path(args.output_dir) / "model" / f"{args.dataset_name}_{exp}_{args.labelnum}_labeled" / name


def numbered_weights(folder, prefix=""):
    """The files <prefix>iter_<N>.pth in `folder`, by rising N; any other name, such as iter_best.pth, is left out."""
    numbers = {path: path.stem.removeprefix(f"{prefix}iter_") for path in folder.glob(f"{prefix}iter_*.pth")}
    return sorted((path for path, number in numbers.items() if number.isdecimal()), key=lambda path: int(numbers[path]))


def holds_run(folder):
    """Whether a run lies in `folder`: its settings, its state or its weights."""
    return any((folder / name).exists() for name in ("config.json", "latest.pth")) or bool(numbered_weights(folder))


def checkpoint_to_resume(folder, resume, overwrite):
    """The checkpoint to go on from, or None for a run from the start.

    `resume`: None (a new run), 'latest' for `<folder>/latest.pth`, which need not be there yet, since a run may have
    been cut off before it was written, or a file. RunError where a new run, or a file of another folder, would replace
    a run that lies in `folder`, unless `overwrite`.
    """
    latest, lies_there = folder / "latest.pth", holds_run(folder) or (folder / "metrics.csv").exists()
    if resume == "latest":
        if overwrite:
            raise RunError("--resume with --overwrite: one goes on, the other starts anew; leave one out")
        # The best weights alone are of a run that was killed between its first validation and its first state.
        if not latest.exists() and list(folder.glob("*iter_*.pth")):
            raise RunError(f"{folder}: has weights but no latest.pth to go on from; start anew with --overwrite")
        return latest if latest.exists() else None
    if resume is not None:
        path = Path(resume)
        if not path.is_file():
            raise RunError(f"--resume {path}: no such file; give a run's latest.pth, or --resume alone")
        if lies_there and not overwrite and not is_inside(path, folder):
            raise RunError(
                f"--resume {path}: another run lies in {folder}; take another --output_dir or --exp, or --overwrite it"
            )
        return path
    if lies_there and not overwrite:
        raise RunError(f"{folder}: a run lies there; --resume goes on, --overwrite replaces it, or take another --exp")
    return None


def command_to_resume(command):
    """The words of `command` with `--resume`, instead of the --overwrite or --resume FILE it was started with."""
    words = list(command)
    if "--resume" in words:
        place = words.index("--resume")
        alone = place + 1 == len(words) or words[place + 1].startswith("--")
        del words[place : place + (1 if alone else 2)]
    return [*(word for word in words if word != "--overwrite" and not word.startswith("--resume=")), "--resume"]


def is_inside(path, folder):
    """Whether the file `path` lies in `folder`, however both are written."""
    return path.resolve().parent == folder.resolve()


def how_selected(val_cases, test_cases):
    """How the reported checkpoint is chosen, for config.json, and a list of sentences about it for the log."""
    watched = set(val_cases) & set(test_cases)
    if watched:
        return "test set", [
            f"{len(watched)} cases of --val_list are test cases: what they select is selected on the test set"
        ]
    return ("validation list" if val_cases else "last iteration"), []


def ancestry_of(path, config, **how):
    """ANCESTRY of a run that begins with the weights in the file `path`, beside which `config` lies, {} if none does:
    {'pretrained_from': [{'file', 'sha256', **how, 'model', 'dataset_name', 'selection', 'settings'}, and those that
    these weights began with, ...], 'pretrained_cases': the names of all cases that any of them was trained on}.
    'settings': the SHA-256 of what runs of one method share; None of a file that is not a run's."""
    entry = {"file": str(path), "sha256": file_sha256(path), **how}
    entry |= {name: config.get(name) for name in ("model", "dataset_name", "selection")}
    left_out = ALIKE - {"model", "dataset_name"} | {*BEGINNINGS, *(() if config.get("fold") is None else OF_FOLD)}
    shared = json.dumps({name: config[name] for name in sorted(config.keys() - left_out)}).encode()
    entry["settings"] = hashlib.sha256(shared).hexdigest() if "torch" in config else None

    def listed(kind, *names):  # beside a file of strangers anything may lie
        values = [config[name] for name in names if isinstance(config.get(name), list)]
        return [one for value in values for one in value if isinstance(one, kind)]

    return {
        "pretrained_from": [entry, *listed(dict, "pretrained_from")],
        "pretrained_cases": sorted({*listed(str, *LEARNED)}),
    }


def selection_of(path, config, checkpoint):
    """How `checkpoint`, read from file `path` of the run with this config, was chosen among all of that run."""
    selection, length = config.get("selection", "unknown"), config.get("max_iterations")
    best = selection == "validation list" and path.stem.endswith("best_model")
    if best or selection not in ("validation list", "last iteration"):
        return selection
    prefix, _, number = path.stem.rpartition("iter_")
    iteration = int(number) if number.isdecimal() else checkpoint.get("iteration", length)
    ended = iteration == length or (path in numbered_weights(path.parent, prefix)[-1:] and stopped_early(path, config))
    return "last iteration" if ended else f"iteration {iteration} of {length}"


def stopped_early(path, config):
    """Whether the run with this config, whose newest weights are in `path`, was ended there by its --patience: as its
    state in latest.pth says, without which nothing goes on."""
    latest = path.with_name("latest.pth")
    if not (config.get("patience") and latest.is_file()):
        return bool(config.get("patience"))
    state = load_checkpoint(latest)
    return path.stem.endswith(f"iter_{state['iteration']}") and state["progress"]["waited"] >= config["patience"]


def newest_weights(folder):
    """The iter_<N>.pth with the largest N in `folder`; RunError where there is none."""
    weights = numbered_weights(folder)
    if not weights:
        raise RunError(f"{folder}: holds no iter_<N>.pth to test; train first, or name another run by its flags")
    return weights[-1]


def remove_run(folder, prefixes, model):
    """Delete the weights of the run that --overwrite replaces, and what inference.py has written of them beside them.

    latest.pth goes first: nothing may resume from it. `prefixes`: of the files with a network's weights; `model`: the
    method's name, as in <prefix><model>_best_model.pth. Files with any other name are not the run's and stay.
    """
    weights = [folder / "latest.pth"]
    for prefix in prefixes:
        weights += [*numbered_weights(folder, prefix), folder / f"{prefix}{model}_best_model.pth"]
    for path in weights:
        path.unlink(missing_ok=True)
    stems = "|".join(re.escape(path.stem) for path in weights)
    for results in folder.iterdir():
        if results.is_dir() and re.match(f"({stems})_", results.name) and (results / "metrics.json").is_file():
            remove_results(results)


def remove_results(folder):
    """Delete what inference.py has written to `folder`, and the folder where nothing else lies in it."""
    for name in RESULT_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in RESULT_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def lock_folder(folder):
    """Keep other processes out of the run's folder until this one ends; RunError where one is in it already.

    Returns (file, notes): the lock goes with the file, and with the process, however it ends; `notes` is a list with a
    sentence where the file system has no locks, or empty.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{folder}: cannot be written to ({reason}); choose another --output_dir") from error
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return file, []  # not a POSIX system
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise RunError(f"{folder}: another process is training there; wait for it or name another --exp") from error
        reason = error.strerror or error
        return file, [f"{folder}: its file system has no locks ({reason}), so take care that no two runs write there"]
    return file, []


def check_same_run(config, state, path, parts, defaults, fixed_length=False):
    """RunError if `state`, read from `path`, is not of such a run: other parts, other settings in `config`, longer.

    `defaults`: {flag: default} of the script. A flag that the run did not know yet must have its default.
    `fixed_length`: the run's length must be the same too.
    Returns a list of sentences: on code that was changed, on versions that differ, which may change the last bits.
    """
    kinds = {"iteration": int, "progress": dict, "config": dict}
    whole = isinstance(state, dict) and state.keys() == {*kinds, *parts}
    if not (whole and all(isinstance(state[name], kind) for name, kind in kinds.items()) and state["iteration"] >= 0):
        raise RunError(f"{path}: does not hold the state of such a run; resume from a latest.pth of the same script")
    if state["iteration"] > config["max_iterations"]:
        length = config["max_iterations"]
        raise RunError(f"{path}: at iteration {state['iteration']}, past --max_iterations {length}; raise it")
    before = {**defaults, **dict.fromkeys(FAST_DECIDES, False), **state["config"]}
    for name in ("train_cases", "val_cases", "unlabeled_cases", "fold_cases"):
        if before.get(name) != config.get(name):
            raise RunError(f"{path}: the run was started on other cases ({name} differ); restore the lists")
    if before.get("data_crc32") not in (None, config.get("data_crc32")):
        raise RunError(f"{path}: the run was started on other data of the same names; give that, or --overwrite it")
    began, start = before.get("pretrained_from"), config.get("pretrained")
    if start and not config.get("from_scratch") and (began or not before.get("pretrained")) and Path(start).is_file():
        if file_sha256(start) not in [one.get("sha256") for one in began or []]:
            raise RunError(f"{path}: the run did not begin with {start}; leave it out, give its file, or start anew")
    taught, given = (bool(settings.get("teacher_checkpoint")) for settings in (before, config))
    if taught != given:  # from it the teacher's averages count
        raise RunError(f"{path}: the run began with{'' if taught else 'out'} --teacher_checkpoint; resume it so")
    prepared = before.pop("preprocessing", None), config.get("preprocessing")
    if None not in prepared and prepared[0] != prepared[1]:
        raise RunError(f"{path}: the data has been prepared in another way since; restore preprocessing.json and data/")
    differing = {name: (config.get(name), value) for name, value in before.items() if config.get(name) != value}
    # A flag that the script has lost since may have been off.
    differing = {name: values for name, values in differing.items() if name in config or values[1]}
    free, aside = set(FREE_SETTINGS), set(VERSIONS)
    if config.get("fast") and before.get("fast"):  # which chooses them anew on each machine
        aside |= {"tf32", *FAST_DECIDES}
    if fixed_length or config.get("lr_schedule") in LENGTH_SCHEDULES:
        free.remove("max_iterations")
    if config.get("lr_schedule") == "plateau":
        free -= PLATEAU_SETTINGS
    changed = [
        f"--{name} is {now} and was {then}"
        if name in config
        else f"--{name} was {then}, and this script has no such flag"
        for name, (now, then) in differing.items()
        if name not in free | aside
    ]
    if changed:
        raise RunError(f"{path}: not the same run ({'; '.join(changed)}); resume with the flags it was started with")
    notes, (now, then) = [], differing.pop("code", ({}, {}))
    then = then if isinstance(then, dict) else {}  # a stranger's
    then.setdefault("network", now.get("network"))  # which was not recorded at first
    if changed := [name for name in now if now[name] != then.get(name)]:
        what = " and ".join(
            {"script": "the script", "mtseg": "mtseg", "network": "the network's file"}[name] for name in changed
        )
        notes.append(f"{what} was changed since this run began: its numbers may be those of neither version")
    versions = [f"{name} is {now} and was {then}" for name, (now, then) in differing.items() if name in aside]
    return notes + [f"the last bits of the numbers may change: {', '.join(versions)}"] * bool(versions)


def choose_device(gpu, amp="off"):
    """torch.device of GPU number `gpu` (a string), or of the CPU where there is no GPU at all.

    `amp`: the mixed precision that is asked for. RunError for a GPU that is not there, and for 'bf16' on any CPU:
    PyTorch's weight gradients of bf16 convolutions on features of 2 x 2 x 2 voxels are wrong there, up to infinity
    (seen with 2.13, on processors with bf16 instructions and on others).
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        if amp == "bf16":
            raise RunError("--amp bf16 on a CPU: gradients of bf16 convolutions are wrong there; take --amp off")
        return torch.device("cpu")
    if not gpu.isdigit() or int(gpu) >= count:
        raise RunError(f"--gpu {gpu}: there are {count} GPUs, numbered from 0; name one of them")
    torch.cuda.set_device(int(gpu))  # also for the thread that pins memory, which would wake GPU 0 otherwise
    return torch.device(f"cuda:{gpu}")


def versions(device, script, network):
    """Versions and device for config.json: what else the numbers may depend on. 'code': the SHA-256 of the file
    `script`, of all files of mtseg, and of that of a `network` of one's own."""
    library = Path(__file__).parents[1]
    files = {"script": [Path(script)], "mtseg": sorted(library.rglob("*.py"))}
    files |= {"network": [Path(network.rpartition(":")[0])]} if is_own(network) else {}
    code = {name: hashlib.sha256(b"".join(path.read_bytes() for path in paths)) for name, paths in files.items()}
    return {
        "code": {name: digest.hexdigest() for name, digest in code.items()},
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which checkpoints read as weights only may not hold
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
