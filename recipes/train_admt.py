"""AD-MT: two teachers, of which one at a time follows the student, label unlabelled patches together.

    python recipes/train_admt.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_16_labeled/ADMT/iter_15000.pth

Zhao et al., "Alternate Diverse Teaching for Semi-supervised Medical Image Segmentation", ECCV 2024 (arXiv:2311.17325).
The teachers take turns of random length; in the first one's the student sees an intensity view (as in the code with
noise of volumes and blur of images), in the second one's patches with a box of another. With the teachers'
probabilities p1, p2 and their entropies H1, H2 in bits,
    q = v p1 + (1 - v) p2,  v = exp(-H1) / (exp(-H1) + exp(-H2)),  y = argmax q where max q >= t,  L = L_s + w CE(p, y);
but where the teachers differ and the student is surer of another class, y is that. As in the code, and not the paper,
such conflicts weigh no more than other voxels.
"""

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="ADMT", unlabeled=True, teacher=True)
PARSER.set_defaults(max_iterations=15000, lr_schedule="poly", ema_buffers=True)
flag, rare = PARSER.group("alternate diverse teaching")
flag("--ema_decay", type=flags.fraction, default=0.99, help="share of the teacher that an update keeps")
flag("--consistency", type=flags.rate, default=2.0, help="weight of the loss on pseudo-labels after its ramp")
flag("--consistency_rampup", type=flags.rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
flag("--pseudo_threshold", type=flags.fraction, default=0.8, help="the probability that makes a label")
flag("--pseudo_loss", choices=("ce", "dice"), default="ce", help="loss on pseudo-labels; dice counts all classes")
flag(
    "--longest_turn", type=flags.positive, default=19, help="iterations after which the teachers change, at the latest"
)
rare("--ema_copies", type=flags.natural, default=80, help="iterations in which the teacher is a copy of the student")
flags.answer_help(PARSER, __name__)

import copy

import torch

from mtseg.augment import intensity_view
from mtseg.ema import relative_distance, update_ema_variables
from mtseg.losses import SupervisedLoss
from mtseg.mixing import centred_boxes
from mtseg.pseudo import pseudo_label_statistics, settled_labels
from mtseg.ramps import consistency_weight, sigmoid_rampup
from mtseg.script import build
from mtseg.script.run import script_main

VIEWS = {2: {"blur": 2.0, "shares": (0.8, 0.2, 0.0)}, 3: {"noise": 1.0}}  # of intensity_view, by dimensions


def turns(longest, iterations, seed):
    """Whose turn it is in each iteration, 0 or 1, for 1 to `longest` iterations at a time; by the seed alone."""
    lengths = torch.randint(1, longest + 1, (iterations,), generator=torch.Generator().manual_seed(seed % 2**63))
    return (torch.arange(iterations) % 2).repeat_interleave(lengths)[:iterations].tolist()


def train(args, run):
    flags.check_pairs(args, run.ranks.world_size)
    # ----------------------------------------------------------------------------- data, student, teachers, optimizer
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels)
    ema_model = copy.deepcopy(model).requires_grad_(False)
    ema_start = build.load_teacher_checkpoint(args, run, model, ema_model)
    ema_models = [ema_model, copy.deepcopy(ema_model)]
    student, *teachers = (build.make_forward(args, run, net) for net in (model, *ema_models))
    updater = build.make_updater(args, run, model.parameters())
    supervised = build.make_supervised(args, run)
    pseudo_supervised = SupervisedLoss(args.pseudo_loss, ignore_index=data.unknown, include_background=True)
    labeled_bs, ramp = data.labeled_bs, (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)
    turn = turns(args.longest_turn, args.max_iterations, args.seed)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model, "teacher": ema_models[0], "teacher_two": ema_models[1]}, updater):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            weak, active = volume[labeled_bs:], turn[iteration - 1]
            strong = weak if active else intensity_view(weak, brightness=0.5, contrast=0.5, **VIEWS[args.dims])
            box = centred_boxes(len(weak), weak.shape[2:], run.device) & (active == 1)
            strong = torch.where(box, strong.roll(1, 0), strong)
            for number, ema_model in enumerate(ema_models):
                ema_model.train(number == active)
            with run.autocast:
                outputs = student(torch.cat([volume, strong]))
                with torch.no_grad():
                    targets = [teacher(weak)[0] for teacher in teachers]
            own, learned = outputs[0][labeled_bs:].chunk(2)
            known, conflict = settled_labels(*targets, own, args.pseudo_threshold, data.unknown)
            known = run.joint(torch.where(box[:, 0], known.roll(1, 0), known))
            labeled_outputs = run.joint([level[:labeled_bs] for level in outputs])
            supervised_loss, parts = supervised(labeled_outputs, run.joint(label[:labeled_bs]))
            pseudo_loss, _ = pseudo_supervised(run.joint(learned), known)
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + weight * pseudo_loss

            updater.step(loss)
            alpha = args.ema_decay * sigmoid_rampup(iteration - 1, args.ema_rampup)
            step = ema_start + max(iteration - 1 - args.ema_copies, 0) // 2
            update_ema_variables(model, ema_models[active], alpha, step, args.ema_buffers)
            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": supervised_loss}
            row |= {"consistency_weight": weight, "pseudo_loss": pseudo_loss, "active_teacher": active + 1}
            row |= {"conflict_share": conflict.float().mean(), **pseudo_label_statistics(known, None, data.unknown)}
            run.end_iteration(**row, teacher_distance=relative_distance(model, ema_models[active]))


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
