"""Mean Teacher with pseudo-labels: what the teacher is sure of on unlabelled patches are labels for the student.

    python recipes/train_pseudo_label.py --labelnum 16 --root_path /data/LA --strong_rotation 15 --strong_noise 0.1
    python inference.py --model_path model/LA_vnet_16_labeled/PL/iter_6000.pth

Lee, "Pseudo-Label", ICML workshop 2013, with the threshold of FixMatch (Sohn et al., NeurIPS 2020, arXiv:2001.07685)
and the teacher of Tarvainen and Valpola (arXiv:1703.01780). It differs from train_mean_teacher.py in the loss on
unlabelled patches alone: the supervised loss on pseudo-labels stands for the distance of outputs, with the same ramp.
"""

import copy

from mtseg.script import flags

PARSER = flags.teacher_parser(__doc__, model="PL", compare=False)
flag = PARSER.add_argument_group("pseudo-labels").add_argument
flag("--pseudo_threshold", type=flags.fraction, default=0.8, help="the teacher's probability that makes a label")
flag("--pseudo_entropy", type=flags.fraction, help="largest entropy of a voxel, as a share of log(classes)")
within = "patches whose share of pseudo-foreground lies outside are not used"
flag("--pseudo_foreground", type=flags.fraction, nargs=2, metavar=("MIN", "MAX"), help=within)
flags.answer_help(PARSER, __name__)

import torch

from mtseg.augment import strong_view
from mtseg.datasets import UNKNOWN
from mtseg.ema import relative_distance, update_ema_variables
from mtseg.pseudo import pseudo_label_statistics, pseudo_labels
from mtseg.ramps import consistency_weight, sigmoid_rampup
from mtseg.script import build
from mtseg.script.run import script_main

COLUMNS = ["supervised_loss", "consistency_weight", "pseudo_loss", "phase", "teacher_distance", "pseudo_voxels_used"]
COLUMNS += ["pseudo_volumes_used", "pseudo_accuracy_monitoring_only"]


def train(args, run):
    if args.pseudo_foreground and args.pseudo_foreground[0] > args.pseudo_foreground[1]:
        raise flags.FlagError("--pseudo_foreground {} {}: MIN is above MAX; swap them".format(*args.pseudo_foreground))
    # ------------------------------------------------------------------------------ data, student, teacher, optimizer
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels)
    ema_model = copy.deepcopy(model).requires_grad_(False)
    ema_start = build.load_teacher_checkpoint(args, run, model, ema_model)
    student, teacher = build.make_forward(args, run, model), build.make_forward(args, run, ema_model)
    updater = build.make_updater(args, run, model.parameters())
    strengths = build.make_strengths(args)
    labeled_bs, own_labeled, ignored = data.labeled_bs, data.own_labeled, data.ignore_index
    supervised = build.make_supervised(args, run, args.ignore_index)
    pseudo_supervised = build.make_supervised(args, run, ignored)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model, "teacher": ema_model}, updater, COLUMNS):
        for iteration, volume, label, hidden in run.batches_with_hidden_labels(data):
            labeled, unlabeled = volume[:own_labeled], volume[own_labeled:]
            noise = torch.clamp(torch.randn_like(unlabeled) * 0.1, -0.2, 0.2)
            pasted = labeled if strengths.mixin else None
            view = strong_view(unlabeled, strengths, hidden[own_labeled:], pasted, ignore_index=ignored)
            with run.autocast:
                outputs = student(torch.cat([labeled, view.image]))
                with torch.no_grad():
                    target = teacher(unlabeled + noise)[0]
            target, seen = run.joint(view.align(target))
            outputs, label = run.joint(outputs, own_labeled), run.joint(label[:own_labeled])

            supervised_loss, parts = supervised([output[:labeled_bs] for output in outputs], label)
            limits = (args.pseudo_threshold, args.pseudo_entropy, args.pseudo_foreground, ignored)
            known = pseudo_labels(target, *limits).masked_fill(~seen[:, 0], ignored)
            pseudo_loss, _ = pseudo_supervised([output[labeled_bs:] for output in outputs], known)
            ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + weight * pseudo_loss
            # The hidden labels serve to watch the pseudo-labels, nothing else: where there are none, they are UNKNOWN.
            hidden = run.joint(view.labels.masked_fill(view.labels == UNKNOWN, ignored))
            statistics = pseudo_label_statistics(known, hidden, ignored)

            run.check_loss(loss)
            updater.step(loss)
            alpha = args.ema_decay * sigmoid_rampup(iteration - 1, args.ema_rampup)
            update_ema_variables(model, ema_model, alpha, ema_start + iteration - 1, args.ema_buffers)
            row = {"loss": loss, "supervised_loss": supervised_loss, **parts, "phase": phase, **statistics}
            row |= {"consistency_weight": weight, "pseudo_loss": pseudo_loss}
            run.end_iteration(**row, teacher_distance=relative_distance(model, ema_model))


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
