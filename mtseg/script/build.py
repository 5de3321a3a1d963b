"""Data, networks and optimizer as the flags of a training script ask for them. Nothing here is a method."""

from dataclasses import dataclass
from typing import Any

import torch

from mtseg.augment import Strengths
from mtseg.cache import CachedDataset
from mtseg.checkpoint import load_checkpoint, load_fitting, load_weights
from mtseg.datasets import (
    UNKNOWN,
    JoinedCases,
    LAHeart,
    find_root,
    read_list,
    test_cases,
    training_cases,
    unlabeled_cases,
)
from mtseg.losses import SupervisedLoss, levels
from mtseg.memory import InParts, checkpoint_blocks
from mtseg.networks import NETWORKS, initialize_kaiming
from mtseg.optim import Schedule, Updater, gradient_scaler, make_optimizer
from mtseg.phantom import make_phantom
from mtseg.samplers import ShuffledBatchSampler, TwoStreamBatchSampler
from mtseg.script import flags
from mtseg.script.runfolder import how_selected
from mtseg.transforms import Compose, RandomCrop, RandomRot90Flip, RandomRotFlip, ToTensor
from mtseg.winograd import winograd_convolutions


@dataclass
class Data:
    """What the flags say of the data.

    `train`: the data set, labelled cases first. `val`: the cases of --val_list. `sampler`: of the joint batches of all
    processes, labelled patches first. `joint_labeled_bs`, `labeled_bs`: the labelled patches of a joint batch, and of
    this process's share. `unknown`: stands for the label of a voxel that has none. `n_channels`: of the images.
    `cases`: {'train_cases', 'val_cases', ...: names}. `selection`: how the reported checkpoint is chosen.
    `preprocessing`: the data set's, or None. `description`, `notes`: for the log.
    """

    train: Any
    val: LAHeart
    sampler: Any
    joint_labeled_bs: int
    labeled_bs: int
    unknown: int
    n_channels: int
    cases: dict
    selection: str
    preprocessing: dict | None
    description: str
    notes: list


def read_data(args, run):
    """The Data of a training script; of labelled cases alone where its flags have no --labeled_bs."""
    root = find_root(args.root_path)
    if root == flags.HOME / "data/Phantom":
        print(f"*** Training on the built-in PHANTOM data: synthetic volumes, in {root} ***", flush=True)
        with run.ranks.main_first():
            make_phantom(root)
    unlabeled = hasattr(args, "labeled_bs")
    val = read_list(args.val_list) if args.val_list else []
    train = training_cases(root, val, args.max_samples)
    more_root = unlabeled and (args.unlabeled_root or (args.root_path if (root / "unlabeled.list").exists() else None))
    more = unlabeled_cases(find_root(more_root)) if more_root else []
    labeled_bs = args.labeled_bs if unlabeled else args.batch_size
    unlabeled_bs = args.batch_size - labeled_bs
    if unlabeled:
        flags.check_two_streams(args, len(train), len(more))
    else:
        flags.check_one_stream(args, len(train))
        train = train[: args.labelnum]
    run.ranks.check_shares(args.labelnum, labeled_bs, unlabeled_bs)
    flags.check_normalization(args, (unlabeled_bs or labeled_bs) // run.ranks.world_size)

    rotflip = {"mirror": [RandomRotFlip()], "all": [RandomRot90Flip()], "none": []}[args.rotflip]
    reading = {"num_classes": args.num_classes, "ignore_index": args.ignore_index}
    augmented = {"transform": Compose([*rotflip, RandomCrop(args.patch_size), ToTensor("uint8")]), **reading}
    cached = CachedDataset if args.cache else lambda dataset: dataset
    db_train = cached(LAHeart(args.root_path, cases=train, labelnum=args.labelnum, **augmented))
    if more:
        db_more = cached(LAHeart(more_root, cases=more, labelnum=0, **augmented))
        db_train = JoinedCases([db_train, db_more])
    db_val = LAHeart(args.root_path, cases=val, **reading)
    if val and db_val.n_channels != db_train.n_channels:
        raise flags.FlagError(f"--val_list {args.val_list}: its cases have other channels than the training cases")
    labeled_indices, unlabeled_indices = range(args.labelnum), range(args.labelnum, len(db_train))
    if unlabeled:
        sampler = TwoStreamBatchSampler(
            labeled_indices, unlabeled_indices, args.batch_size, unlabeled_bs, seed=args.seed
        )
        description = f"{len(labeled_indices)} labelled and {len(unlabeled_indices)} unlabelled cases"
    else:
        sampler = ShuffledBatchSampler(labeled_indices, args.batch_size, seed=args.seed)
        description = f"{len(labeled_indices)} labelled cases"
    selection, notes = how_selected(val, test_cases(root))
    return Data(
        train=db_train,
        val=db_val,
        sampler=sampler,
        joint_labeled_bs=labeled_bs,
        labeled_bs=labeled_bs // run.ranks.world_size,
        unknown=UNKNOWN if args.ignore_index is None else args.ignore_index,
        n_channels=db_train.n_channels,
        cases={"train_cases": train, "val_cases": val} | ({"unlabeled_cases": more} if unlabeled else {}),
        selection=selection,
        preprocessing=flags.read_config(root / "preprocessing.json") or None,
        description=description,
        notes=notes,
    )


def make_network(args, run, n_channels):
    """The network of the flags, on the run's device; a script may make several, each with its own initial weights."""
    net = NETWORKS[args.network](**flags.network_settings(args, n_channels))
    if args.init == "kaiming":
        initialize_kaiming(net)
    if args.pretrained and run.resume_from is None:
        run.notes += load_fitting(net, load_checkpoint(args.pretrained), args.pretrained)
    net = net.to(run.device, memory_format=torch.channels_last_3d if args.channels_last else torch.preserve_format)
    return winograd_convolutions(net) if args.winograd else net


def load_teacher_checkpoint(args, run, model, ema_model):
    """Take over --teacher_checkpoint. Returns the step from which the teacher's updates count: 0, so that the first
    are the average of the students so far; or, for a teacher that has learned before, so late that it stays."""
    if args.teacher_checkpoint and run.resume_from is None:
        for name, net in (("student", model), ("teacher", ema_model)):
            if args.teacher_checkpoint_for in (name, "both"):
                load_weights(net, load_checkpoint(args.teacher_checkpoint, run.device), args.teacher_checkpoint)
    return 10**6 if args.teacher_checkpoint and args.teacher_checkpoint_for != "student" else 0


def make_forward(args, run, net):
    """A function of a batch that gives the outputs of `net` as a list, the finest level first.

    Of a network with gradients: in parts, recomputed and over several processes, as the flags say. Make copies of a
    network before, not after.
    """
    if any(parameter.requires_grad for parameter in net.parameters()):
        forward = checkpoint_blocks(net) if args.gradient_checkpointing else net
        forward = InParts(torch.compile(forward) if args.compile else forward, args.accumulation_steps)
        forward = run.ranks.wrap(forward)
    else:
        forward = torch.compile(net) if args.compile else net
    return lambda batch: levels(forward(batch))


def make_supervised(args, run, unknown=False):
    """The supervised loss of the flags, losses.SupervisedLoss. Voxels with the label --ignore_index take no part, nor,
    with `unknown`, those with the label `Data.unknown`: give it where labels are pseudo-labels or of strong views."""
    ignore_index = UNKNOWN if unknown and args.ignore_index is None else args.ignore_index
    return SupervisedLoss(args.loss, args.class_weights, ignore_index, args.deep_supervision_weights).to(run.device)


def make_updater(args, run, parameters):
    """Optimizer, schedule, scaler and clipping of the flags, for `parameters` of one or several networks."""
    optimizer = make_optimizer(
        args.optimizer, parameters, args.base_lr, args.momentum, args.nesterov, args.weight_decay, args.betas
    )
    settings = (args.lr_step, args.lr_gamma, args.lr_power, args.lr_patience, args.warmup_iterations)
    schedule = Schedule(optimizer, args.lr_schedule, args.max_iterations, *settings)
    return Updater(optimizer, schedule, gradient_scaler(run.device, args.amp), args.gradient_clipping)


def make_strengths(args):
    """The Strengths of the strong views that the flags ask for."""
    return Strengths(**{name[7:]: value for name, value in vars(args).items() if name.startswith("strong_")})
