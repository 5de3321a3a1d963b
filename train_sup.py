"""Supervised training on the labelled cases alone: the baseline every semi-supervised method is compared with.

    python train_sup.py --labelnum 25                          # LA in data/LA, or the built-in Phantom data
    python train_sup.py --labelnum 16 --root_path /data/LA     # train.list, test.list and data/ lie there
    python train_sup.py --labelnum 16 --root_path /data/LA --resume      # go on after an interruption
    python inference.py --model_path model/LA_vnet_25_labeled/supervised/iter_6000.pth    # the table of test metrics

V-Net (Milletari et al., 3DV 2016, arXiv:1606.04797) with the loss and settings of UA-MT (Yu et al., MICCAI 2019,
arXiv:1907.07034). The last iteration is the result; no checkpoint is selected.
"""

import shlex
import sys
from dataclasses import astuple
from pathlib import Path

from mtseg import flags

if __name__ == "__main__":  # --help and misspelt flags are answered at once, before PyTorch is loaded
    flags.training_parser(__doc__).parse_args()

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import inference
from data.make_phantom import PhantomError, make_phantom
from mtseg import runfolder
from mtseg.allocator import keep_freed_memory
from mtseg.augment import Strengths, strong_view
from mtseg.cache import CachedDataset, CacheError
from mtseg.checkpoint import CheckpointError, NotFiniteError, RunState, load_checkpoint, load_fitting
from mtseg.datasets import UNKNOWN, DataError, LAHeart, read_list, test_cases, training_cases
from mtseg.distributed import RankError, Silent, joined_ranks
from mtseg.flags import FlagError
from mtseg.losses import TERMS, SupervisedLoss
from mtseg.memory import InParts, checkpoint_blocks
from mtseg.metrics import dice
from mtseg.monitor import Monitor, MonitorError, StepClock, check_extras
from mtseg.networks import NETWORKS, initialize_kaiming
from mtseg.optim import Schedule, gradient_scaler, make_optimizer
from mtseg.runfolder import RunError
from mtseg.runlog import LogError, RunLog, StopSignals, leave_signals_to_main, until_stopped
from mtseg.samplers import IterationSampler, ShardedSampler, ShuffledBatchSampler
from mtseg.seeding import seed_iteration, set_deterministic
from mtseg.sliding_window import score_cases
from mtseg.transforms import Compose, RandomCrop, RandomRot90Flip, RandomRotFlip, ToTensor
from mtseg.winograd import WinogradError, winograd_convolutions

HERE = Path(__file__).resolve().parent
FIELDS = ["iteration", "lr", "loss", *(f"loss_{name}" for name in TERMS), "val_dice", "skipped_steps"]
FIELDS += ["iterations_per_second", "data_seconds", "step_seconds", "peak_memory_mb"]


def parse_flags(argv):
    return flags.parse(flags.training_parser(__doc__), argv, HERE / "data/LA", HERE / "data/Phantom")


def train(args, command, ranks):
    # ------------------------------------------------------------------------------------------------------- data
    root = Path(args.root_path)
    if root == HERE / "data/Phantom":
        print(f"*** Training on the built-in PHANTOM data: synthetic volumes, in {root} ***", flush=True)
        with ranks.main_first():
            make_phantom(root)
    val_cases = read_list(args.val_list) if args.val_list else []
    train_cases = training_cases(root, val_cases, args.max_samples)
    if args.labelnum > len(train_cases):
        raise FlagError(
            f"--labelnum {args.labelnum} is more than the {len(train_cases)} training cases of {root / 'train.list'}: "
            f"take fewer"
        )
    if args.labelnum < args.batch_size:
        raise FlagError(f"--labelnum {args.labelnum} is less than --batch_size {args.batch_size}: lower the latter")
    train_cases = train_cases[: args.labelnum]
    windows = (args.stride_xy, args.stride_z, args.patch_size, args.num_classes)
    ranks.check_shares(args.labelnum, args.batch_size)
    flags.check_normalization(args, args.batch_size // ranks.world_size)
    check_extras(args.tensorboard, args.wandb)
    rotflip = {"mirror": [RandomRotFlip()], "all": [RandomRot90Flip()], "none": []}[args.rotflip]
    reading = {"num_classes": args.num_classes, "ignore_index": args.ignore_index}
    reading["transform"] = Compose([*rotflip, RandomCrop(args.patch_size), ToTensor("uint8")])
    keep = CachedDataset if args.cache else lambda dataset: dataset
    db_train = keep(LAHeart(root / "data", cases=train_cases, **reading))
    db_val = LAHeart(root / "data", cases=val_cases, num_classes=args.num_classes, ignore_index=args.ignore_index)
    if val_cases and db_val.n_channels != db_train.n_channels:
        raise FlagError(f"--val_list {args.val_list}: its cases have other channels than the training cases")
    batches = ShuffledBatchSampler(range(args.labelnum), args.batch_size, seed=args.seed)
    folder = runfolder.run_folder(args)
    if args.test_only:
        return inference.main(["--model_path", str(runfolder.newest_weights(folder))])
    strengths = Strengths(**{name[7:]: value for name, value in vars(args).items() if name.startswith("strong_")})
    resume_from = runfolder.checkpoint_to_resume(folder, args.resume, args.overwrite)

    # -------------------------------------------------------------------------------------- network and optimizer
    device = runfolder.choose_device(ranks.gpu(args.gpu), args.amp)
    if device.type == "cpu" and args.keep_memory:
        keep_freed_memory()
    set_deterministic(args.deterministic)
    seed_iteration(args.seed, -1)
    args.has_dropout = True
    model = NETWORKS[args.network](**flags.network_settings(args, db_train.n_channels))
    notes = ["no GPU was found: training on the CPU"] if device.type == "cpu" else []
    if args.init == "kaiming":
        initialize_kaiming(model)
    if args.pretrained and resume_from is None:
        notes += load_fitting(model, load_checkpoint(args.pretrained), args.pretrained)
    model = model.to(device, memory_format=torch.channels_last_3d if args.channels_last else torch.preserve_format)
    model = winograd_convolutions(model) if args.winograd else model
    forward = checkpoint_blocks(model) if args.gradient_checkpointing else model
    forward = ranks.wrap(InParts(torch.compile(forward) if args.compile else forward, args.accumulation_steps))
    ignore_index = UNKNOWN if args.ignore_index is None else args.ignore_index
    ignored = ignore_index if any(astuple(strengths)) else args.ignore_index
    supervised = SupervisedLoss(args.loss, args.class_weights, ignored, args.deep_supervision_weights).to(device)
    optimizer = make_optimizer(
        args.optimizer, model.parameters(), args.base_lr, args.momentum, args.nesterov, args.weight_decay, args.betas
    )
    course = (args.lr_step, args.lr_gamma, args.lr_power, args.lr_patience, args.warmup_iterations)
    schedule = Schedule(optimizer, args.lr_schedule, args.max_iterations, *course)
    scaler = gradient_scaler(device, args.amp)
    autocast = torch.autocast(device.type, {"fp16": torch.float16}.get(args.amp, torch.bfloat16), args.amp != "off")

    selection, said = runfolder.how_selected(val_cases, test_cases(root))
    notes += said
    config = {**vars(args), "n_channels": db_train.n_channels, **runfolder.versions(device)}
    config.update(train_cases=train_cases, val_cases=val_cases, selection=selection, ranks=ranks.world_size)
    config["preprocessing"] = flags.read_config(root / "preprocessing.json") or None
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    keeper = RunState(folder, parts, {"": "model"}, config, ranks.is_main)
    start, progress = 0, {"best": -1.0, "waited": 0, "skipped": 0}
    if resume_from is not None:
        state = load_checkpoint(resume_from, device)
        notes += runfolder.check_same_run(config, state, resume_from, parts)
        start, progress = keeper.load(state, resume_from)
        notes.append(f"resuming at iteration {start} from {resume_from}")
    elif args.resume:
        notes.append(f"{folder} has no latest.pth yet: starting from iteration 0")

    # ------------------------------------------------------------------------------------------- the run's folder
    ranks.wait()  # until all have looked at what lies there
    log = Silent()
    if ranks.is_main:
        lock = runfolder.lock_folder(folder)
        if args.overwrite and resume_from is None:
            runfolder.remove_old_weights(folder)
        keeper.save_config()
        log = RunLog(folder, FIELDS, start)
    log.say(shlex.join(command))
    log.say(f"{folder}: {args.labelnum} labelled cases on {config['device']}")
    for note in notes:
        log.say(note)
    views = (args.tensorboard, args.wandb, config, args.progress or None)
    monitor = Monitor(folder, start, log.say, *views) if ranks.is_main else Silent()

    # ---------------------------------------------------------------------------------------------------- training
    stop_at = start if progress["waited"] == args.patience else args.max_iterations
    sampler = IterationSampler(batches, args.seed, start, stop_at)
    loader = DataLoader(
        db_train,
        batch_sampler=ShardedSampler(sampler, ranks.rank, ranks.world_size, args.batch_size),
        num_workers=args.num_workers,
        worker_init_fn=leave_signals_to_main,
        pin_memory=device.type == "cuda",
    )
    model.train()
    iteration, last, clock = start, False, StepClock(device)
    bar = tqdm(total=args.max_iterations, initial=start, unit="it", dynamic_ncols=True, disable=not ranks.is_main)
    with StopSignals() as stop, bar:
        running = clock.batches(ranks.in_step(until_stopped(loader, stop), stop))
        for iteration, batch in enumerate(running, start=start + 1):
            # Dropout and strong views depend on seed and iteration alone, as the loader's crops do.
            seed_iteration(args.seed, iteration)
            volume_batch, label_batch = batch["image"].to(device), batch["label"].to(device).long()
            ranks.reseed()  # what follows draws other numbers in each process
            pasted = (volume_batch, label_batch) if strengths.mixin else ()
            view = strong_view(volume_batch, strengths, label_batch, *pasted, ignore_index=ignore_index)

            with autocast:
                outputs = ranks.gather(forward(view.image))
            loss, losses = supervised(outputs, ranks.gather(view.labels))
            keeper.check_loss(loss.item(), iteration)

            row = {"iteration": iteration, "lr": schedule.lr}
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if args.gradient_clipping:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.gradient_clipping)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            progress["skipped"] += scaler.get_scale() < scale  # float16 overflowed: these weights did not move
            schedule.step()
            ranks.average_buffers(model)
            clock.stepped()

            bar.update()
            last = iteration == args.max_iterations
            if val_cases and (last or iteration % args.val_freq == 0):
                keeper.check_finite(iteration)
                progress["waited"] += 1
                samples = map(db_val.read, ranks.share(val_cases))
                scores = ranks.join(score_cases(model, samples, dice, *windows))
                score = row["val_dice"] = sum(scores) / len(scores)
                log.say(f"iteration {iteration}: validation Dice {score:.4f}")
                if score > progress["best"]:
                    progress.update(best=score, waited=0)
                    keeper.save_best("", args.model)
                schedule.validated(score)
                last = last or progress["waited"] == args.patience
            if last or iteration % args.log_freq == 0:
                row.update({name: value.item() for name, value in losses.items()})
                row.update(loss=loss.item(), skipped_steps=progress["skipped"], **clock.row())
                log.row(row)
                monitor.row(row)
                bar.set_postfix(loss=f"{row['loss']:.4f}")
            if last or iteration % args.save_freq == 0:
                keeper.save(iteration, progress)
                if args.keep_last:
                    keeper.save_weights(iteration, args.keep_last)
            if last:
                break

    monitor.close()
    if stop.received and not last:
        keeper.save(iteration, progress)
        again = [word for word in command if word != "--overwrite"] + ["--resume"]
        log.say(f"stopped after iteration {iteration}; all is saved, and this goes on:\n{shlex.join(again)}")
        raise SystemExit(128 + stop.received)
    keeper.save_weights(iteration)
    if iteration < args.max_iterations:
        log.say(f"stopped early: no better validation Dice in {args.patience} validations")
    log.say(f"done; test it with:\npython inference.py --model_path {folder / f'iter_{iteration}.pth'}")
    if ranks.is_main:
        lock.close()
    return folder


def main(argv=None):
    errors = (FlagError, DataError, PhantomError, CheckpointError, RunError, LogError, NotFiniteError, MonitorError)
    with flags.one_sentence(*errors, RankError, CacheError, WinogradError):
        args = parse_flags(argv)
        with joined_ranks() as ranks:
            words = sys.argv[1:] if argv is None else argv
            return train(args, [*ranks.launcher(), __file__, *words], ranks)


if __name__ == "__main__":
    main()
