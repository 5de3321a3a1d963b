"""The state that a run goes on from, and the weights that are its results."""

import json
from pathlib import Path

import torch

from mtseg.checkpoint import CheckpointError, load_weights, save_checkpoint, write_whole
from mtseg.script.endings import first_line
from mtseg.script.runfolder import numbered_weights


class RunState:
    """Everything a run goes on from, in <folder>/latest.pth: the state_dicts of `parts`, the iteration, `progress`.

    It is written whole, or stays as it was.
    `networks`: {prefix: network}, such as {"": student, "ema_": teacher}; their state_dicts alone are the results, in
    files that begin with the prefix. `others`: {name: optimizer, schedule, scaler, or a module that is no result}.
    `parts`: both together, a network as <prefix>model. `config`: the run's settings, kept beside. With `writes=False`,
    for all but one of several processes, nothing is written.
    """

    def __init__(self, folder, networks, others, config, writes):
        self.folder = Path(folder)
        self.networks = networks
        self.parts = {**{f"{prefix}model": net for prefix, net in networks.items()}, **others}
        self.config = config
        self.writes = writes

    def save_config(self):
        """Write the settings to config.json: of several processes, the one that writes calls it alone."""
        write_whole(self.folder / "config.json", json.dumps(self.config, indent=1).encode())

    def load(self, state, path, progress):
        """Take over `state`, read from a latest.pth at `path`; returns its iteration and its progress.

        `progress`: what a run of this kind begins with, {name: number}. Raises CheckpointError where a part does not
        fit.
        """
        name = "progress"
        try:
            if state["progress"].keys() != progress.keys() or not same_kind(state["progress"], progress):
                raise ValueError("other fields")
            for name, part in self.parts.items():
                if isinstance(part, torch.nn.Module):
                    load_weights(part, state[name], path)
                    continue
                if not same_kind(state[name], part.state_dict()):
                    raise ValueError("values of other kinds")
                part.load_state_dict(state[name])
                if isinstance(part, torch.optim.Optimizer):
                    check_moments(part)
        except CheckpointError:
            raise
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: its {name} is not that of such a run ({first_line(error)}); start anew"
            ) from error
        return state["iteration"], state["progress"]

    def save(self, iteration, progress):
        """Write latest.pth."""
        if self.writes:
            state = {"iteration": iteration, "progress": progress, "config": self.config}
            state |= {name: part.state_dict() for name, part in self.parts.items()}
            save_checkpoint(state, self.folder / "latest.pth")

    def save_weights(self, iteration, keep_last=None):
        """Write iter_<iteration>.pth of each network; with `keep_last`, only the newest so many stay. That of the
        first network is the last that is written: where it lies, so do the others."""
        for prefix, net in reversed(self.networks.items()) if self.writes else ():
            save_checkpoint(net.state_dict(), self.folder / f"{prefix}iter_{iteration}.pth")
            if keep_last is not None:
                for path in numbered_weights(self.folder, prefix)[:-keep_last]:
                    path.unlink()

    def save_best(self, prefix, name):
        """Write the weights of the network that `prefix` stands for to <prefix><name>_best_model.pth."""
        if self.writes:
            save_checkpoint(self.networks[prefix].state_dict(), self.folder / f"{prefix}{name}_best_model.pth")

    def take_best(self, folder, name):
        """Take over the best weights of the run that goes on here from another `folder`; later may be no better."""
        for best in [f"{prefix}{name}_best_model.pth" for prefix in self.networks]:
            if folder.resolve() != self.folder.resolve() and (folder / best).is_file():
                write_whole(self.folder / best, (folder / best).read_bytes())


def same_kind(saved, fresh):
    """Whether what a file holds can stand where `fresh` does: a number for a number, as long a list for a list, ...

    Keys of one of two dicts alone are passed over: versions of PyTorch differ in them.
    """
    if isinstance(fresh, dict):
        shared = saved.keys() & fresh.keys() if isinstance(saved, dict) else ()
        return isinstance(saved, dict) and all(same_kind(saved[name], fresh[name]) for name in shared)
    if isinstance(fresh, (list, tuple)):
        alike = isinstance(saved, (list, tuple)) and len(saved) == len(fresh)
        return alike and all(map(same_kind, saved, fresh))
    return not isinstance(fresh, (int, float)) or isinstance(saved, (int, float))


def check_moments(optimizer):
    """ValueError where an average that the optimizer keeps of a weight's gradient has another shape than the weight."""
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)} instead of {tuple(parameter.shape)}")
