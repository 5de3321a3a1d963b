"""What a run shows while it goes: progress.png, TensorBoard and Weights & Biases.

metrics.csv is the truth, a row per logged iteration (runlog.RunLog writes it); all else here is a view of it. A resumed
run makes its views anew from the rows up to the iteration it goes on from, so no iteration stands in them twice. Once
training has begun, no view can end it: one that fails is given up in one line.

Every column with numbers goes to TensorBoard and Weights & Biases; script/progress.py says which go into the picture.
"""

import gc
import os
import secrets
import shutil
import time
from pathlib import Path

from mtseg.script.endings import first_line
from mtseg.script.progress import draw_progress, number_in
from mtseg.script.runlog import read_metrics


class MonitorError(ValueError):
    """A view that was asked for and cannot be had; the message is one sentence with the remedy."""


def check_extras(tensorboard=False, wandb=None):
    """MonitorError where a package that these flags need is missing, or Weights & Biases online knows no user.

    Call it before anything is written. `wandb`: None, 'offline' or 'online'.
    """
    if tensorboard:
        _import_tensorboard()
    package = _import_wandb() if wandb else None
    if wandb == "online":
        try:
            known = package.login()
        except Exception as error:
            raise MonitorError(
                f"--wandb online: {first_line(error)}; `wandb login`, or take --wandb offline"
            ) from error
        if not known:
            raise MonitorError("--wandb online: nobody is logged in; run `wandb login`, or take --wandb offline")


class Monitor:
    """Takes each row that metrics.csv gets, and keeps the views of it in the run's `folder` up to date.

    progress.png: redrawn, where Matplotlib is installed, no oftener than every `seconds` (None: never), and so seldom
    that it takes at most 2 % of the time. `tensorboard`: event files in `<folder>/tensorboard`. `wandb`: 'offline' (no
    network is touched; `wandb sync` uploads later) or 'online'; `config` goes there as the run's settings.

    `start`: the iteration training goes on from; 0 begins everything anew. `say`: called with one line on each view
    that fails. Raises MonitorError only here, where a view that was asked for cannot begin.
    """

    def __init__(self, folder, start=0, say=print, tensorboard=False, wandb=None, config=None, seconds=60):
        self.folder = Path(folder)
        self.say = say
        self.views = {}
        if not start:
            (self.folder / "progress.png").unlink(missing_ok=True)
        try:
            if tensorboard:
                self.views["TensorBoard"] = _TensorBoard(self.folder / "tensorboard")
            if wandb:
                self.views["Weights & Biases"] = _WeightsAndBiases(self.folder, start, wandb, config)
        except MonitorError:
            raise
        except Exception as error:
            flag = "--tensorboard" if tensorboard and not self.views else f"--wandb {wandb}"
            raise MonitorError(f"{self.folder}: {flag} could not begin ({first_line(error)}); leave it out") from error
        for row in read_metrics(self.folder / "metrics.csv") if start and self.views else ():
            if int(row["iteration"]) <= start:
                self.row(row)
        if seconds is not None:
            try:
                self.views["progress.png"] = _Picture(self.folder, seconds)
            except ImportError:
                say("progress.png is not drawn without Matplotlib: pip install matplotlib")

    def row(self, values):
        """Show `values`, the dict that RunLog.row has just written: 'iteration' and anything else."""
        numbers = {name: number_in(value) for name, value in values.items() if name != "iteration"}
        numbers = {name: value for name, value in numbers.items() if value is not None}
        for name in list(self.views):
            self._try(name, self.views[name].row, numbers, int(values["iteration"]))

    def pictures(self, iteration, pictures):
        """Show `pictures` of an iteration whose row follows, {'<name>: <caption>': uint8 (H, W, 3)}, such as 'best:
        image_7, Dice 0.91', in TensorBoard and Weights & Biases; a resumed run does not show those of before again."""
        for name in [name for name, view in self.views.items() if hasattr(view, "picture")]:
            for title, picture in pictures.items():
                if name in self.views:
                    self._try(name, self.views[name].picture, *title.partition(": ")[::2], picture, iteration)

    def close(self):
        """Draw the last picture and write out what is still held back."""
        for name in list(self.views):
            self._try(name, self.views[name].close)

    def _try(self, name, function, *arguments):
        try:
            function(*arguments)
        except Exception as error:  # whatever it is, the training is worth more than the view
            del self.views[name]
            self.say(f"{name} failed and is given up ({first_line(error)}); metrics.csv holds everything")


class _Picture:
    """progress.png in `folder`, drawn when `seconds` have passed since the last time, or fifty times what that took."""

    def __init__(self, folder, seconds):
        import matplotlib  # noqa: F401  whoever has it not is told at the start

        self.folder = folder
        self.seconds = seconds
        self.draw_next = time.monotonic() + seconds

    def row(self, numbers, iteration):
        if time.monotonic() >= self.draw_next:
            self.close()

    def close(self):
        began = time.monotonic()
        draw_progress(self.folder)
        # Matplotlib's objects refer to each other in circles: left to Python's own rounds, several pictures lie in
        # memory at a time, and later blocks between them keep it from being one piece again.
        gc.collect()
        now = time.monotonic()
        self.draw_next = now + max(self.seconds, 49 * (now - began))


class _TensorBoard:
    """Event files in `folder`, begun anew: a scalar per column, under the column's name."""

    def __init__(self, folder):
        writer = _import_tensorboard()
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = writer(str(folder), flush_secs=30)

    def row(self, numbers, iteration):
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, iteration)

    def picture(self, name, caption, picture, iteration):
        self.writer.add_image(f"validation/{name}", picture, iteration, dataformats="HWC")
        self.writer.add_text(f"validation/{name}", caption, iteration)

    def close(self):
        self.writer.close()


class _WeightsAndBiases:
    """One run of project 'mtseg', of the same id however often training is resumed: what came before is replaced."""

    def __init__(self, folder, start, mode, config):
        wandb = _import_wandb()
        name = folder / "wandb_id"
        if not start or not name.is_file():
            name.write_text(secrets.token_hex(4) + "\n")
        for old in (folder / "wandb").glob("offline-run-*"):
            shutil.rmtree(old)
        # Rows and settings are sent, nothing else: no console, no code or its repository, no packages, no machine.
        off = ("disable_code", "disable_git", "x_disable_machine_info", "x_disable_meta", "x_disable_stats")
        settings = wandb.Settings(console="off", silent=True, x_save_requirements=False, **dict.fromkeys(off, True))
        where = {"project": "mtseg", "name": f"{folder.parent.name}/{folder.name}", "dir": str(folder), "mode": mode}
        self.run = wandb.init(id=name.read_text().strip(), config=config, settings=settings, **where)

    def row(self, numbers, iteration):
        self.run.log(numbers, step=iteration, commit=True)

    def picture(self, name, caption, picture, iteration):
        # Once a step's row has been sent, nothing can be added to it.
        image = _import_wandb().Image(picture, caption=caption)
        self.run.log({f"validation/{name}": image}, step=iteration, commit=False)

    def close(self):
        self.run.finish()


def _import_tensorboard():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MonitorError(f"--tensorboard needs TensorBoard ({first_line(error)}): pip install tensorboard") from error
    return SummaryWriter


def _import_wandb():
    # It reports how it is used over the network otherwise, in offline mode too, and waits for it at the end.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb

        wandb.init, wandb.Settings  # noqa: B018  a folder of that name, as every run leaves one, imports too
    except (ImportError, AttributeError) as error:
        raise MonitorError(f"--wandb needs Weights & Biases ({first_line(error)}): pip install wandb") from error
    return wandb
