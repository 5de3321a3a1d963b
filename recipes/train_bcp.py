"""BCP, bidirectional copy-paste: boxes of labelled patches in unlabelled ones, and of unlabelled ones in labelled ones.

    python recipes/train_bcp.py --labelnum 8 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_8_labeled/BCP/iter_17000.pth

Bai et al., "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation", CVPR 2023 (arXiv:2305.00673),
section 3. M is 0 in a box, at a random place, and 1 around it. For --consistency_warmup iterations the student learns
from labels alone: S on a M + b (1 - M), S = (cross-entropy + Dice) / 2. Then it is the teacher, too, and the loss is
S(labelled voxels) + w S(unlabelled voxels), summed over both mixtures, l_a M + u_a (1 - M) and u_b M + l_b (1 - M).
Labels are mixed alike; those of u are the teacher's most probable classes, of each its largest component. Defaults are
those of the authors' code for LA, but the last iteration of each phase counts, not the best on the test cases.
"""

import argparse

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="BCP", unlabeled=True)
flag, rare = PARSER.group("bidirectional copy-paste")
flag("--ema_decay", type=flags.fraction, default=0.99, help="share of the teacher that an update keeps")
flag("--pseudo_weight", type=flags.rate, default=0.5, help="weight of unlabelled voxels; those with labels have 1")
flag("--mask_ratio", type=flags.fraction, default=2 / 3, help="share of each side that the pasted box takes")
flag("--largest_component", action=argparse.BooleanOptionalAction, default=True, help="of each class of pseudo-labels")
rare("--consistency_rampup", type=flags.rate, default=0.0, help="length of a ramp to it, in blocks of 150 iterations")
PARSER.set_defaults(max_iterations=17000, consistency_warmup=2000, consistency_ramp="constant")
PARSER.set_defaults(batch_size=8, labeled_bs=4, loss="ce:0.5,linear_dice:0.5", pretrained_parts="network")
flags.answer_help(PARSER, __name__)

import copy

import torch

from mtseg.ema import relative_distance, update_ema_variables
from mtseg.mixing import inner_box
from mtseg.postprocess import largest_components
from mtseg.ramps import consistency_weight
from mtseg.script import build
from mtseg.script.run import script_main


def paste(box, batch, both):
    """The mixtures of the quarters l_a, l_b, u_a, u_b of a batch; of l_a and l_b alone where it is not `both`."""
    a, b, u_a, u_b = batch.chunk(4)
    return torch.where(box, torch.cat([u_a, b]), torch.cat([a, u_b])) if both else torch.where(box, b, a)


def by_patch(supervised, outputs, label):
    """The supervised loss and its parts as means over patches: Dice is each patch's own, not the batch's."""
    each = [supervised([level[n : n + 1] for level in outputs], label[n : n + 1]) for n in range(len(label))]
    parts = {name: sum(parts[name] for _, parts in each) / len(each) for name in each[0][1]}
    return sum(loss for loss, _ in each) / len(each), parts


def train(args, run):
    size, labeled, halves = args.batch_size, args.labeled_bs, 2 * run.ranks.world_size
    if size != 2 * labeled or labeled % halves:
        raise flags.FlagError(f"--labeled_bs {labeled}, --batch_size {size}: take a multiple of {halves} and twice it")
    if args.labelnum < 2:
        raise flags.FlagError("--labelnum 1: labelled cases are pasted into one another; give at least 2")
    whole = args.pretrained and args.pretrained_parts != "encoder" and not args.from_scratch
    if not (args.consistency_warmup or whole):
        raise flags.FlagError("--consistency_warmup 0: the teacher would know nothing; raise it, or give --pretrained")
    flags.check_normalization(args, max(labeled // halves // args.accumulation_steps, 1))  # of the labels-only phase
    # ------------------------------------------------------------------------------ data, student, teacher, optimizer
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels)
    ema_model = copy.deepcopy(model).requires_grad_(False)
    student, teacher = build.make_forward(args, run, model), build.make_forward(args, run, ema_model)
    updater = build.make_updater(args, run, model.parameters(), hold=args.consistency_warmup)
    supervised = build.make_supervised(args, run, unknown=True)
    supervised.include_background = True
    clean = largest_components if args.largest_component and args.background == 0 else torch.clone
    ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model, "teacher": ema_model}, updater):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            weight, phase = consistency_weight(iteration, args.pseudo_weight, *ramp)
            both = phase != "warm-up"
            box, pseudo = inner_box(volume.shape[2:], args.mask_ratio, run.device), torch.full_like(label, data.unknown)
            with run.autocast:
                if both:
                    # max, since argmax takes 15 times as long on a CPU
                    pseudo[data.labeled_bs :] = clean(teacher(volume[data.labeled_bs :])[0].max(1).indices)
                outputs = run.joint(student(paste(box, volume, both)))

            supervised_loss, parts = by_patch(supervised, outputs, run.joint(paste(box[0], label, both)))
            pseudo_loss, _ = by_patch(supervised, outputs, run.joint(paste(box[0], pseudo, both)))
            loss = (1 + both) * (supervised_loss + weight * pseudo_loss)  # the sum of both mixtures' means

            updater.step(loss)
            update_ema_variables(model, ema_model, args.ema_decay if both else 0, 10**6, average_buffers=True)
            row = {"phase": phase, "supervised_loss": supervised_loss, "consistency_weight": weight}
            row |= {"pseudo_loss": pseudo_loss, "teacher_distance": relative_distance(model, ema_model)}
            run.end_iteration(loss=loss, **parts, **row)


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
