"""Mean Teacher with pseudo-labels: what the teacher is sure of on unlabelled patches are labels for the student.

    python -m recipes.train_pseudo_label --labelnum 25                          # from the repository's root
    python -m recipes.train_pseudo_label --labelnum 16 --root_path /data/LA --strong_rotation 15 --strong_noise 0.1
    python inference.py --model_path model/LA_vnet_25_labeled/PL/iter_6000.pth

Lee, "Pseudo-Label", ICML workshop 2013, with the threshold of FixMatch (Sohn et al., NeurIPS 2020, arXiv:2001.07685)
and the teacher of Tarvainen and Valpola (arXiv:1703.01780). It differs from train_mean_teacher.py in the loss on
unlabelled patches alone: the supervised loss on pseudo-labels stands for the distance of outputs, with the same ramp.
"""

import copy
import shlex
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import inference
from data.make_phantom import PhantomError, make_phantom
from mtseg import flags, losses, runfolder
from mtseg.allocator import keep_freed_memory
from mtseg.augment import Strengths, strong_view
from mtseg.cache import CachedDataset, CacheError
from mtseg.checkpoint import CheckpointError, NotFiniteError, RunState, load_checkpoint, load_fitting, load_weights
from mtseg.datasets import UNKNOWN, DataError, JoinedCases, LAHeart, read_list, test_cases, training_cases
from mtseg.datasets import unlabeled_cases as read_unlabeled
from mtseg.distributed import RankError, Silent, joined_ranks
from mtseg.ema import relative_distance, update_ema_variables
from mtseg.flags import FlagError
from mtseg.memory import InParts, checkpoint_blocks
from mtseg.metrics import dice
from mtseg.monitor import Monitor, MonitorError, StepClock, check_extras
from mtseg.networks import NETWORKS, initialize_kaiming
from mtseg.optim import Schedule, gradient_scaler, make_optimizer
from mtseg.pseudo import pseudo_label_statistics, pseudo_labels
from mtseg.ramps import rampup, sigmoid_rampup
from mtseg.runfolder import RunError
from mtseg.runlog import LogError, RunLog, StopSignals, leave_signals_to_main, until_stopped
from mtseg.samplers import IterationSampler, ShardedSampler, TwoStreamBatchSampler
from mtseg.seeding import seed_iteration, set_deterministic
from mtseg.sliding_window import score_cases
from mtseg.transforms import Compose, RandomCrop, RandomRot90Flip, RandomRotFlip, ToTensor
from mtseg.winograd import WinogradError, winograd_convolutions

HERE = Path(__file__).resolve().parents[1]
FIELDS = ["iteration", "phase", "lr", "loss", *(f"loss_{name}" for name in losses.TERMS), "supervised_loss"]
FIELDS += ["consistency_weight", "pseudo_loss", "teacher_distance", "val_dice_student", "val_dice_teacher"]
FIELDS += ["pseudo_voxels_used", "pseudo_volumes_used", "pseudo_accuracy_monitoring_only"]
FIELDS += ["skipped_steps", "iterations_per_second", "data_seconds", "step_seconds", "peak_memory_mb"]


def parse_flags(argv):
    parser = flags.teacher_parser(__doc__, model="PL", compare=False)
    flag = parser.add_argument_group("pseudo-labels").add_argument
    flag("--pseudo_threshold", type=flags.fraction, default=0.8, help="the teacher's probability that makes a label")
    flag("--pseudo_entropy", type=flags.fraction, help="largest entropy of a voxel, as a share of log(classes)")
    within = "patches whose share of pseudo-foreground lies outside are not used"
    flag("--pseudo_foreground", type=flags.fraction, nargs=2, metavar=("MIN", "MAX"), help=within)
    args = flags.parse(parser, argv, HERE / "data/LA", HERE / "data/Phantom")
    if args.pseudo_foreground and args.pseudo_foreground[0] > args.pseudo_foreground[1]:
        raise FlagError("--pseudo_foreground {} {}: MIN is above MAX; swap them".format(*args.pseudo_foreground))
    return args


def train(args, command, ranks):
    # ------------------------------------------------------------------------------------------------------- data
    root = Path(args.root_path)
    if root == HERE / "data/Phantom":
        print(f"*** Training on the built-in PHANTOM data: synthetic volumes, in {root} ***", flush=True)
        with ranks.main_first():
            make_phantom(root)
    val_cases = read_list(args.val_list) if args.val_list else []
    train_cases = training_cases(root, val_cases, args.max_samples)
    unlabeled_root = args.unlabeled_root or (root if (root / "unlabeled.list").exists() else None)
    unlabeled_cases = read_unlabeled(unlabeled_root) if unlabeled_root else []
    flags.check_two_streams(args, len(train_cases), len(unlabeled_cases))
    labeled_bs, unlabeled_bs = args.labeled_bs, args.batch_size - args.labeled_bs
    windows = (args.stride_xy, args.stride_z, args.patch_size, args.num_classes)
    ranks.check_shares(args.labelnum, labeled_bs, unlabeled_bs)
    own_labeled = labeled_bs // ranks.world_size
    flags.check_normalization(args, unlabeled_bs // ranks.world_size)  # the teacher's batch, the smaller one
    check_extras(args.tensorboard, args.wandb)
    rotflip = {"mirror": [RandomRotFlip()], "all": [RandomRot90Flip()], "none": []}[args.rotflip]
    reading = {"num_classes": args.num_classes, "ignore_index": args.ignore_index}
    reading["transform"] = Compose([*rotflip, RandomCrop(args.patch_size), ToTensor("uint8")])
    keep = CachedDataset if args.cache else lambda dataset: dataset
    db_train = keep(LAHeart(root / "data", cases=train_cases, labelnum=args.labelnum, **reading))
    if unlabeled_cases:
        more = LAHeart(Path(unlabeled_root) / "data", cases=unlabeled_cases, labelnum=0, **reading)
        db_train = JoinedCases([db_train, keep(more)])
    db_val = LAHeart(root / "data", cases=val_cases, num_classes=args.num_classes, ignore_index=args.ignore_index)
    if val_cases and db_val.n_channels != db_train.n_channels:
        raise FlagError(f"--val_list {args.val_list}: its cases have other channels than the training cases")
    streams = range(args.labelnum), range(args.labelnum, len(db_train))
    batches = TwoStreamBatchSampler(*streams, args.batch_size, unlabeled_bs, seed=args.seed)
    folder = runfolder.run_folder(args)
    if args.test_only:
        return inference.main(["--model_path", str(runfolder.newest_weights(folder))])
    strengths = Strengths(**{name[7:]: value for name, value in vars(args).items() if name.startswith("strong_")})
    resume_from = runfolder.checkpoint_to_resume(folder, args.resume, args.overwrite)

    # ------------------------------------------------------------------------------ student, teacher and optimizer
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
    # The teacher stays in train() mode, as the student does: with dropout, and batch norm over its own batches.
    ema_model = copy.deepcopy(model).requires_grad_(False)
    if args.teacher_checkpoint and resume_from is None:
        for name, net in (("student", model), ("teacher", ema_model)):
            if args.teacher_checkpoint_for in (name, "both"):
                load_weights(net, load_checkpoint(args.teacher_checkpoint, device), args.teacher_checkpoint)
    student = checkpoint_blocks(model) if args.gradient_checkpointing else model
    student = ranks.wrap(InParts(torch.compile(student) if args.compile else student, args.accumulation_steps))
    teacher = torch.compile(ema_model) if args.compile else ema_model
    ignore_index = UNKNOWN if args.ignore_index is None else args.ignore_index
    deep = args.deep_supervision_weights
    supervised = losses.SupervisedLoss(args.loss, args.class_weights, args.ignore_index, deep).to(device)
    pseudo_supervised = losses.SupervisedLoss(args.loss, args.class_weights, ignore_index, deep).to(device)
    optimizer = make_optimizer(
        args.optimizer, model.parameters(), args.base_lr, args.momentum, args.nesterov, args.weight_decay, args.betas
    )
    course = (args.lr_step, args.lr_gamma, args.lr_power, args.lr_patience, args.warmup_iterations)
    schedule = Schedule(optimizer, args.lr_schedule, args.max_iterations, *course)
    scaler = gradient_scaler(device, args.amp)
    autocast = torch.autocast(device.type, {"fp16": torch.float16}.get(args.amp, torch.bfloat16), args.amp != "off")

    selection, said = runfolder.how_selected(val_cases, test_cases(root))
    notes += said
    cases = {"train_cases": train_cases, "val_cases": val_cases, "unlabeled_cases": unlabeled_cases}
    found = {"n_channels": db_train.n_channels, "selection": selection, "ranks": ranks.world_size}
    config = {**vars(args), **cases, **found, **runfolder.versions(device)}
    config["preprocessing"] = flags.read_config(root / "preprocessing.json") or None
    parts = {"model": model, "ema_model": ema_model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    keeper = RunState(folder, parts, {"": "model", "ema_": "ema_model"}, config, ranks.is_main)
    # A teacher that has learned before stays what it is; else the first updates are the average of the students so far.
    ema_start = 10**6 if args.teacher_checkpoint and args.teacher_checkpoint_for != "student" else 0
    start, progress = 0, {"student": -1.0, "teacher": -1.0, "waited": 0, "skipped": 0}
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
    log.say(f"{folder}: {args.labelnum} labelled and {len(streams[1])} unlabelled cases on {config['device']}")
    for note in notes:
        log.say(note)
    views = (args.tensorboard, args.wandb, config, args.progress or None)
    monitor = Monitor(folder, start, log.say, *views) if ranks.is_main else Silent()

    # ---------------------------------------------------------------------------------------------------- training
    stop_at = start if progress["waited"] == args.patience else args.max_iterations
    sampler = IterationSampler(batches, args.seed, start, stop_at)
    loader = DataLoader(
        db_train,
        batch_sampler=ShardedSampler(sampler, ranks.rank, ranks.world_size, labeled_bs),
        num_workers=args.num_workers,
        worker_init_fn=leave_signals_to_main,
        pin_memory=device.type == "cuda",
    )
    model.train()
    ema_model.train()
    iteration, last, phase, clock = start, False, None, StepClock(device)
    bar = tqdm(total=args.max_iterations, initial=start, unit="it", dynamic_ncols=True, disable=not ranks.is_main)
    with StopSignals() as stop, bar:
        running = clock.batches(ranks.in_step(until_stopped(loader, stop), stop))
        for iteration, batch in enumerate(running, start=start + 1):
            # Noise, dropout and strong views depend on seed and iteration alone, as the loader's crops do.
            seed_iteration(args.seed, iteration)
            volume_batch, label_batch = batch["image"].to(device), batch["label"].to(device).long()
            compared_batch, hidden_labels = volume_batch[own_labeled:], label_batch[own_labeled:]
            noise = torch.clamp(ranks.randn_like(compared_batch) * 0.1, -0.2, 0.2)
            ranks.reseed()  # what follows draws other numbers in each process
            pasted = volume_batch[:own_labeled] if strengths.mixin else None
            view = strong_view(compared_batch, strengths, hidden_labels, pasted, ignore_index=ignore_index)
            label_batch = ranks.gather(label_batch[:own_labeled])

            with autocast:
                outputs = losses.levels(student(torch.cat([volume_batch[:own_labeled], view.image])))
                with torch.no_grad():
                    ema_outputs = losses.levels(teacher(compared_batch + noise))[0]
            target, compared = map(ranks.gather, view.align(ema_outputs))
            outputs = ranks.gather(outputs, own_labeled)
            supervised_loss, loss_parts = supervised([output[:labeled_bs] for output in outputs], label_batch)
            known = pseudo_labels(
                target, args.pseudo_threshold, args.pseudo_entropy, args.pseudo_foreground, ignore_index
            ).masked_fill(~compared[:, 0], ignore_index)
            pseudo_loss, _ = pseudo_supervised([output[labeled_bs:] for output in outputs], known)
            # The hidden labels serve to watch the pseudo-labels, nothing else: where there are none, they are UNKNOWN.
            hidden = view.labels.masked_fill(view.labels == UNKNOWN, ignore_index)
            statistics = pseudo_label_statistics(known, ranks.gather(hidden), ignore_index)
            block = (iteration - 1 - args.consistency_warmup) // 150
            ramp = rampup(args.consistency_ramp, block, args.consistency_rampup) if block >= 0 else 0.0
            consistency_weight = args.consistency * ramp
            before, phase = phase, "warm-up" if block < 0 else "ramp" if block < args.consistency_rampup else "stable"
            if phase != before:
                log.say(f"iteration {iteration}: {phase}, consistency weight {consistency_weight:.3g}")
            loss = supervised_loss + consistency_weight * pseudo_loss
            keeper.check_loss(loss.item(), iteration)

            row = {"iteration": iteration, "lr": schedule.lr, "consistency_weight": consistency_weight}
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
            alpha = args.ema_decay * sigmoid_rampup(iteration - 1, args.ema_rampup)
            ranks.average_buffers(model, ema_model)
            update_ema_variables(model, ema_model, alpha, ema_start + iteration - 1, args.ema_buffers)
            clock.stepped()

            bar.update()
            last = iteration == args.max_iterations
            if val_cases and (last or iteration % args.val_freq == 0):
                keeper.check_finite(iteration)
                progress["waited"] += 1
                for name, prefix, net in (("student", "", model), ("teacher", "ema_", ema_model)):
                    samples = map(db_val.read, ranks.share(val_cases))
                    scores = ranks.join(score_cases(net, samples, dice, *windows))
                    score = row[f"val_dice_{name}"] = sum(scores) / len(scores)
                    log.say(f"iteration {iteration}: validation Dice of the {name} {score:.4f}")
                    if score > progress[name]:
                        progress[name] = score
                        progress["waited"] *= name == "teacher"
                        keeper.save_best(prefix, args.model)
                schedule.validated(row["val_dice_student"])
                last = last or progress["waited"] == args.patience
            if last or iteration % args.log_freq == 0:
                row["phase"] = phase
                row.update({name: value.item() for name, value in loss_parts.items()})
                row.update(loss=loss.item(), supervised_loss=supervised_loss.item())
                row.update({name: value.item() for name, value in statistics.items()})
                row.update(pseudo_loss=pseudo_loss.item(), skipped_steps=progress["skipped"])
                row.update(teacher_distance=relative_distance(model, ema_model), **clock.row())
                log.row(row)
                monitor.row(row)
                bar.set_postfix(loss=f"{row['loss']:.4f}", pseudo=f"{row['pseudo_loss']:.4f}")
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
            return train(args, [*ranks.launcher(), "-m", "recipes.train_pseudo_label", *words], ranks)


if __name__ == "__main__":
    main()
