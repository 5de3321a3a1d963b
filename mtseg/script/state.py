"""The state that a run goes on from, and the weights that are its results."""

import json
import math
from pathlib import Path

import torch

from mtseg.checkpoint import load_weights, save_checkpoint, write_whole


class NotFiniteError(ArithmeticError):
    """Training went to NaN or infinity; the message is one sentence with the iteration and what is left."""


class RunState:
    """Everything a run goes on from, in <folder>/latest.pth: the state_dicts of `parts`, the iteration, `progress`.

    It is written whole and with finite weights, or stays as it was.
    `parts`: dict of name -> anything with state_dict and load_state_dict (networks, optimizer, schedule, scaler).
    `weights`: of those, prefix -> name of the networks whose plain state_dicts are results, such as {"": "model",
    "ema_": "ema_model"}. `config`: the run's settings, kept beside. With `writes=False`, for all but one of several
    processes, everything is checked and nothing written.
    """

    def __init__(self, folder, parts, weights, config, writes=True):
        self.folder = Path(folder)
        self.parts = parts
        self.weights = weights
        self.config = config
        self.writes = writes

    def save_config(self):
        """Write the settings to config.json."""
        if self.writes:
            write_whole(self.folder / "config.json", json.dumps(self.config, indent=1).encode())

    def load(self, state, path):
        """Take over `state`, read from a latest.pth at `path`; returns its iteration and its `progress`."""
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                load_weights(part, state[name], path)
            else:
                part.load_state_dict(state[name])
        return state["iteration"], state["progress"]

    def check_finite(self, iteration):
        """NotFiniteError where a network has a weight that is no number."""
        for name in self.weights.values():
            if not all(value.isfinite().all() for value in self.parts[name].state_dict().values()):
                raise NotFiniteError(f"the weights are not finite after iteration {iteration}; {self.last_good()}")

    def check_loss(self, loss, iteration):
        """NotFiniteError where the float `loss` is no number."""
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss became {loss} at iteration {iteration}; {self.last_good()}")

    def save(self, iteration, progress):
        """Write latest.pth; never over a good state with a broken one."""
        self.check_finite(iteration)
        if not self.writes:
            return
        state = {"iteration": iteration, "progress": progress, "config": self.config}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        save_checkpoint(state, self.folder / "latest.pth")

    def save_weights(self, iteration, keep_last=None):
        """Write iter_<iteration>.pth of each network; with `keep_last`, only the newest so many stay."""
        for prefix, name in self.weights.items() if self.writes else ():
            save_checkpoint(self.parts[name].state_dict(), self.folder / f"{prefix}iter_{iteration}.pth")
            if keep_last is not None:
                found = self.folder.glob(f"{prefix}iter_*.pth")
                number = {path: int(path.stem.rpartition("_")[2]) for path in found}
                for path in sorted(number, key=number.get)[:-keep_last]:
                    path.unlink()

    def save_best(self, prefix, name):
        """Write the weights of the network that `prefix` stands for to <prefix><name>_best_model.pth."""
        if self.writes:
            net = self.parts[self.weights[prefix]]
            save_checkpoint(net.state_dict(), self.folder / f"{prefix}{name}_best_model.pth")

    def last_good(self):
        """What is left of the run, in words, for the sentence that ends it."""
        if not (self.folder / "latest.pth").exists():
            return "no checkpoint was written yet; lower --base_lr"
        return f"{self.folder / 'latest.pth'} keeps the last good state; lower --base_lr"
