"""Flags that contradict each other or the data, found before anything is read or written."""

import math
from pathlib import Path

# Encoders with decoders, by their --network: the encoder's output stride, which divides the sides of the patch.
ENCODED = dict.fromkeys(
    (f"{name}_unet" for name in ("resnet18", "resnet34", "resnet50", "efficientnet_b0", "efficientnet_b0_tf")), 32
)
ENCODED |= dict.fromkeys((name.replace("unet", "deeplab") for name in ENCODED), 16)
ENCODED |= {"convnext_t_unet": 32, "dinov2_vits14_unet": 14, "dinov2_vits14_reg_unet": 14}
PADDED = 254  # the label of voxels that were padded, until a batch comes with --ignore_padding
# What a config may hold for the trainings that follow, and pretraining has no use for.
NOT_IN_PRETRAINING = ("foreground_patches", "deep_supervision", "deep_supervision_weights", "class_weights")
NOT_IN_PRETRAINING += ("ignore_padding", "freeze", "unfreeze_at", "patience", "labeled_draw")
OFF_BY_DEFAULT = "nesterov class_weights deep_supervision_weights patience from_scratch unfreeze_at".split()


def is_own(network):
    """Whether --network names a class of one's own, as FILE.py:CLASS."""
    return ".py:" in network


class FlagError(ValueError):
    """Flags that contradict each other or the data; the message is one sentence that names them."""


def check_flags(args, given=()):
    """FlagError where flags contradict each other, whatever the data; `given`: those of the command line, by name."""
    from mtseg.losses import parse_loss  # not above: PyTorch takes seconds, and --help is answered before

    try:
        terms = parse_loss(args.loss)
    except ValueError as error:
        raise FlagError(f"--loss: {error}") from error
    check_used(args, given, terms)
    check_dims(args)
    check_class_numbers(args)
    check_network(args)
    check_finetuning(args)
    if args.batch_size % args.accumulation_steps:
        raise FlagError(f"--accumulation_steps {args.accumulation_steps} must divide --batch_size {args.batch_size}")
    for name in ("warmup_iterations", "consistency_warmup"):
        if (value := getattr(args, name, 0)) >= args.max_iterations:
            raise FlagError(f"--{name} {value} is not below --max_iterations {args.max_iterations}; lower it")
    if args.val_list and not Path(args.val_list).is_file():
        raise FlagError(f"--val_list {args.val_list}: no such file; give a text file with the name of a case a line")
    if args.val_list and args.fold is not None:
        raise FlagError(f"--fold {args.fold} with --val_list: a fold has its own cases to keep out; leave one out")
    if args.lr_schedule == "plateau" and not args.val_list:
        raise FlagError("--lr_schedule plateau without --val_list: it goes by the Dice of the cases there")
    if args.lr_schedule == "plateau" and args.lr_gamma == 1:
        raise FlagError("--lr_schedule plateau with --lr_gamma 1: the rate would never fall; take a factor below 1")
    if args.nesterov and args.momentum == 0:
        raise FlagError("--nesterov with --momentum 0: there is no momentum to look ahead with; change one")
    if args.class_weights and len(args.class_weights) != args.num_classes:
        raise FlagError(
            f"--class_weights gives {len(args.class_weights)} weights and --num_classes {args.num_classes}: give one "
            f"for each class, background first"
        )
    for name in ("class_weights", "deep_supervision_weights"):
        if getattr(args, name) is not None and not any(getattr(args, name)):
            raise FlagError(f"--{name}: all weights are 0, so nothing would be learned; give one above 0")
    if args.ignore_index == 0 and hasattr(args, "labeled_bs"):
        raise FlagError(
            "--ignore_index 0: of unlabelled patches 0 would be background and no label at once; give voxels without a "
            "label another value, often 255"
        )
    if args.ignore_padding and PADDED in (args.ignore_index, *range(args.num_classes)):
        raise FlagError(
            f"--ignore_padding: it needs the label {PADDED}, which is a class or --ignore_index; leave it out"
        )
    for name, wanted in ((f"--amp {args.amp}", args.amp != "off"), ("--compile", args.compile)):
        if args.winograd and wanted:
            raise FlagError(f"--winograd with {name}: it has compiled loops of its own, in float32; choose one")


def check_annotations(args, given):
    """FlagError where a flag says again, or otherwise, what the labels of --annotations say."""
    for name in ("labelnum", "labeled_draw", "unlabeled_root"):
        if name in given or (name == "unlabeled_root" and getattr(args, name, None)):
            raise FlagError(f"--{name} with --annotations, which says which cases have labels: leave one out")
    if args.labelnum == 0:
        raise FlagError("--annotations in pretraining, which looks at no label: leave it out")
    if args.ignore_index not in (None, 255):
        raise FlagError(f"--ignore_index {args.ignore_index} with --annotations, whose labels have 255: leave it out")


def check_finetuning(args):
    """FlagError where flags of fine-tuning contradict each other. --lr_schedule sawtooth sets --freeze."""
    from mtseg.optim import sawtooth_end  # not above: PyTorch takes seconds, and --help is answered before

    schedule, end = args.lr_schedule, sawtooth_end(args.max_iterations)
    if schedule in ("warmup", "sawtooth") and args.warmup_iterations:
        raise FlagError(f"--warmup_iterations with --lr_schedule {schedule}, which has a rise of its own: leave it out")
    if schedule == "sawtooth":
        if args.freeze and (args.freeze, args.unfreeze_at) != ("encoder", end):
            raise FlagError(f"--freeze {args.freeze} with --lr_schedule sawtooth, which freezes the encoder: take one")
        args.freeze, args.unfreeze_at = "encoder", end
    taught = getattr(args, "teacher_checkpoint", None) and args.teacher_checkpoint_for != "teacher"
    if args.freeze and not (args.pretrained or taught):
        raise FlagError(
            f"--freeze {args.freeze} without --pretrained: weights that were drawn by lot would stay; give FILE"
            if schedule != "sawtooth"
            else "--lr_schedule sawtooth without --pretrained: it freezes an encoder that has learned; give FILE"
        )
    if args.freeze and args.from_scratch and args.unfreeze_at is None:
        raise FlagError(
            f"--freeze {args.freeze} with --from_scratch: weights that were drawn by lot would stay; leave --freeze out"
        )
    if (args.unfreeze_at or 0) >= args.max_iterations:
        raise FlagError(
            f"--unfreeze_at {args.unfreeze_at} is not below --max_iterations {args.max_iterations}; lower it"
        )


def check_pretext(args):
    """FlagError where the flags of pretraining contradict each other."""
    from mtseg.masking import hidden_count  # not above: PyTorch takes seconds, and --help is answered before

    if args.labelnum:
        raise FlagError(f"--labelnum {args.labelnum}: no label is looked at in pretraining; leave it out")
    for name in (name for name in NOT_IN_PRETRAINING if getattr(args, name)):
        raise FlagError(
            f"--{name} in pretraining, which has no labels, no Dice, no outputs on coarser levels and no frozen parts: "
            f"leave it out"
        )
    if args.lr_schedule == "plateau":
        raise FlagError("--lr_schedule plateau in pretraining, which has no Dice to go by: take another")
    if args.pretext != "masked" and args.sparse:
        raise FlagError(f"--sparse with --pretext {args.pretext}: only masked hides blocks; leave it out")
    if args.sparse and args.network.startswith(("dinov2", "convnext")):
        raise FlagError(f"--sparse with --network {args.network}: layer norms do not keep blocks hidden; leave it out")
    if args.sparse and args.gradient_checkpointing:
        raise FlagError("--sparse with --gradient_checkpointing, which would recompute without hiding: leave one out")
    if args.pretext != "masked":
        return
    if any(side % args.mask_block for side in args.patch_size):
        raise FlagError(
            f"--mask_block {args.mask_block} does not divide every side of --patch_size "
            f"{' '.join(map(str, args.patch_size))}: take one that does, such as {math.gcd(*args.patch_size, 16)}"
        )
    hidden, blocks = hidden_count(args.patch_size, args.mask_block, args.mask_ratio)
    if not 0 < hidden < math.prod(blocks):
        raise FlagError(
            f"--mask_ratio {args.mask_ratio} hides none or all of the {math.prod(blocks)} blocks of a patch: change it,"
            f" or take a smaller --mask_block"
        )


def check_network(args):
    """FlagError where flags ask for a network that there is not, or one whose strides do not divide the patch."""
    network, levels = f"--network {args.network}", 1 + len(args.strides or range(4))
    if args.residual and args.network != "unet":
        raise FlagError(f"--residual with {network}: only the blocks of unet can add their input")
    if args.deep_supervision and args.network != "unet":
        raise FlagError(f"--deep_supervision with {network}: only unet has outputs on coarser levels")
    for name in ("strides", "kernel_sizes", "max_filters"):
        if getattr(args, name) and args.network not in ("vnet", "unet"):
            raise FlagError(f"--{name} with {network}, whose sizes are given: take unet, or leave it out")
    if args.network == "vnet" and levels != 5:
        raise FlagError(f"--strides gives {levels - 1} and {network} downsamples four times: give 4, or take unet")
    for name, number in (("strides", levels - 1), ("kernel_sizes", levels), ("deep_supervision_weights", levels - 1)):
        values = getattr(args, name) or [1] * number
        if len(values) != number:
            raise FlagError(f"--{name} gives {len(values)} for {levels} levels of the network: give {number}")
        if wrong := [value for value in values if isinstance(value, list) and len(value) != args.dims]:
            raise FlagError(
                f"--{name} {','.join(map(str, wrong[0]))} with --dims {args.dims}: give {args.dims} numbers, or one"
            )
    if args.max_filters and args.max_filters < args.n_filters:
        raise FlagError(f"--max_filters {args.max_filters} is below --n_filters {args.n_filters}: raise it")
    check_network_fits(args.patch_size, divisors(args), args.network in ("vnet", "unet"))


def divisors(args):
    """For each axis the product of the network's strides: how many times smaller it is at the bottom."""
    if args.network in ENCODED:
        return [ENCODED[args.network]] * args.dims
    if is_own(args.network):
        return [1] * args.dims  # it says itself, once it is made
    strides = args.strides or [2] * 4
    return [math.prod(s[axis] if isinstance(s, list) else s for s in strides) for axis in range(args.dims)]


def check_network_fits(patch_size, divisors, takes_strides=False):
    """FlagError where a side of the patch is no multiple of the product of the network's strides along it."""
    for side, divisor in zip(patch_size, divisors, strict=True):
        if side % divisor:
            raise FlagError(
                f"--patch_size {' '.join(map(str, patch_size))}: {side} is no positive multiple of {divisor}, the "
                f"product of the network's strides along that axis; change it{', or --strides' * takes_strides}"
            )


def check_dims(args):
    """FlagError where flags do not fit the number of dimensions."""
    if len(args.patch_size) != args.dims:
        raise FlagError(
            f"--patch_size {' '.join(map(str, args.patch_size))} with --dims {args.dims}: give {args.dims} numbers of "
            f"{'pixels' if args.dims == 2 else 'voxels'}"
        )
    for name, value in (("resize", args.resize), ("context", args.context)):
        if args.dims == 3 and value:
            raise FlagError(f"--{name} with --dims 3: it is about the slices of stacks, which --dims 2 trains on")
    if args.dims == 2 and args.slices_first:
        raise FlagError("--slices_first with --dims 2: slices are found without it; it is about volumes")
    if args.network in ENCODED and args.dims != 2:
        raise FlagError(f"--network {args.network} takes images and slices: give --dims 2, or take vnet or unet")


def check_class_numbers(args):
    """FlagError where --ignore_index and --num_classes do not fit each other, or the data's classes."""
    ignored, several = f"--ignore_index {args.ignore_index}", f"--num_classes {args.num_classes}"
    if args.ignore_index is not None and not 0 <= args.ignore_index <= 255:
        raise FlagError(f"{ignored}: labels are numbers from 0 to 255; take one, often 255")
    if args.ignore_index in range(0 if args.background is None else 1, args.num_classes):
        raise FlagError(
            f"{ignored} is a foreground class of {several}: it would never be learned; give the value of voxels that "
            f"are not labelled, often 255"
        )
    if args.ignore_index == 0 and args.num_classes == 2:
        raise FlagError(
            f"{ignored} with {several}: one class would be left, which nothing is told apart from, so that every Dice "
            f"is 100; give the value of voxels that are not labelled, often 255"
        )
    if args.classes and args.classes.get("ignore") is not None and args.ignore_index != 255:
        raise FlagError(
            f"{ignored}, but classes.json names the value {args.classes['ignore']} that is to be ignored, which "
            f"becomes 255: leave the flag out"
        )
    names = [entry["name"] for entry in args.classes["classes"]] if args.classes else None
    if names and len(names) != args.num_classes:
        raise FlagError(f"{several}, but the data has {len(names)} classes ({', '.join(names)}): leave the flag out")


def check_used(args, given, terms):
    """FlagError where a flag would change nothing, since another one, which it belongs to, is not set.

    What the command line gives must be used. A settings file may hold every flag of another run; of those, only what
    is off by default and was turned on must be.
    """
    sgd, schedule, masked = args.optimizer == "sgd", args.lr_schedule, getattr(args, "pretext", "masked") == "masked"
    rules = {
        "momentum": (sgd, "--optimizer sgd"),
        "nesterov": (sgd, "--optimizer sgd"),
        "betas": (not sgd, "--optimizer adam or adamw"),
        "lr_step": (schedule in ("step", "exponential", "cosine_restarts"), "a --lr_schedule that has steps"),
        "lr_gamma": (schedule in ("step", "exponential", "plateau"), "--lr_schedule step, exponential or plateau"),
        "lr_power": (schedule in ("poly", "warmup", "sawtooth"), "--lr_schedule poly, warmup or sawtooth"),
        "lr_patience": (schedule == "plateau", "--lr_schedule plateau"),
        "class_weights": (terms.keys() & {"ce", "focal"}, "ce or focal in --loss"),
        "in_plane": (
            any(getattr(args, f"strong_{name}", 0) for name in ("rotation", "scaling", "elastic")),
            "--strong_rotation, --strong_scaling or --strong_elastic",
        ),
        "deep_supervision_weights": (args.deep_supervision, "--deep_supervision"),
        "val_freq": (args.val_list, "--val_list"),
        "patience": (args.val_list, "--val_list"),
        "consistency_rampup": (getattr(args, "consistency_ramp", "") != "constant", "another --consistency_ramp"),
        "pretrained_parts": (args.pretrained, "--pretrained"),
        "from_scratch": (args.pretrained, "--pretrained"),
        "unfreeze_at": (args.freeze, "--freeze"),
        "teacher_checkpoint_for": (getattr(args, "teacher_checkpoint", None), "--teacher_checkpoint"),
        "mask_ratio": (masked and getattr(args, "paste", True), "--pretext masked" if not masked else "--paste"),
        "mask_block": (masked, "--pretext masked"),
        "largest_component": (getattr(args, "targets", "hard") == "hard", "--targets hard"),
    }
    for name, (used, needed) in rules.items():
        value = getattr(args, name, None)
        if (name in OFF_BY_DEFAULT or name in given) and value not in (None, False) and not used:
            raise FlagError(f"--{name} without {needed} changes nothing: add that, or leave --{name} out")


def check_cases(args, n_cases):
    """FlagError where the cases to learn from without labels are too few for a batch."""
    if args.dims == 3 and n_cases < args.batch_size:
        raise FlagError(f"--batch_size {args.batch_size} is more than the {n_cases} cases to learn from: lower it")


def check_one_stream(args, n_cases):
    """FlagError where the labelled cases, the first of `n_cases` in train.list, are too few."""
    if args.labelnum > n_cases:
        raise FlagError(
            f"--labelnum {args.labelnum} is more than the {n_cases} training cases of "
            f"{Path(args.root_path) / 'train.list'}: take fewer"
        )
    if args.labelnum < args.batch_size and args.dims == 3 and not args.annotations:
        raise FlagError(f"--labelnum {args.labelnum} is less than --batch_size {args.batch_size}: lower the latter")


def check_two_streams(args, n_cases, n_unlabeled):
    """FlagError where labelled and unlabelled cases, `n_cases` in train.list and `n_unlabeled` of its own, are too few
    for the batches that --labeled_bs and --batch_size ask for."""
    if not 0 < args.labeled_bs < args.batch_size:
        raise FlagError(
            f"--labeled_bs {args.labeled_bs} with --batch_size {args.batch_size}: a batch holds labelled and "
            f"unlabelled patches, so --labeled_bs is at least 1 and less than --batch_size"
        )
    left, train_list = n_cases - args.labelnum + n_unlabeled, Path(args.root_path) / "train.list"
    if left <= 0 or args.labelnum > n_cases:
        raise FlagError(
            f"--labelnum {args.labelnum} leaves nothing unlabelled of the {n_cases} training cases of {train_list}: "
            f"take fewer, or use train_sup.py, which needs no unlabelled cases"
        )
    if args.dims == 2 or args.annotations:
        return  # a batch holds several slices of a stack, or patches of an image or of a volume that has few labels
    if args.labelnum < args.labeled_bs:
        raise FlagError(f"--labelnum {args.labelnum} is less than --labeled_bs {args.labeled_bs}: lower the latter")
    if left < args.batch_size - args.labeled_bs:
        raise FlagError(
            f"--labelnum {args.labelnum} leaves {left} cases unlabelled, fewer than the "
            f"{args.batch_size - args.labeled_bs} of a batch: lower --labelnum or --batch_size"
        )


def check_pairs(args, world_size, views_together=False):
    """FlagError where the unlabelled patches of a process, which are mixed in pairs, are an odd number; with
    `views_together`, also where --accumulation_steps would divide its labelled patches or its pairs unequally."""
    sizes = f"--batch_size {args.batch_size} with --labeled_bs {args.labeled_bs}"
    labeled, unlabeled = args.labeled_bs // world_size, (args.batch_size - args.labeled_bs) // world_size
    if unlabeled % 2:
        raise FlagError(
            f"{sizes}: unlabelled patches are taken in pairs, so there must be an even number of them, not "
            f"{unlabeled}{' in each process' if world_size > 1 else ''}; change --batch_size"
        )
    if views_together and (labeled % args.accumulation_steps or unlabeled // 2 % args.accumulation_steps):
        raise FlagError(
            f"--accumulation_steps {args.accumulation_steps}, {sizes}: it must divide the {labeled} labelled patches "
            f"and the {unlabeled // 2} pairs of unlabelled ones; change one of them"
        )


def check_normalization(args, patches):
    """FlagError where a batch of `patches` patches leaves one voxel a channel at the bottom, which has no variance."""
    voxels = math.prod(side // divisor for side, divisor in zip(args.patch_size, divisors(args), strict=True))
    voxels = 1 if args.network.endswith("_deeplab") and args.normalization == "batchnorm" else voxels  # their mean
    together = {"batchnorm": patches, "instancenorm": 1}.get(args.normalization, 0)  # patches with one variance
    if voxels * together == 1:
        raise FlagError(
            f"--patch_size {' '.join(map(str, args.patch_size))} with --normalization {args.normalization} and "
            f"{patches} patches at a time: one voxel is left at the bottom of the network, which has no variance; take "
            f"larger patches or groupnorm"
        )
