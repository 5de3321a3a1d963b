"""Files of settings: the config.json of a run, and what --config takes."""

import argparse
import difflib
import json

from mtseg.script.checks import NOT_IN_PRETRAINING, FlagError
from mtseg.script.parser import given_flags

# What a run adds to its flags in config.json.
RECORDED = {"n_channels", "python", "torch", "device", "threads", "train_cases", "val_cases"}
RECORDED |= {"tf32", "selection", "unlabeled_cases", "preprocessing", "ranks", "data_crc32", "instructions", "code"}
RECORDED |= {"classes", "background", "folds", "fold_cases", "pretrained_from", "pretrained_cases"}
LEARNED = ("train_cases", "unlabeled_cases", "pretrained_cases")  # the lists of cases that weights have seen
FAST_DECIDES = ("channels_last", "winograd", "compile")  # with --fast, on each machine anew


def read_config(path):
    """The settings in a config.json, {} where there is none; FlagError where it is no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise FlagError(f"{path}: not a JSON file ({error}); repair it or move it away") from error
    if not isinstance(config, dict):
        raise FlagError(f"{path}: not a JSON object; repair it or move it away")
    return config


def config_settings(parser, path):
    """{name: value} of the flags in the JSON file `path`; FlagError names a wrong key or value.

    Understands what a run wrote into its config.json: RECORDED and how that run was started are passed over. Settings
    that only other scripts have, or use, are left out, and a line says so.
    """
    from mtseg.script import methods  # here, as its scripts need this module

    if not path.is_file():
        raise FlagError(f"--config {path}: no such file; give a JSON file with flags, such as a run's config.json")
    left_out, elsewhere = [], methods.all_flags()
    known = {action.dest for action in parser._actions if action.option_strings and action.dest != "help"}
    config, settings = read_config(path), {}
    for key, value in config.items():
        if key in RECORDED or key in ("config", "resume", "overwrite", "test_only"):
            continue
        unused = value and key in NOT_IN_PRETRAINING and parser.get_default("labelnum") == 0
        if unused or (key not in known and key in elsewhere):
            left_out.append(key)
            continue
        if key == "plan" and "torch" in config:
            continue  # a run's own record holds what its plan said
        if key == "model" and value != parser.get_default("model") and value in methods.names():
            continue  # another method's name is not this one's
        if key in ("freeze", "unfreeze_at") and "torch" in config and config.get("lr_schedule") == "sawtooth":
            continue  # that schedule has set them, and another schedule or length does not have them
        if key in FAST_DECIDES and config.get("fast") is True and "torch" in config:
            continue  # what --fast was there; this machine's may be another one
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "take it out, or see --help all for what there is"
            raise FlagError(f"{path}: unknown key {key!r}; {remedy}")
        if value is not None and (key, value) != ("labelnum", 0):  # which pretraining has, and nobody can give
            settings[key] = value_of(parser, path, key, value)
    if left_out:
        print(f"{path}: left out, since this script has no use for them: {', '.join(left_out)}", flush=True)
    return settings


def value_of(parser, path, key, value):
    """What the flag `key` of `parser` makes of its `value` in the JSON file `path`; FlagError for a wrong one."""
    words = words_of(parser, path, key, value)
    with parser.errors_as(lambda message: FlagError(f"{path}: {message}; see --help")):
        return given_flags(parser, words)[key]


def words_of(parser, path, key, value):
    """The words of a command line that give the flag `key` of `parser` its `value` in the JSON file `path`; FlagError
    for one that no flag can have."""
    action = next(action for action in parser._actions if action.dest == key)
    switch = isinstance(action, argparse.BooleanOptionalAction)
    entries = value if isinstance(value, list) else [value]
    nested = any(isinstance(entry, list) and len(entry) < 2 for entry in entries)  # [[2], 2] is no [2, 2]
    entries = [",".join(map(str, entry)) if isinstance(entry, list) else str(entry) for entry in entries]
    wrong = nested or isinstance(value, dict) or any(entry.startswith("--") for entry in entries)
    if wrong or isinstance(value, bool) != switch:
        raise FlagError(f"{path}: {key} cannot be {json.dumps(value)}; see --help for what --{key} takes")
    return [f"--{key}" if value else f"--no-{key}"] if switch else [f"--{key}", *entries]
