"""Mean Teacher with pseudo-labels: what the teacher is sure of on unlabelled patches are labels for the student.

    python recipes/train_pseudo_label.py --labelnum 16 --root_path /data/LA --strong_rotation 15 --strong_noise 0.1
    python inference.py --model_path model/LA_vnet_16_labeled/PL/iter_6000.pth

Lee, "Pseudo-Label", ICML workshop 2013, with the threshold of FixMatch (Sohn et al., NeurIPS 2020, arXiv:2001.07685)
and the teacher of Tarvainen and Valpola (arXiv:1703.01780). It differs from train_mean_teacher.py in the loss on
unlabelled patches alone: the supervised loss on pseudo-labels stands for the distance of outputs, with the same ramp.
"""

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="PL", unlabeled=True, teacher=True, strong_views=True)
flag, rare = PARSER.group("pseudo-labels")
flag("--ema_decay", type=flags.fraction, default=0.99, help="share of the teacher that an update keeps")
flag("--consistency", type=flags.rate, default=0.1, help="weight of the loss on pseudo-labels after its ramp")
flag("--consistency_rampup", type=flags.rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
flag("--pseudo_threshold", type=flags.fraction, default=0.8, help="the teacher's probability that makes a label")
flag("--pseudo_entropy", type=flags.fraction, help="largest entropy of a voxel, as a share of log(classes)")
outside = "patches whose share of pseudo-foreground lies outside are not used"
flag("--pseudo_foreground", type=flags.fraction, nargs=2, metavar=("MIN", "MAX"), help=outside)
flags.answer_help(PARSER, __name__)

import copy

import torch

from mtseg.augment import strong_view
from mtseg.datasets import UNKNOWN
from mtseg.ema import relative_distance, update_ema_variables
from mtseg.pseudo import pseudo_label_statistics, pseudo_labels
from mtseg.ramps import consistency_weight, sigmoid_rampup
from mtseg.script import build
from mtseg.script.run import script_main


def train(args, run):
    if args.pseudo_foreground and args.pseudo_foreground[0] > args.pseudo_foreground[1]:
        raise flags.FlagError("--pseudo_foreground {} {}: MIN is above MAX; swap them".format(*args.pseudo_foreground))
    if args.pseudo_foreground and args.background is None:
        raise flags.FlagError("--pseudo_foreground where no class is the background: leave it out")
    # ------------------------------------------------------------------------------ data, student, teacher, optimizer
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels)
    ema_model = copy.deepcopy(model).requires_grad_(False)
    ema_start = build.load_teacher_checkpoint(args, run, model, ema_model)
    student, teacher = build.make_forward(args, run, model), build.make_forward(args, run, ema_model)
    updater = build.make_updater(args, run, model.parameters())
    strengths = build.make_strengths(args)
    supervised, pseudo_supervised = (build.make_supervised(args, run, unknown) for unknown in (False, True))
    labeled_bs, unknown = data.labeled_bs, data.unknown
    limits = (args.pseudo_threshold, args.pseudo_entropy, args.pseudo_foreground, unknown)
    ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model, "teacher": ema_model}, updater):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            labeled, unlabeled, hidden = volume[:labeled_bs], volume[labeled_bs:], run.hidden[labeled_bs:]
            noise = torch.clamp(torch.randn_like(unlabeled) * 0.1, -0.2, 0.2)
            known = {"ignore_index": unknown, "inside": run.inside[labeled_bs:] if args.ignore_padding else None}
            view = strong_view(unlabeled, strengths, hidden, labeled, **known)
            with run.autocast:
                outputs = student(torch.cat([labeled, view.image]))
                with torch.no_grad():
                    target = teacher(unlabeled + noise)[0]

            # Losses are those of the joint batch of all processes, where torchrun started several.
            labeled_outputs = run.joint([level[:labeled_bs] for level in outputs])
            supervised_loss, parts = supervised(labeled_outputs, run.joint(label[:labeled_bs]))
            target, seen = run.joint(view.align(target))
            known = pseudo_labels(target, *limits, seen[:, 0])
            pseudo_loss, _ = pseudo_supervised(run.joint([level[labeled_bs:] for level in outputs]), known)
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + weight * pseudo_loss
            # The hidden labels serve to watch the pseudo-labels, nothing else: where there are none, they are UNKNOWN.
            hidden = run.joint(view.labels.masked_fill(view.labels == UNKNOWN, unknown))

            updater.step(loss)
            alpha = args.ema_decay * sigmoid_rampup(iteration - 1, args.ema_rampup)
            update_ema_variables(model, ema_model, alpha, ema_start + iteration - 1, args.ema_buffers)
            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": supervised_loss}
            row |= {"consistency_weight": weight, "pseudo_loss": pseudo_loss}
            row |= pseudo_label_statistics(known, hidden, unknown)
            run.end_iteration(**row, teacher_distance=relative_distance(model, ema_model))


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
