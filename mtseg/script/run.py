"""A run of a training script, from its flags to its last weights: folder, device, seeds, resuming, logs, validation.

    def train(args, run):
        ...                                                # data, networks, updater: mtseg/script/build.py
        with run.started(data, networks, updater):
            for iteration, volume, label in run.batches():
                ...                                        # the method
                updater.step(loss)
                run.end_iteration(loss=loss, ...)

    main = script_main(train, PARSER, __file__)

The loop, the networks and the losses are the script's: nothing here calls it back.
"""

import contextlib
import itertools
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from mtseg.allocator import keep_freed_memory
from mtseg.checkpoint import LARGEST_WEIGHT, load_checkpoint
from mtseg.classes import ClassTable
from mtseg.collate import collate
from mtseg.distributed import Silent, joined_ranks
from mtseg.finetuning import unfreeze
from mtseg.metrics import dice
from mtseg.samplers import IterationSampler, ShardedSampler
from mtseg.script import fast, flags, runfolder
from mtseg.script.clock import StepClock
from mtseg.script.monitor import Monitor, check_extras
from mtseg.script.runlog import RunLog, StopSignals, leave_signals_to_main, until_stopped
from mtseg.script.snapshot import case_picture
from mtseg.script.sources import shown_axis
from mtseg.script.state import RunState
from mtseg.script.windows import class_name, counted_classes, label_and_prediction, score_cases
from mtseg.seeding import seed_iteration, set_deterministic

PREFIXES = {"student": "", "teacher": "ema_"}  # of the files with a network's weights; any other: its name

OF_TEST = ("root_path", "stride_xy", "stride_z")  # flags that --test_only hands on


class NotFiniteError(ArithmeticError):
    """Training went to NaN or infinity; the message is one sentence with the iteration and what is left."""


def script_main(train, parser, file):
    """The main(argv=None) of the training script `file`: it calls train(args, run) with the script's flags.

    Mistakes end in one sentence and exit code 2. main returns the run's folder.
    """

    def main(argv=None):
        with flags.one_sentence():
            check_copy(file)
            args = flags.parse(parser, argv)
            if args.test_only:
                newest = runfolder.newest_weights(runfolder.run_folder(args))
                given = flags.given_flags(parser, argv)
                given = [word for name in OF_TEST if name in given for word in (f"--{name}", str(given[name]))]
                raise SystemExit(subprocess.call([sys.executable, *words_to_test(args, newest), *given]))
            with joined_ranks() as ranks:
                words = sys.argv[1:] if argv is None else map(str, argv)
                run = Run(args, ranks, [*ranks.launcher(), file, *words], flags.defaults_of(parser), file)
                train(args, run)
                return run.folder

    return main


def check_copy(file):
    """FlagError where the script `file` lies beside another copy of mtseg than this, for which it is not written."""
    own, here = (Path(file).resolve().parents[1] / "mtseg").resolve(), Path(__file__).resolve().parents[1]
    if (own / "script").is_dir() and own != here:
        remedy = f"pip install -e {own.parent}, or set PYTHONPATH={own.parent}"
        raise flags.FlagError(f"{file}: Python found mtseg in {here}, not in {own} beside the script; {remedy}")


def words_to_test(args, weights):
    """The words of the command, after Python, that tests `weights` of a run with the flags `args`."""
    inference = flags.HOME / "inference.py"
    own = ["--network", args.network] if flags.is_own(args.network) else []  # code, which no config.json may name
    gpu = [] if args.gpu == "0" else ["--gpu", args.gpu]
    return [inference.name if Path.cwd() == flags.HOME else str(inference), "--model_path", str(weights), *own, *gpu]


class Run:
    """Where and on what a script trains. Nothing is written before `started`.

    `folder`: the run's. `device`, `autocast`: of the forward passes. `resume_from`: the checkpoint to go on from, or
    None. `ranks`: distributed.Ranks. `notes`: sentences for the log. `inside`: with --ignore_padding, of the batch that
    is trained on, bool (N, 1, *spatial) on the device: which voxels are not padding; else None. `hidden`: all labels of
    that batch as the files hold them, (N, *spatial), but those of padding: to watch a method, never to train on.
    """

    def __init__(self, args, ranks, command, defaults, script):
        self.args, self.ranks, self.command, self.defaults, self.script = args, ranks, command, defaults, script
        check_extras(args.tensorboard, args.wandb)
        self.folder = runfolder.run_folder(args)
        self.resume_from = runfolder.checkpoint_to_resume(self.folder, args.resume, args.overwrite)
        self.device = runfolder.choose_device(ranks.gpu(args.gpu), args.amp)
        self.notes = ["no GPU was found: training on the CPU"] if self.device.type == "cpu" else []
        self.notes += fast.switch_on(args, self.device)
        if self.device.type == "cpu" and args.keep_memory:
            keep_freed_memory()
        half = torch.float16 if args.amp == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(self.device.type, half, args.amp != "off")
        set_deterministic(args.deterministic)
        seed_iteration(args.seed, -1)  # for the initial weights
        self.inside = self.hidden = None
        self.rates, self.frozen = {}, []  # {parameter: factor of its learning rate}; those that --freeze holds
        self.ancestry = {}  # what config.json says of the weights that the run begins with
        if args.unfreeze_at and not ranks.alone:
            raise flags.FlagError("--unfreeze_at with torchrun: gradients that begin later are not shared; take one")

    def joint(self, batch):
        """The joint batch of all processes that torchrun started: their `batch`es, (N, ...), one after the other.

        Without torchrun it is `batch` itself. A list or tuple of tensors gives one of joint batches.
        """
        return self.ranks.gather(batch)

    def descend(self, path, parts, loaded, left_out=0):
        """Note in config.json that the run begins with `loaded` weights of `parts` in the file `path`, from whichever
        run or download; `left_out` of them were not taken."""
        config = flags.read_config(Path(path).parent / "config.json")
        how = {"parts": parts, "loaded": loaded, "left_out": left_out}
        for name, values in runfolder.ancestry_of(path, config, **how).items():
            known = self.ancestry.setdefault(name, [])
            known += [value for value in values if value not in known]
        for name in ("intensity", "normalization"):
            there, here = config.get(name), getattr(self.args, name)
            if "torch" in config and there != here:
                self.notes.append(f"{path} was trained with --{name} {there}, and this run has {here}: make them alike")

    @contextlib.contextmanager
    def started(self, data, networks, updater, fixed_length=False, **others):
        """The context of the training loop. It locks the run's folder, resumes the run and opens its logs; at the end
        it writes the weights or, after Ctrl-C, what resuming needs.

        `data`: of build.read_data. `networks`: {name: network}; all are saved and validated, and the Dice of the first
        one decides on patience and plateau. `updater`: an optim.Updater. `fixed_length`: the method depends on
        --max_iterations, so that a run cannot be resumed under another one. `others`: what else belongs to the state
        that resuming needs, and is no result: further heads, a discriminator and its optimizer.
        """
        args, ranks = self.args, self.ranks
        if not networks:
            raise runfolder.RunError("run.started has no network: nothing would be saved; give {'student': model}")
        modules = [part for part in (*networks.values(), *others.values()) if isinstance(part, torch.nn.Module)]
        kept = {id(p) for module in modules for p in module.parameters()}
        if not {id(p) for group in updater.optimizer.param_groups for p in group["params"]} <= kept:
            raise runfolder.RunError(
                "the optimizer moves weights of no network that is saved; give run.started what they belong to, by "
                "name, beside the updater: run.started(data, networks, updater, head=head)"
            )
        self.data, self.networks, self.updater, self.modules = data, networks, updater, modules
        self.prefixes = {name: PREFIXES.get(name, f"{name}_") for name in networks}
        self.val_columns = {name: f"val_dice_{name}" if len(networks) > 1 else "val_dice" for name in networks}
        self.class_columns = {name: [] for name in networks}
        if len(data.val) and len(classes := counted_classes(args)) > 1:
            words = [class_name(args.classes, number) for number in classes]
            self.class_columns = {n: [f"{c}/{w}" for w in words] for n, c in self.val_columns.items()}
        weights = {self.prefixes[name]: net for name, net in networks.items()}
        self.state = RunState(self.folder, weights, updater.parts() | others, self._config(), ranks.is_main)
        lock, without_locks = runfolder.lock_folder(self.folder) if ranks.is_main else (contextlib.nullcontext(), [])
        self.notes += [*data.notes, *without_locks]
        with lock:
            ranks.wait()  # until the folder is this run's
            rows = self._resume(fixed_length)
            ranks.wait()  # until all have read what lies there
            self._open_logs(*rows)
            self.last, self.phase, self.waiting = False, None, None
            self.clock = StepClock(self.device)
            total = {"total": args.max_iterations, "initial": self.start, "unit": "it", "dynamic_ncols": True}
            with StopSignals() as self.stop:  # a further SIGTERM does not disturb the saving
                try:
                    with tqdm(**total, disable=not ranks.is_main) as self.bar:
                        yield
                    self._settle()
                finally:
                    self.monitor.close()
                self._finish()

    def _config(self):
        """What config.json says: the flags, and what else the numbers depend on."""
        config = {**vars(self.args), **self.data.record, "ranks": self.ranks.world_size}
        return config | runfolder.versions(self.device, self.script, self.args.network)

    def _resume(self, fixed_length):
        """Take over the state of the run that goes on, where one does, at iteration `start`.

        Returns the folder of its metrics.csv, and the iterations between two rows there.
        """
        args = self.args
        rows = self.folder, args.log_freq
        self.start, self.progress = 0, {**dict.fromkeys(self.networks, -1.0), "waited": 0, "skipped": 0}
        # Looked at once more: while the data was read, another process may have trained there.
        self.resume_from = path = runfolder.checkpoint_to_resume(self.folder, args.resume, args.overwrite)
        if path is not None:
            checkpoint = load_checkpoint(path, self.device)
            self.notes += runfolder.check_same_run(
                self.state.config, checkpoint, path, self.state.parts, self.defaults, fixed_length
            )
            self.start, self.progress = self.state.load(checkpoint, path, self.progress)
            before = checkpoint["config"]
            self.ancestry = {name: before[name] for name in runfolder.ANCESTRY if name in before}
            self.updater.skipped = self.progress["skipped"]
            apart = before.get("log_freq")
            rows = path.parent, max(args.log_freq, apart if isinstance(apart, int) else 1)
            self.notes.append(f"resuming at iteration {self.start} from {path}")
        elif args.resume:
            self.notes.append(f"{self.folder} has no latest.pth yet: starting from iteration 0")
        self.iteration = self.start
        self.state.config |= self.ancestry
        if any(one.get("selection") == "test set" for one in self.ancestry.get("pretrained_from", [])):
            self.state.config["selection"] = "test set"
        return rows

    def _open_logs(self, rows_in, rows_apart):
        """Begin the log, config.json and the monitor; in other processes than the main one they are silent."""
        args = self.args
        if not self.ranks.is_main:
            self.log = self.monitor = Silent()
            return
        if args.overwrite and not (self.resume_from and runfolder.is_inside(self.resume_from, self.folder)):
            runfolder.remove_run(self.folder, {*PREFIXES.values(), *self.prefixes.values()}, args.model)
        if self.resume_from:
            self.state.take_best(self.resume_from.parent, args.model)
        self.log = RunLog(self.folder, self.start, rows_in, rows_apart)
        self.state.save_config()
        self.log.say(shlex.join(self.command))
        self.log.say(f"{self.folder}: {self.data.description} on {self.state.config['device']}")
        for note in (*self.notes, *self.log.notes):
            self.log.say(note)
        views = (args.tensorboard, args.wandb, self.state.config, args.progress or None)
        self.monitor = Monitor(self.folder, self.start, self.log.say, *views)

    def _finish(self):
        """Write the weights or, where a signal came before the end, what resuming needs; SystemExit then."""
        if self.stop.received and not self.last:
            self._save()
            again = shlex.join(runfolder.command_to_resume(self.command))
            self.log.say(f"stopped after iteration {self.iteration}; all is saved, and this goes on:\n{again}")
            raise SystemExit(128 + self.stop.received)
        self.state.save_weights(self.iteration)
        if self.iteration < self.args.max_iterations:
            self.log.say(f"stopped early: no better validation Dice in {self.args.patience} validations")
        weights = self.folder / f"iter_{self.iteration}.pth"
        if self.args.labelnum == 0:  # the network gives no classes yet
            words = ["--pretrained", str(weights), "--pretrained_parts", "encoder"]
            self.log.say(f"done; start from it with {shlex.join(words)}")
            return
        self.log.say(f"done; test it with:\n{shlex.join(['python', *words_to_test(self.args, weights)])}")

    def batches(self):
        """Yield (iteration, volume, label) on the device until the run is over: this process's share of each batch.

        `volume` (N, C, W, H, D), float; `label` (N, W, H, D), integer. With the `data` of build.read_data: the first
        `data.labeled_bs` patches are labelled, and the labels of the others are `data.unknown`, whatever the files
        hold. All that is drawn until the next iteration is a function of seed, iteration and process.
        """
        args, ranks, data = self.args, self.ranks, self.data
        stop_at = self.start if self._patience_is_over() else args.max_iterations
        sampler = IterationSampler(data.sampler, args.seed, self.start, stop_at)
        loader = DataLoader(
            data.train,
            batch_sampler=ShardedSampler(sampler, ranks.rank, ranks.world_size, data.labeled_bs * ranks.world_size),
            num_workers=args.num_workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_main,
            pin_memory=self.device.type == "cuda",
        )
        for module in self.modules:
            module.train()
        running = self.clock.batches(ranks.in_step(until_stopped(loader, self.stop), self.stop))
        for iteration, batch in enumerate(running, start=self.start + 1):
            self.iteration = iteration
            if self.frozen and iteration > (args.unfreeze_at or args.max_iterations):
                for net in self.networks.values():
                    unfreeze(net)
                for parameter in self.frozen:
                    parameter.requires_grad_(True)
                self.frozen = []
            seed_iteration(args.seed, iteration)
            ranks.reseed()
            volume = batch["image"].to(self.device, non_blocking=True)
            self.hidden = batch["label"].to(self.device, non_blocking=True).long()
            if args.ignore_padding:
                padded = self.hidden == flags.PADDED
                self.inside, self.hidden = ~padded.unsqueeze(1), self.hidden.masked_fill(padded, data.unknown)
            label = self.hidden.clone()
            label[data.labeled_bs :] = data.unknown
            self.ended = False
            yield iteration, volume, label
            if not self.ended:
                raise runfolder.RunError(
                    f"iteration {iteration} has not ended; call run.end_iteration(loss=loss) in the loop"
                )
            if self.last:
                return

    def end_iteration(self, **row):
        """What follows an iteration, where it is due: a row of the log, validation, saving.

        `row`: {column: a number, a scalar tensor or a word}, 'loss' among them. NotFiniteError where the loss is no
        number: on a CPU at once; on a GPU, where no iteration waits for the one before, an iteration later. A new word
        under 'phase' is said in the log.
        """
        args, now, self.ended = self.args, self.iteration, True
        self._check_row(row)
        self.clock.stepped()
        self.bar.update()
        self.ranks.average_buffers(*self.modules)
        if row.get("phase", self.phase) != self.phase:
            self.phase = row["phase"]
            weight = f", consistency weight {row['consistency_weight']:.3g}" if "consistency_weight" in row else ""
            self.log.say(f"iteration {now}: {self.phase}{weight}")
        self._settle()  # the iteration before, whose numbers have arrived by now
        validation = (*self.val_columns.values(), *itertools.chain(*self.class_columns.values()))
        row = {"iteration": now, "lr": self.updater.lr, **row, **dict.fromkeys(validation, "")}
        self.waiting = NumbersOnTheirWay({**row, "skipped_steps": self.updater.skipped})
        self.last = now == args.max_iterations
        validate = bool(self.data.val.image_list) and (self.last or now % args.val_freq == 0)
        save = self.last or now % args.save_freq == 0
        if self.device.type == "cpu" or validate or save:
            self._settle(validate)
        if self.last or save:
            self._save()
            if args.keep_last:
                self.state.save_weights(now, args.keep_last)

    def _check_row(self, row):
        """RunError for what a new script easily forgets, and what would make a result of nothing."""
        if not self.updater.steps:
            raise runfolder.RunError("nothing has been learned yet; call updater.step(loss) before run.end_iteration")
        if "loss" not in row:
            raise runfolder.RunError("run.end_iteration has no loss; give it loss=loss")
        for name, value in row.items():
            if isinstance(value, torch.Tensor) and value.dim():
                raise runfolder.RunError(
                    f"run.end_iteration: {name} has shape {tuple(value.shape)}; give one number, such as its mean()"
                )

    def _settle(self, validate=False):
        """Take the numbers that are on their way: check the loss, validate where that is asked for, log the row."""
        if self.waiting is None:
            return
        row, self.waiting = self.waiting.read(), None
        if not math.isfinite(row["loss"]):
            self._fail(f"the loss became {row['loss']} at iteration {row['iteration']}", row["iteration"])
        if validate:
            row |= self._validate()
            self.last = self.last or self._patience_is_over()
        measured = validate or row.get("held_out_loss", "") != ""  # is written down, whenever it was
        if self.last or measured or row["iteration"] % self.args.log_freq == 0:
            row |= self.clock.row()
            self.log.row(row)
            self.monitor.row(row)
            self.bar.set_postfix(loss=f"{row['loss']:.4f}")

    def _patience_is_over(self):
        # A run may go on with less patience than it has waited already.
        return self.args.patience is not None and self.progress["waited"] >= self.args.patience

    def _validate(self):
        """{column: Dice} of every network on the validation cases; the best weights of each are kept."""
        scores = {}
        self._check_finite()
        self.progress["waited"] += 1
        first, *_ = self.networks
        for name, net in self.networks.items():
            cases = self.ranks.share(self.data.val.image_list)
            samples = map(self.data.val.read, cases)
            dices = np.array(self.ranks.join(score_cases(net, samples, dice, self.data.axis, self.args)))
            score = scores[self.val_columns[name]] = float(dices.mean())
            scores |= dict(zip(self.class_columns[name], dices.mean(axis=0).tolist(), strict=False))
            best = score > self.progress[name]
            so_far = ", the best so far" if best else ""
            self.log.say(f"iteration {self.iteration}: validation Dice of the {name} {score:.4f}{so_far}")
            if best:
                self.progress[name] = score
                self.state.save_best(self.prefixes[name], self.args.model)
                if name == first:
                    self.progress["waited"] = 0
            if name == first:
                self._show_extremes(net, dices.mean(axis=1))
        self.updater.schedule.validated(scores[self.val_columns[first]])
        return scores

    def _show_extremes(self, net, dices):
        """Have the monitor show the validation cases of the best and of the worst Dice, where it shows pictures."""
        if not self.ranks.is_main or not (self.args.tensorboard or self.args.wandb):
            return
        pictures, classes = {}, self.args.classes
        colors = ClassTable.from_dict(classes).palette() if classes else None
        for word, place in {"best": dices.argmax(), "worst": dices.argmin()}.items():
            case = self.data.val.image_list[place]
            sample = self.data.val.read(case)
            label, prediction = label_and_prediction(net, sample, self.data.axis, self.args)
            axis = shown_axis(self.data.axis, label.shape, self.args.dims)
            drawn = case_picture(sample["image"], label, prediction, colors, axis, self.args.background)
            pictures[f"{word}: {case}, Dice {dices[place]:.4f}"] = drawn
        self.monitor.pictures(self.iteration, pictures)

    def _save(self):
        """Write latest.pth; never over a good state with a broken one."""
        self._check_finite()
        self.progress["skipped"] = self.updater.skipped
        self.state.save(self.iteration, self.progress)

    def _check_finite(self):
        for net in self.networks.values():
            weights = [value for value in net.state_dict().values() if value.is_floating_point()]
            largest = torch.stack([value.abs().max().double() for value in weights]).max().item()  # NaN if one is
            if not largest <= LARGEST_WEIGHT:
                what = f"the weights reach {largest:.3g}" if math.isfinite(largest) else "the weights are not finite"
                self._fail(f"{what} after iteration {self.iteration}", self.iteration)

    def _fail(self, what, iteration):
        """NotFiniteError: what happened, what is left of the run, and what to do."""
        latest = self.folder / "latest.pth"
        left = f"{latest} keeps the last good state" if latest.exists() else "no checkpoint was written yet"
        remedy = "lower --base_lr" + (", or take --amp off" if self.args.amp == "fp16" else "")
        remedy = self.data.unusual_image(self.args.seed, iteration) or remedy
        raise NotFiniteError(f"{what}; {left}; {remedy}")


class NumbersOnTheirWay:
    """A row of the log whose scalar tensors are copied to the CPU while the device goes on computing.

    `read()` gives the row as numbers. It waits, where it must, for that copy alone.
    """

    def __init__(self, row):
        self.row, self.arrived = row, None
        self.names = [name for name, value in row.items() if isinstance(value, torch.Tensor)]
        # In double precision, which holds every float32.
        numbers = [row[name].detach().double() for name in self.names]
        self.numbers = torch.stack(numbers) if numbers else torch.empty(0)
        if self.numbers.is_cuda:
            numbers = torch.empty_like(self.numbers, device="cpu", pin_memory=True)
            self.numbers = numbers.copy_(self.numbers, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self):
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.row | dict(zip(self.names, self.numbers.tolist(), strict=True))
