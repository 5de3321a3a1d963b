"""Where a run lies and what it runs on, whether it may start, and whether what is resumed is the same run."""

import platform
from pathlib import Path

import torch

# Settings that may differ when a run goes on: they say where, how far and how often, never what is computed. (The
# cases themselves, train_cases and val_cases, must be the same, wherever they lie.)
FREE_SETTINGS = {
    *("root_path", "dataset_name", "exp", "model", "output_dir", "resume", "overwrite", "gpu", "num_workers"),
    *("max_iterations", "save_freq", "log_freq", "val_list", "val_freq", "stride_xy", "stride_z", "selection"),
    *(
        "config",
        "cache",
        "keep_memory",
        "preprocessing",
        "keep_last",
        "patience",
        "test_only",
        "tensorboard",
        "wandb",
        "progress",
        "unlabeled_root",
    ),
    *("teacher_checkpoint", "teacher_checkpoint_for", "pretrained"),
}
# With these schedules the length of a run decides every learning rate.
LENGTH_SCHEDULES = ("poly", "cosine")
VERSIONS = ("python", "torch", "device", "threads", "ranks")


class RunError(ValueError):
    """A run that cannot start or go on; the message is one sentence with the folder and the remedy."""


def run_folder(args):
    """`<output_dir>/model/<dataset>_<exp>_<labelnum>_labeled/<model>`, from the parsed flags."""
    for name in ("dataset_name", "exp", "model"):
        if "/" in getattr(args, name) or getattr(args, name) in ("", ".", ".."):
            raise RunError(f"--{name} {getattr(args, name)!r} names a folder of the run: it cannot be or hold a path")
    return Path(args.output_dir) / "model" / f"{args.dataset_name}_{args.exp}_{args.labelnum}_labeled" / args.model


def checkpoint_to_resume(folder, resume, overwrite):
    """The checkpoint to go on from, or None for a run from the start.

    `resume`: None (a new run; RunError where one lies in `folder` already, unless `overwrite`), a file, or 'latest'
    for `<folder>/latest.pth`, which need not be there yet: a run may have been cut off before it was written.
    """
    latest = folder / "latest.pth"
    if resume not in (None, "latest"):
        return Path(resume)
    if resume == "latest":
        if not latest.exists() and list(folder.glob("*.pth")):
            raise RunError(f"{folder}: has weights but no latest.pth to go on from; start anew with --overwrite")
        return latest if latest.exists() else None
    if not overwrite and (folder / "config.json").exists():
        raise RunError(
            f"{folder}: a run lies there already; go on with it by --resume, replace it by --overwrite, or name "
            f"another place by --output_dir or --exp"
        )
    return None


def how_selected(val_cases, test_cases):
    """How the reported checkpoint is chosen, for config.json, and a list of sentences about it for the log."""
    watched = set(val_cases) & set(test_cases)
    if watched:
        return "test set", [
            f"{len(watched)} cases of --val_list are test cases: what they select is selected on the test set"
        ]
    return ("validation list" if val_cases else "last iteration"), []


def selection_of(path, config, checkpoint):
    """How `checkpoint`, read from file `path` of the run with this config, was chosen among all of that run."""
    selection, last = config.get("selection", "unknown"), config.get("max_iterations")
    if selection == "validation list" and not path.stem.endswith("best_model"):
        selection = "last iteration"
    if selection == "last iteration" and checkpoint.get("iteration", last) != last:
        return f"iteration {checkpoint['iteration']} of an unfinished run"
    return selection


def newest_weights(folder):
    """The iter_<N>.pth with the largest N in `folder`; RunError where there is none."""
    found = {path: path.stem.removeprefix("iter_") for path in folder.glob("iter_*.pth")}
    found = {path: int(number) for path, number in found.items() if number.isdigit()}
    if not found:
        raise RunError(f"{folder}: holds no iter_<N>.pth to test; train first, or name another run by its flags")
    return max(found, key=found.get)


def remove_old_weights(folder):
    """Delete the .pth files of the run that --overwrite replaces, latest.pth first: nothing may resume from it."""
    for path in sorted(folder.glob("*.pth"), key=lambda path: path.name != "latest.pth"):
        path.unlink()


def lock_folder(folder):
    """Keep other processes out of the run's folder until this one ends; RunError where one is in it already.

    The lock goes with the returned file, and with the process, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        why = error.strerror or error
        raise RunError(f"{folder}: cannot be written to ({why}); choose another --output_dir") from error
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # not a POSIX system: nobody watches
    except OSError as error:
        file.close()
        raise RunError(f"{folder}: another process is training there; wait for it or name another --exp") from error
    return file


def check_same_run(config, state, path, parts):
    """RunError if `state`, read from `path`, is not of such a run: other parts, other settings in `config`, longer.

    Returns a list: a sentence on versions that differ, which may change the last bits of the numbers, or nothing.
    """
    if not isinstance(state, dict) or state.keys() != {"iteration", "progress", "config", *parts}:
        raise RunError(f"{path}: does not hold the state of such a run; resume from a latest.pth of the same script")
    if state["iteration"] > config["max_iterations"]:
        raise RunError(
            f"{path}: is at iteration {state['iteration']}, past --max_iterations {config['max_iterations']}; raise it"
        )
    for name in ("train_cases", "val_cases", "unlabeled_cases"):
        if state["config"].get(name) != config.get(name):
            raise RunError(f"{path}: the run was started on other cases ({name} differ); restore the lists")
    differing = {
        name: (config.get(name), value) for name, value in state["config"].items() if config.get(name) != value
    }
    free = FREE_SETTINGS - ({"max_iterations"} if config.get("lr_schedule") in LENGTH_SCHEDULES else set())
    changed = [
        f"--{name} is {now} and was {then}"
        for name, (now, then) in differing.items()
        if name not in free and name not in VERSIONS
    ]
    if changed:
        raise RunError(f"{path}: not the same run ({'; '.join(changed)}); resume with the flags it was started with")
    versions = [f"{name} is {now} and was {then}" for name, (now, then) in differing.items() if name in VERSIONS]
    return [f"the last bits of the numbers may change: {', '.join(versions)}"] if versions else []


def choose_device(gpu, amp="off"):
    """torch.device of GPU number `gpu` (a string), or of the CPU where there is no GPU at all.

    `amp`: the mixed precision that is asked for. RunError for a GPU that is not there, and for 'bf16' on a CPU without
    bf16 instructions, where PyTorch's gradients of small convolutions can be anything (seen with 2.13).
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        if amp == "bf16" and not native:
            raise RunError("--amp bf16 without a GPU: this CPU has no bf16, it would be slow and wrong; take --amp off")
        return torch.device("cpu")
    if not gpu.isdigit() or int(gpu) >= count:
        raise RunError(f"--gpu {gpu}: there are {count} GPUs, numbered from 0; name one of them")
    torch.cuda.set_device(int(gpu))  # also for the thread that pins memory, which would wake GPU 0 otherwise
    return torch.device(f"cuda:{gpu}")


def versions(device):
    """Versions and device for config.json: what else the numbers may depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which checkpoints read as weights only may not hold
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
    }
