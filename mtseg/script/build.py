"""Networks, losses and optimizer as the flags of a training script ask for them. Nothing here is a method."""

import torch

from mtseg.augment import Strengths
from mtseg.checkpoint import load_checkpoint, load_fitting, load_weights
from mtseg.finetuning import FinetuningError, freeze, learning_rates, names_of, take_norms
from mtseg.losses import SupervisedLoss, levels
from mtseg.memory import InParts, checkpoint_blocks
from mtseg.networks import initialize_kaiming
from mtseg.optim import Schedule, Updater, gradient_scaler, make_optimizer
from mtseg.samplers import IterationSampler
from mtseg.script import fast, flags
from mtseg.script.data import read_data, unknown_label  # noqa: F401 (scripts call build.read_data)
from mtseg.script.networks import check_own, check_stages, load_pretrained, network_class
from mtseg.seeding import seed_iteration
from mtseg.winograd import left_to_pytorch

STATISTICS_FROM = 50  # batches, for statistics that are estimated anew
# What the log says of --pretrained_parts.
WEIGHTS_OF = {"encoder": "of its encoder; the decoder starts anew", "network": "of the whole network"}
WEIGHTS_OF["all"] = "of all but its last layer, which starts anew"
MEMORY = {2: torch.channels_last, 3: torch.channels_last_3d}  # of networks, by the number of dimensions


def make_network(args, run, n_channels, n_classes=None):
    """The network of the flags, on the run's device; a script may make several, each with its own initial weights.
    `n_classes`: instead of --num_classes."""
    net = new_network(args, n_channels, n_classes)
    if flags.is_own(args.network):
        check_own(net, args.patch_size, n_channels, n_classes or args.num_classes)
        for name in sorted(net.not_taken & {word.partition("=")[0].removeprefix("--") for word in run.command}):
            note = f"--{name} {getattr(args, name)} changes nothing: {args.network} does not take it"
            run.notes += [] if note in run.notes else [note]
    check_stages(args, net)
    net = prepare(args, run, net)
    if args.pretrained and not args.from_scratch and run.resume_from is None:
        weights, encoder = load_pretrained(args.pretrained), names_of(net, "encoder")
        loaded, left_out = load_fitting(net, weights, args.pretrained, names_of(net, args.pretrained_parts), encoder)
        headless = args.pretrained_parts == "all" and not hasattr(net, "head")
        which = "of the whole network, which names no head" if headless else WEIGHTS_OF[args.pretrained_parts]
        run.notes.append(f"--pretrained {args.pretrained}: {loaded} weights {which}")
        run.notes += left_out
        run.descend(args.pretrained, args.pretrained_parts, loaded, len(left_out))
    run.rates |= learning_rates(net, args.encoder_lr_factor, args.layer_decay)
    if args.freeze:
        try:
            freeze(net, args.freeze)
        except FinetuningError as error:
            raise flags.FlagError(f"--freeze {error}") from error
        run.frozen += [parameter for parameter in net.parameters() if not parameter.requires_grad]
    if args.winograd:
        left = "; ".join(f"{name} ({why})" for name, why in left_to_pytorch(net).items())
        note = f"--winograd leaves to PyTorch: {left}"
        run.notes += [] if note in run.notes else [note]
    return net


def new_network(args, n_channels, n_classes=None):
    """The network of the flags, on the CPU."""
    settings = flags.network_settings(args, n_channels) | ({"n_classes": n_classes} if n_classes else {})
    return network_class(args.network)(**settings)


def prepare(args, run, net):
    """`net`, a network or a further decoder of one, with the initial weights, on the device, in the memory format and
    with the convolutions of the flags."""
    if args.init == "kaiming":
        initialize_kaiming(net)
    net = net.to(run.device, memory_format=MEMORY[args.dims] if args.channels_last else torch.preserve_format)
    return fast.convolutions(args, net)


def load_teacher_checkpoint(args, run, model, ema_model):
    """Take over --teacher_checkpoint. Returns the step from which the teacher's updates count: 0, so that the first
    are the average of the students so far; or, for a teacher that has learned before, so late that it stays."""
    if args.teacher_checkpoint and run.resume_from is None:
        for name, net in (("student", model), ("teacher", ema_model)):
            if args.teacher_checkpoint_for in (name, "both"):
                load_weights(net, load_checkpoint(args.teacher_checkpoint, run.device), args.teacher_checkpoint)
        run.descend(args.teacher_checkpoint, "network", len(net.state_dict()))
    return 10**6 if args.teacher_checkpoint and args.teacher_checkpoint_for != "student" else 0


def make_forward(args, run, net):
    """A function of a batch that gives the outputs of `net` as a list, the finest level first.

    Of a network with gradients: in parts, recomputed and over several processes, as the flags say. Make copies of a
    network before, not after.
    """
    if any(parameter.requires_grad for parameter in net.parameters()):
        forward = checkpoint_blocks(net) if args.gradient_checkpointing else net
        forward = InParts(compiled(forward) if args.compile else forward, args.accumulation_steps)
        forward = run.ranks.wrap(forward)
    else:
        forward = compiled(net) if args.compile else net
    return lambda batch: levels(forward(batch))


def compiled(net):
    """torch.compile of `net` with the dropout masks that eager mode draws."""
    return torch.compile(net, options={"fallback_random": True})


def make_supervised(args, run, unknown=False):
    """The supervised loss of the flags, losses.SupervisedLoss. Voxels with the label --ignore_index take no part, nor,
    with `unknown`, those with the label `Data.unknown`: give it where labels are pseudo-labels or of strong views."""
    no_background = args.background is None  # what is padded has no label then
    unknown = unknown or no_background or args.ignore_padding
    ignore_index = unknown_label(args) if unknown else args.ignore_index
    weights = args.deep_supervision_weights
    return SupervisedLoss(args.loss, args.class_weights, ignore_index, weights, no_background).to(run.device)


def make_updater(args, run, parameters, hold=0):
    """Optimizer, schedule, scaler and clipping of the flags, for `parameters` of one or several networks. The schedule
    begins after `hold` iterations."""
    if hold and args.lr_schedule in ("warmup", "sawtooth"):
        raise flags.FlagError(
            f"--lr_schedule {args.lr_schedule} would begin after {hold} iterations at the whole rate: take another"
        )
    groups = {1.0: []}  # by the factor of their learning rate; the one that the log has is the first
    for parameter in parameters:
        groups.setdefault(run.rates.get(parameter, 1.0), []).append(parameter)
    groups = [{"params": group, "lr": factor * args.base_lr} for factor, group in groups.items() if group]
    optimizer = make_optimizer(
        args.optimizer, groups, args.base_lr, args.momentum, args.nesterov, args.weight_decay, args.betas
    )
    settings = (args.lr_step, args.lr_gamma, args.lr_power, args.lr_patience, args.warmup_iterations, hold)
    schedule = Schedule(optimizer, args.lr_schedule, args.max_iterations, *settings)
    return Updater(optimizer, schedule, gradient_scaler(run.device, args.amp), args.gradient_clipping)


def make_strengths(args):
    """The Strengths of the strong views that the flags ask for."""
    strengths = {name[7:]: value for name, value in vars(args).items() if name.startswith("strong_")}
    return Strengths(**strengths, in_plane=args.in_plane)


def held_out_loss(args, run, data, net, errors):
    """The mean of `errors`, a function of images that gives their errors by `net`, over data.held_out, in eval mode."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # hides the same every time
        net.eval()
        values = [errors(part.to(run.device)) for part in data.held_out.split(args.batch_size)]
        net.train()
    return torch.cat(values).mean()


def ready_to_start_from(args, run, data, net):
    """After the last iteration of pretraining: make `net` one that learns on at the usual rates, with the norms of new
    weights, and its batch norms' statistics those of the first batches as they are, where it has seen altered ones."""
    if run.iteration < args.max_iterations:
        return
    seed_iteration(args.seed, -1)
    fresh = new_network(args, data.n_channels, data.n_channels)
    if args.init == "kaiming":
        initialize_kaiming(fresh)
    take_norms(net, fresh)
    seed_iteration(args.seed, args.max_iterations + 1)  # of dropout
    batches = IterationSampler(data.sampler, args.seed, 0, STATISTICS_FROM)
    images = (torch.stack([data.train[index, seed]["image"] for index, seed in batch]) for batch in batches)
    torch.optim.swa_utils.update_bn(images, net, run.device)
