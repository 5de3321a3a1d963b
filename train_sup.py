"""Supervised training on the labelled cases alone: the baseline every semi-supervised method is compared with.

    python train_sup.py --labelnum 25                          # LA in data/LA, or the built-in Phantom data
    python train_sup.py --labelnum 16 --root_path /data/LA     # train.list, test.list and data/ lie there
    python train_sup.py --labelnum 16 --root_path /data/LA --resume      # go on after an interruption
    python inference.py --model_path model/LA_vnet_25_labeled/supervised/iter_6000.pth    # the table of test metrics

V-Net (Milletari et al., 3DV 2016, arXiv:1606.04797) with the loss and settings of UA-MT (Yu et al., MICCAI 2019,
arXiv:1907.07034). The last iteration is the result; no checkpoint is selected.
"""

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
from mtseg.flags import FlagError, check_normalization, one_sentence, parse, training_parser
from mtseg.losses import multiclass_dice_loss
from mtseg.metrics import dice
from mtseg.networks.unet import UNet
from mtseg.networks.vnet import VNet
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
from mtseg.samplers import IterationSampler, ShuffledBatchSampler
from mtseg.seeding import seed_iteration, set_deterministic
from mtseg.sliding_window import test_single_case
from mtseg.transforms import Compose, RandomCrop, RandomRotFlip, ToTensor

HERE = Path(__file__).resolve().parent
FIELDS = ["iteration", "lr", "loss", "loss_ce", "loss_dice", "iterations_per_second"]


def parse_flags(argv):
    parser = training_parser(__doc__, model="supervised", batch_size=2)
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
    if args.labelnum > len(train_cases):
        raise FlagError(
            f"--labelnum {args.labelnum} is more than the {len(train_cases)} training cases of {root / 'train.list'}: "
            f"take fewer"
        )
    if args.labelnum < args.batch_size:
        raise FlagError(f"--labelnum {args.labelnum} is less than --batch_size {args.batch_size}: lower the latter")
    check_normalization(args, args.batch_size)
    transform = Compose([RandomRotFlip(), RandomCrop(args.patch_size), ToTensor()])
    train_cases = train_cases[: args.labelnum]
    db_train = LAHeart(root / "data", cases=train_cases, transform=transform, num_classes=args.num_classes)
    db_val = LAHeart(root / "data", cases=val_cases, num_classes=args.num_classes)
    if val_cases and db_val.n_channels != db_train.n_channels:
        raise FlagError(f"--val_list {args.val_list}: its cases have other channels than the training cases")
    batches = ShuffledBatchSampler(range(args.labelnum), args.batch_size, seed=args.seed)
    folder = run_folder(args)
    resume_from = checkpoint_to_resume(folder, args.resume, args.overwrite)

    # -------------------------------------------------------------------------------------- network and optimizer
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
    optimizer = torch.optim.SGD(model.parameters(), lr=args.base_lr, momentum=0.9, weight_decay=1e-4)

    watched = sorted(set(val_cases) & set(test_cases(root)))
    selection = "test set" if watched else "validation list" if val_cases else "last iteration"
    config = {**vars(args), "n_channels": db_train.n_channels, "has_dropout": True, **versions(device)}
    config.update(train_cases=train_cases, val_cases=val_cases, selection=selection)

    start, best = 0, -1.0
    note = ""
    if resume_from is not None:
        state = load_checkpoint(resume_from, device)
        note = check_same_run(config, state, resume_from, ("model", "optimizer"))
        load_weights(model, state["model"], resume_from)
        optimizer.load_state_dict(state["optimizer"])
        start, best = state["iteration"], state["best"]

    # ------------------------------------------------------------------------------------------- the run's folder
    lock = lock_folder(folder)
    if args.overwrite and resume_from is None:
        remove_old_weights(folder)
    write_whole(folder / "config.json", json.dumps(config, indent=1).encode())

    log = RunLog(folder, FIELDS, start)
    log.say(shlex.join(command))
    log.say(f"{folder}: {args.labelnum} labelled cases on {config['device']}")
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
        state = {"iteration": iteration, "best": best, "config": config}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
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
    iteration, logged_at, logged_time = start, start, time.perf_counter()
    bar = tqdm(total=args.max_iterations, initial=start, unit="it", dynamic_ncols=True)
    with StopSignals() as stop, bar:
        for iteration, batch in enumerate(until_stopped(loader, stop), start=start + 1):
            # The dropout of an iteration depends on seed and iteration alone, as the loader's crops do.
            seed_iteration(args.seed, iteration)
            volume_batch, label_batch = batch["image"].to(device), batch["label"].to(device)

            outputs = model(volume_batch)
            loss_ce = F.cross_entropy(outputs, label_batch)
            loss_dice = multiclass_dice_loss(outputs, label_batch)
            loss = 0.5 * (loss_ce + loss_dice)
            if not math.isfinite(loss.item()):
                raise NotFiniteError(f"the loss became {loss.item()} at iteration {iteration}; {last_good_state()}")

            lr = args.base_lr * 0.1 ** ((iteration - 1) // args.lr_step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            bar.update()
            if iteration % args.log_freq == 0 or iteration == args.max_iterations:
                now = time.perf_counter()
                row = {
                    "iteration": iteration,
                    "lr": lr,
                    "loss": loss.item(),
                    "loss_ce": loss_ce.item(),
                    "loss_dice": loss_dice.item(),
                    "iterations_per_second": (iteration - logged_at) / (now - logged_time),
                }
                logged_at, logged_time = iteration, now
                log.row(row)
                bar.set_postfix(loss=f"{row['loss']:.4f}")

            if val_cases and (iteration % args.val_freq == 0 or iteration == args.max_iterations):
                check_finite(iteration)
                score = validate(model, db_val, args)
                log.say(f"iteration {iteration}: validation Dice {score:.4f}")
                if score > best:
                    best = score
                    save_checkpoint(model.state_dict(), folder / f"{args.model}_best_model.pth")
            if iteration % args.save_freq == 0 or iteration == args.max_iterations:
                save_latest(iteration)

    if stop.received and iteration < args.max_iterations:
        save_latest(iteration)
        again = [word for word in command if word != "--overwrite"] + ["--resume"]
        log.say(f"stopped after iteration {iteration}; all is saved, and this goes on:\n{shlex.join(again)}")
        raise SystemExit(128 + stop.received)
    save_checkpoint(model.state_dict(), folder / f"iter_{args.max_iterations}.pth")
    log.say(f"done; test it with:\npython inference.py --model_path {folder / f'iter_{args.max_iterations}.pth'}")
    lock.close()
    return folder


def main(argv=None):
    with one_sentence(FlagError, DataError, PhantomError, CheckpointError, RunError, LogError, NotFiniteError):
        return train(parse_flags(argv), ["python", __file__, *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
