"""A run of a training script, from its flags to its last weights: folder, device, seeds, resuming, logs, validation.

    def train(args, run):
        ...                                                # data, networks, updater: script/build.py
        with run.started(data, networks, updater, COLUMNS):
            for iteration, volume, label in run.batches(data):
                ...                                        # the method
                run.check_loss(loss)
                updater.step(loss)
                run.end_iteration(loss=loss, ...)

    main = script_main(train, PARSER, __file__)

The loop, the networks and the losses are the script's: nothing here calls it back.
"""

import contextlib
import shlex
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from mtseg.allocator import keep_freed_memory
from mtseg.checkpoint import load_checkpoint
from mtseg.collate import collate
from mtseg.datasets import find_root
from mtseg.distributed import Silent, joined_ranks
from mtseg.losses import TERMS
from mtseg.metrics import dice
from mtseg.samplers import IterationSampler, ShardedSampler
from mtseg.script import flags, runfolder
from mtseg.script.clock import StepClock
from mtseg.script.monitor import Monitor, check_extras
from mtseg.script.runlog import RunLog, StopSignals, leave_signals_to_main, until_stopped
from mtseg.script.state import RunState
from mtseg.seeding import seed_iteration, set_deterministic
from mtseg.sliding_window import score_cases

PREFIXES = {"student": "", "teacher": "ema_"}  # of the files with a network's weights; any other: its name
FIRST = ["iteration", "lr", "loss", *(f"loss_{name}" for name in TERMS)]
LAST = ["skipped_steps", "iterations_per_second", "data_seconds", "step_seconds", "peak_memory_mb"]


def script_main(train, parser, file):
    """The main(argv=None) of a training script: train(args, run) with its flags, and mistakes in one sentence."""

    def main(argv=None):
        home = next(folder for folder in Path(file).resolve().parents if (folder / "data").is_dir())
        with flags.one_sentence():
            args = flags.parse(parser, argv, home / "data/LA", home / "data/Phantom")
            with joined_ranks() as ranks:
                words = sys.argv[1:] if argv is None else [str(word) for word in argv]
                run = Run(args, ranks, [*ranks.launcher(), file, *words], home)
                train(args, run)
                return run.folder

    return main


class Run:
    """Where and with what a script trains; nothing is written before `started`.

    `folder`: the run's. `device`, `autocast`: of the forward passes. `resume_from`: the checkpoint it goes on from, or
    None. `ranks`: distributed.Ranks. `notes`: sentences for the log.
    """

    def __init__(self, args, ranks, command, home):
        self.args, self.ranks, self.command, self.home = args, ranks, command, home
        check_extras(args.tensorboard, args.wandb)
        self.folder = runfolder.run_folder(args)
        self.resume_from = runfolder.checkpoint_to_resume(self.folder, args.resume, args.overwrite)
        self.device = runfolder.choose_device(ranks.gpu(args.gpu), args.amp)
        self.notes = ["no GPU was found: training on the CPU"] if self.device.type == "cpu" else []
        if self.device.type == "cpu" and args.keep_memory:
            keep_freed_memory()
        half = torch.float16 if args.amp == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(self.device.type, half, args.amp != "off")
        set_deterministic(args.deterministic)
        seed_iteration(args.seed, -1)  # for the initial weights
        args.has_dropout = True

    def selected(self, val_cases, test_cases):
        self.selection, said = runfolder.how_selected(val_cases, test_cases)
        self.notes += said

    def joint(self, own, labeled=0):
        """The joint batch of all processes of this one's `own`, of which the first `labeled` are labelled."""
        return self.ranks.gather(own, labeled)

    @contextlib.contextmanager
    def started(self, data, networks, updater, columns=()):
        """The context of the training loop: the run goes on from its checkpoint, the folder is locked, logs are open.

        `networks`: {name: network}; all are saved and validated, the first one's Dice decides on patience and plateau.
        `columns`: what the script logs beside the losses. At the end the weights are written, or, after Ctrl-C, what
        resuming needs.
        """
        args, ranks = self.args, self.ranks
        prefixes = {name: PREFIXES.get(name, f"{name}_") for name in networks}
        parts = {f"{prefixes[name]}model": net for name, net in networks.items()} | updater.parts()
        config = {**vars(args), **data.cases, "n_channels": data.n_channels, "selection": self.selection}
        config |= {"ranks": ranks.world_size, **runfolder.versions(self.device)}
        config["preprocessing"] = flags.read_config(find_root(args.root_path) / "preprocessing.json") or None
        weights = {prefix: f"{prefix}model" for prefix in prefixes.values()}
        self.networks, self.prefixes, self.updater, self.val = networks, prefixes, updater, data.val
        self.val_columns = {name: f"val_dice_{name}" if len(networks) > 1 else "val_dice" for name in networks}
        self.keeper = RunState(self.folder, parts, weights, config, ranks.is_main)
        self.start, self.progress = 0, {**dict.fromkeys(networks, -1.0), "waited": 0, "skipped": 0}
        if self.resume_from is not None:
            state = load_checkpoint(self.resume_from, self.device)
            self.notes += runfolder.check_same_run(config, state, self.resume_from, parts)
            self.start, self.progress = self.keeper.load(state, self.resume_from)
            del state  # a second copy of all weights otherwise
            updater.skipped = self.progress["skipped"]
            self.notes.append(f"resuming at iteration {self.start} from {self.resume_from}")
        elif args.resume:
            self.notes.append(f"{self.folder} has no latest.pth yet: starting from iteration 0")

        ranks.wait()  # until all have looked at what lies there
        self.log = self.monitor = Silent()
        if ranks.is_main:
            lock = runfolder.lock_folder(self.folder)
            if args.overwrite and self.resume_from is None:
                runfolder.remove_old_weights(self.folder)
            self.keeper.save_config()
            self.log = RunLog(self.folder, [*FIRST, *columns, *self.val_columns.values(), *LAST], self.start)
        self.log.say(shlex.join(self.command))
        self.log.say(f"{self.folder}: {data.said} on {config['device']}")
        for note in self.notes:
            self.log.say(note)
        if ranks.is_main:
            views = (args.tensorboard, args.wandb, config, args.progress or None)
            self.monitor = Monitor(self.folder, self.start, self.log.say, *views)

        self.iteration, self.last, self.phase, self.clock = self.start, False, None, StepClock(self.device)
        total = {"total": args.max_iterations, "initial": self.start, "unit": "it", "dynamic_ncols": True}
        with StopSignals() as self.stop, tqdm(**total, disable=not ranks.is_main) as self.bar:
            yield
        self._end()
        if ranks.is_main:
            lock.close()

    def batches(self, data):
        """Yield (iteration, volume, label) on the device until the run is over: this process's share, labelled first.

        The labels of unlabelled patches are `data.ignore_index`, whatever the files hold. Every number that is drawn
        until the next iteration, on any device, is a function of seed, iteration and process.
        """
        for iteration, volume, label, _ in self.batches_with_hidden_labels(data):
            yield iteration, volume, label

    def batches_with_hidden_labels(self, data):
        """As `batches`, and fourth the labels as the files hold them: to watch a method, never to train on."""
        args, ranks = self.args, self.ranks
        stop_at = self.start if self.progress["waited"] == args.patience else args.max_iterations
        sampler = IterationSampler(data.batches, args.seed, self.start, stop_at)
        loader = DataLoader(
            data.train,
            batch_sampler=ShardedSampler(sampler, ranks.rank, ranks.world_size, data.labeled_bs),
            num_workers=args.num_workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_main,
            pin_memory=self.device.type == "cuda",
        )
        for net in self.networks.values():
            net.train()
        running = self.clock.batches(ranks.in_step(until_stopped(loader, self.stop), self.stop))
        for iteration, batch in enumerate(running, start=self.start + 1):
            self.iteration = iteration
            seed_iteration(args.seed, iteration)
            ranks.reseed()
            volume = batch["image"].to(self.device, non_blocking=True)
            hidden = batch["label"].to(self.device, non_blocking=True).long()
            label = hidden.clone()
            label[data.own_labeled :] = data.ignore_index
            yield iteration, volume, label, hidden
            if self.last:
                return

    def check_loss(self, loss):
        """NotFiniteError where the loss is no number."""
        self.keeper.check_loss(loss.item(), self.iteration)

    def end_iteration(self, **row):
        """What follows an iteration, where it is due: validation, a row of the log, saving.

        `row`: numbers or scalar tensors to log by their column, 'loss' among them; 'phase', a word, is said when it
        changes.
        """
        args, now = self.args, self.iteration
        self.clock.stepped()
        self.bar.update()
        self.ranks.average_buffers(*self.networks.values())
        if row.get("phase") != self.phase:
            self.phase = row["phase"]
            self.log.say(f"iteration {now}: {self.phase}, consistency weight {row['consistency_weight']:.3g}")
        self.last = now == args.max_iterations
        if self.keeper.config["val_cases"] and (self.last or now % args.val_freq == 0):
            row |= self._validate()
            self.last = self.last or self.progress["waited"] == args.patience
        if self.last or now % args.log_freq == 0:
            row = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in row.items()}
            row |= {"iteration": now, "lr": self.updater.lr, "skipped_steps": self.updater.skipped, **self.clock.row()}
            self.log.row(row)
            self.monitor.row(row)
            self.bar.set_postfix(loss=f"{row['loss']:.4f}")
        if self.last or now % args.save_freq == 0:
            self._save()
            if args.keep_last:
                self.keeper.save_weights(now, args.keep_last)

    def _validate(self):
        """{column: Dice} of every network on the validation cases; the best weights of each are kept."""
        args, dataset, found = self.args, self.val, {}
        self.keeper.check_finite(self.iteration)
        self.progress["waited"] += 1
        windows = (args.stride_xy, args.stride_z, args.patch_size, args.num_classes, args.ignore_index)
        for number, (name, net) in enumerate(self.networks.items()):
            samples = map(dataset.read, self.ranks.share(dataset.image_list))
            scores = self.ranks.join(score_cases(net, samples, dice, *windows))
            score = found[self.val_columns[name]] = sum(scores) / len(scores)
            self.log.say(f"iteration {self.iteration}: validation Dice of the {name} {score:.4f}")
            if score > self.progress[name]:
                self.progress[name] = score
                self.keeper.save_best(self.prefixes[name], args.model)
                if number == 0:
                    self.progress["waited"] = 0
            if number == 0:
                self.updater.schedule.validated(score)
        return found

    def _save(self):
        self.progress["skipped"] = self.updater.skipped
        self.keeper.save(self.iteration, self.progress)

    def _end(self):
        self.monitor.close()
        if self.stop.received and not self.last:
            self._save()
            again = shlex.join([*(word for word in self.command if word != "--overwrite"), "--resume"])
            self.log.say(f"stopped after iteration {self.iteration}; all is saved, and this goes on:\n{again}")
            raise SystemExit(128 + self.stop.received)
        self.keeper.save_weights(self.iteration)
        if self.iteration < self.args.max_iterations:
            self.log.say(f"stopped early: no better validation Dice in {self.args.patience} validations")
        weights = self.folder / f"iter_{self.iteration}.pth"
        self.log.say(f"done; test it with:\npython inference.py --model_path {weights}")
