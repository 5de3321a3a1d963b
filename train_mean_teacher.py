"""Mean Teacher: a student learns from few labels, and agrees with a teacher, the average of its own past weights.

    python train_mean_teacher.py --labelnum 25                          # LA in data/LA, or the built-in Phantom data
    python train_mean_teacher.py --labelnum 16 --root_path /data/LA     # train.list, test.list and data/ lie there
    python train_mean_teacher.py --labelnum 16 --root_path /data/LA --resume      # go on after an interruption
    python inference.py --model_path model/LA_vnet_25_labeled/MT/iter_6000.pth    # the table of test metrics

Tarvainen and Valpola, NeurIPS 2017 (arXiv:1703.01780); on volumes as in UA-MT (Yu et al., MICCAI 2019,
arXiv:1907.07034), without its uncertainty mask. The last iteration is the result; no checkpoint is selected.
"""

import copy
import json
import math
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.make_phantom import PhantomError, make_phantom
from mtseg.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint, write_whole
from mtseg.datasets import DataError, LAHeart, read_list, test_cases, training_cases
from mtseg.ema import update_ema_variables
from mtseg.flags import FlagError, check_normalization, fraction, one_sentence, parse, rate, training_parser
from mtseg.losses import multiclass_dice_loss, softmax_kl_loss, softmax_mse_loss
from mtseg.metrics import dice
from mtseg.networks.unet import UNet
from mtseg.networks.vnet import VNet
from mtseg.optim import Schedule, make_optimizer
from mtseg.ramps import sigmoid_rampup
from mtseg.runfolder import (
    RunError,
    check_same_run,
    checkpoint_to_resume,
    choose_device,
    lock_folder,
    remove_old_weights,
    run_folder,
    versions,
)
from mtseg.runlog import LogError, NotFiniteError, RunLog, StopSignals, leave_signals_to_main, until_stopped
from mtseg.samplers import IterationSampler, TwoStreamBatchSampler
from mtseg.seeding import seed_iteration, set_deterministic
from mtseg.sliding_window import test_single_case
from mtseg.transforms import Compose, RandomCrop, RandomRotFlip, ToTensor

HERE = Path(__file__).resolve().parent
FIELDS = ["iteration", "lr", "loss", "loss_ce", "loss_dice", "supervised_loss"]
FIELDS += ["consistency_weight", "consistency_dist", "iterations_per_second"]


def parse_flags(argv):
    parser = training_parser(__doc__, model="MT", batch_size=4)
    flag = parser.add_argument_group("mean teacher").add_argument
    flag("--labeled_bs", type=int, default=2, help="labelled patches of a batch; the rest is unlabelled")
    flag("--ema_decay", type=fraction, default=0.99, help="share of the teacher that an update keeps")
    flag("--consistency_type", choices=("mse", "kl"), default="mse", help="distance between student and teacher")
    flag("--consistency", type=rate, default=0.1, help="weight of the consistency loss at the end of its ramp")
    flag("--consistency_rampup", type=rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
    return parse(parser, argv, HERE / "data/LA", HERE / "data/Phantom")


def validate(net, dataset, args):
    """The mean Dice of the foreground classes over the cases of `dataset`."""
    net.eval()
    scores = []
    for sample in map(dataset.read, dataset.image_list):
        prediction, _ = test_single_case(
            net, sample["image"], args.stride_xy, args.stride_z, args.patch_size, args.num_classes
        )
        scores += [dice(prediction == c, sample["label"] == c) for c in range(1, args.num_classes)]
    net.train()
    return sum(scores) / len(scores)


def train(args, command):
    # ------------------------------------------------------------------------------------------------------- data
    root = Path(args.root_path)
    if root == HERE / "data/Phantom":
        print(f"*** Training on the built-in PHANTOM data: synthetic volumes, in {root} ***", flush=True)
        make_phantom(root)
    val_cases = read_list(args.val_list) if args.val_list else []
    train_cases = training_cases(root, val_cases, args.max_samples)
    if not 0 < args.labeled_bs < args.batch_size:
        raise FlagError(
            f"--labeled_bs {args.labeled_bs} with --batch_size {args.batch_size}: a batch holds labelled and "
            f"unlabelled patches, so --labeled_bs is at least 1 and less than --batch_size"
        )
    if args.labelnum >= len(train_cases):
        raise FlagError(
            f"--labelnum {args.labelnum} leaves nothing unlabelled of the {len(train_cases)} training cases of "
            f"{root / 'train.list'}: take fewer, or use train_sup.py, which needs no unlabelled cases"
        )
    if args.labelnum < args.labeled_bs:
        raise FlagError(f"--labelnum {args.labelnum} is less than --labeled_bs {args.labeled_bs}: lower the latter")
    unlabeled_bs = args.batch_size - args.labeled_bs
    labeled_idxs, unlabeled_idxs = range(args.labelnum), range(args.labelnum, len(train_cases))
    if len(unlabeled_idxs) < unlabeled_bs:
        raise FlagError(
            f"--labelnum {args.labelnum} leaves {len(unlabeled_idxs)} cases unlabelled, fewer than the {unlabeled_bs} "
            f"of a batch: lower --labelnum or --batch_size"
        )
    check_normalization(args, unlabeled_bs)  # the teacher's batch, the smaller one
    rotflip = [] if args.rotflip == "none" else [RandomRotFlip(args.rotflip)]
    transform = Compose([*rotflip, RandomCrop(args.patch_size), ToTensor()])
    db_train = LAHeart(root / "data", cases=train_cases, transform=transform, num_classes=args.num_classes)
    db_val = LAHeart(root / "data", cases=val_cases, num_classes=args.num_classes)
    if val_cases and db_val.n_channels != db_train.n_channels:
        raise FlagError(f"--val_list {args.val_list}: its cases have other channels than the training cases")
    batches = TwoStreamBatchSampler(labeled_idxs, unlabeled_idxs, args.batch_size, unlabeled_bs, seed=args.seed)
    folder = run_folder(args)
    resume_from = checkpoint_to_resume(folder, args.resume, args.overwrite)

    # ------------------------------------------------------------------------------ student, teacher and optimizer
    device = choose_device(args.gpu)
    set_deterministic(args.deterministic)
    seed_iteration(args.seed, -1)
    model = {"vnet": VNet, "unet": UNet}[args.network](
        n_channels=db_train.n_channels,
        n_classes=args.num_classes,
        n_filters=args.n_filters,
        normalization=args.normalization,
        has_dropout=True,
    ).to(device)
    # The teacher stays in train() mode, as the student does: with dropout, and batch norm over its own batches.
    ema_model = copy.deepcopy(model).requires_grad_(False)
    optimizer = make_optimizer(
        args.optimizer, model.parameters(), args.base_lr, args.momentum, args.nesterov, args.weight_decay, args.betas
    )
    schedule = Schedule(
        optimizer,
        args.lr_schedule,
        args.max_iterations,
        args.lr_step,
        args.lr_gamma,
        args.lr_power,
        args.lr_patience,
        args.warmup_iterations,
    )
    consistency_criterion = {"mse": softmax_mse_loss, "kl": softmax_kl_loss}[args.consistency_type]

    watched = sorted(set(val_cases) & set(test_cases(root)))
    selection = "test set" if watched else "validation list" if val_cases else "last iteration"
    config = {**vars(args), "n_channels": db_train.n_channels, "has_dropout": True, **versions(device)}
    config.update(train_cases=train_cases, val_cases=val_cases, selection=selection)

    start, best = 0, {"student": -1.0, "teacher": -1.0}
    note = ""
    if resume_from is not None:
        state = load_checkpoint(resume_from, device)
        note = check_same_run(config, state, resume_from, ("model", "ema_model", "optimizer", "schedule"))
        load_weights(model, state["model"], resume_from)
        load_weights(ema_model, state["ema_model"], resume_from)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, best = state["iteration"], state["best"]

    # ------------------------------------------------------------------------------------------- the run's folder
    lock = lock_folder(folder)
    if args.overwrite and resume_from is None:
        remove_old_weights(folder)
    write_whole(folder / "config.json", json.dumps(config, indent=1).encode())

    log = RunLog(folder, FIELDS, start)
    log.say(shlex.join(command))
    log.say(f"{folder}: {args.labelnum} labelled and {len(unlabeled_idxs)} unlabelled cases on {config['device']}")
    if device.type == "cpu":
        log.say("no GPU was found: training on the CPU")
    if watched:
        log.say(f"{len(watched)} cases of {args.val_list} are test cases: what they select is selected on the test set")
    if start:
        log.say(f"resuming at iteration {start} from {resume_from}" + f" ({note})" * bool(note))
    elif args.resume:
        log.say(f"{folder} has no latest.pth yet: starting from iteration 0")

    def check_finite(iteration):
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise NotFiniteError(f"the weights are not finite after iteration {iteration}; {last_good_state()}")

    def save_latest(iteration):
        """Everything that resuming needs; never over a good state with a broken one."""
        check_finite(iteration)
        state = {
            "iteration": iteration,
            "best": best,
            "config": config,
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        state |= {"model": model.state_dict(), "ema_model": ema_model.state_dict()}
        save_checkpoint(state, folder / "latest.pth")

    def last_good_state():
        if not (folder / "latest.pth").exists():
            return "no checkpoint was written yet; lower --base_lr"
        return f"{folder / 'latest.pth'} keeps the last good state; lower --base_lr"

    # ---------------------------------------------------------------------------------------------------- training
    loader = DataLoader(
        db_train,
        batch_sampler=IterationSampler(batches, args.seed, start, args.max_iterations),
        num_workers=args.num_workers,
        worker_init_fn=leave_signals_to_main,
        pin_memory=device.type == "cuda",
    )
    model.train()
    ema_model.train()
    iteration, logged_at, logged_time = start, start, time.perf_counter()
    bar = tqdm(total=args.max_iterations, initial=start, unit="it", dynamic_ncols=True)
    with StopSignals() as stop, bar:
        for iteration, batch in enumerate(until_stopped(loader, stop), start=start + 1):
            # Noise and dropout of an iteration depend on seed and iteration alone, as the loader's crops do.
            seed_iteration(args.seed, iteration)
            volume_batch, label_batch = batch["image"].to(device), batch["label"].to(device)
            label_batch = label_batch[: args.labeled_bs]
            unlabeled_batch = volume_batch[args.labeled_bs :]
            noise = torch.clamp(torch.randn_like(unlabeled_batch) * 0.1, -0.2, 0.2)

            outputs = model(volume_batch)
            with torch.no_grad():
                ema_outputs = ema_model(unlabeled_batch + noise)

            loss_ce = F.cross_entropy(outputs[: args.labeled_bs], label_batch)
            loss_dice = multiclass_dice_loss(outputs[: args.labeled_bs], label_batch)
            supervised_loss = 0.5 * (loss_ce + loss_dice)
            ramp = sigmoid_rampup((iteration - 1) // 150, args.consistency_rampup)
            consistency_weight = args.consistency * ramp
            consistency_dist = consistency_criterion(outputs[args.labeled_bs :], ema_outputs)
            loss = supervised_loss + consistency_weight * consistency_dist
            if not math.isfinite(loss.item()):
                raise NotFiniteError(f"the loss became {loss.item()} at iteration {iteration}; {last_good_state()}")

            lr = schedule.lr
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            update_ema_variables(model, ema_model, args.ema_decay, iteration - 1)

            bar.update()
            if iteration % args.log_freq == 0 or iteration == args.max_iterations:
                now = time.perf_counter()
                row = {
                    "iteration": iteration,
                    "lr": lr,
                    "loss": loss.item(),
                    "loss_ce": loss_ce.item(),
                    "loss_dice": loss_dice.item(),
                    "supervised_loss": supervised_loss.item(),
                    "consistency_weight": consistency_weight,
                    "consistency_dist": consistency_dist.item(),
                    "iterations_per_second": (iteration - logged_at) / (now - logged_time),
                }
                logged_at, logged_time = iteration, now
                log.row(row)
                bar.set_postfix(loss=f"{row['loss']:.4f}", consistency=f"{row['consistency_dist']:.5f}")

            if val_cases and (iteration % args.val_freq == 0 or iteration == args.max_iterations):
                check_finite(iteration)
                for name, prefix, net in (("student", "", model), ("teacher", "ema_", ema_model)):
                    score = validate(net, db_val, args)
                    log.say(f"iteration {iteration}: validation Dice of the {name} {score:.4f}")
                    if score > best[name]:
                        best[name] = score
                        save_checkpoint(net.state_dict(), folder / f"{prefix}{args.model}_best_model.pth")
            if iteration % args.save_freq == 0 or iteration == args.max_iterations:
                save_latest(iteration)

    if stop.received and iteration < args.max_iterations:
        save_latest(iteration)
        again = [word for word in command if word != "--overwrite"] + ["--resume"]
        log.say(f"stopped after iteration {iteration}; all is saved, and this goes on:\n{shlex.join(again)}")
        raise SystemExit(128 + stop.received)
    save_checkpoint(model.state_dict(), folder / f"iter_{args.max_iterations}.pth")
    save_checkpoint(ema_model.state_dict(), folder / f"ema_iter_{args.max_iterations}.pth")
    log.say(f"done; test it with:\npython inference.py --model_path {folder / f'iter_{args.max_iterations}.pth'}")
    lock.close()
    return folder


def main(argv=None):
    with one_sentence(FlagError, DataError, PhantomError, CheckpointError, RunError, LogError, NotFiniteError):
        return train(parse_flags(argv), ["python", __file__, *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
