"""Mean Teacher: a student learns from few labels, and agrees with a teacher, the average of its own past weights.

    python train_mean_teacher.py --labelnum 25                          # LA in data/LA, or the built-in Phantom data
    python train_mean_teacher.py --labelnum 16 --root_path /data/LA     # train.list, test.list and data/ lie there
    python train_mean_teacher.py --labelnum 16 --root_path /data/LA --resume      # go on after an interruption
    python inference.py --model_path model/LA_vnet_25_labeled/MT/iter_6000.pth    # the table of test metrics

Tarvainen and Valpola, NeurIPS 2017 (arXiv:1703.01780); on volumes as in UA-MT (Yu et al., MICCAI 2019,
arXiv:1907.07034), without its uncertainty mask. The last iteration is the result; no checkpoint is selected.
"""

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="MT", unlabeled=True, teacher=True, strong_views=True)
flag, rare = PARSER.group("mean teacher")
flag("--ema_decay", type=flags.fraction, default=0.99, help="share of the teacher that an update keeps")
flag("--consistency", type=flags.rate, default=0.1, help="weight of the consistency loss after its ramp")
flag("--consistency_rampup", type=flags.rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
flag("--consistency_type", choices=("mse", "kl", "ce"), default="mse", help="distance of student and teacher")
rare("--consistency_on", choices=("unlabeled", "all"), default="unlabeled", help="patches that are compared")
rare("--consistency_threshold", type=flags.fraction, default=0, help="compare where the teacher is at least so sure")
flags.answer_help(PARSER, __name__)

import copy

import torch

from mtseg import losses
from mtseg.augment import strong_view
from mtseg.ema import relative_distance, update_ema_variables
from mtseg.ramps import consistency_weight, sigmoid_rampup
from mtseg.script import build
from mtseg.script.run import script_main

DISTANCES = {"mse": losses.softmax_mse_loss, "kl": losses.softmax_kl_loss, "ce": losses.softmax_ce_loss}


def train(args, run):
    # ------------------------------------------------------------------------------ data, student, teacher, optimizer
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels)
    # The teacher stays in train() mode, as the student does: with dropout, and batch norm over its own batches.
    ema_model = copy.deepcopy(model).requires_grad_(False)
    ema_start = build.load_teacher_checkpoint(args, run, model, ema_model)
    student, teacher = build.make_forward(args, run, model), build.make_forward(args, run, ema_model)
    updater = build.make_updater(args, run, model.parameters())
    strengths = build.make_strengths(args)
    masked = bool(strengths) or args.consistency_threshold > 0 or args.ignore_padding  # some voxels are not compared
    first = 0 if args.consistency_on == "all" else data.labeled_bs  # the patches from here on are compared
    # A strong view of a labelled patch has voxels without a label: out of view, or cut out.
    supervised = build.make_supervised(args, run, unknown=masked and first == 0)
    distance = DISTANCES[args.consistency_type]
    ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model, "teacher": ema_model}, updater):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            compared = volume[first:]
            noise = torch.clamp(torch.randn_like(compared) * 0.1, -0.2, 0.2)
            known = {"ignore_index": data.unknown, "inside": run.inside[first:] if args.ignore_padding else None}
            view = strong_view(compared, strengths, label[first:], volume[: data.labeled_bs], **known)
            with run.autocast:
                outputs = student(torch.cat([volume[:first], view.image]))
                with torch.no_grad():
                    target = teacher(compared + noise)[0]

            # Losses are those of the joint batch of all processes, where torchrun started several.
            label = run.joint(torch.cat([label[:first], view.labels])[: data.labeled_bs])
            supervised_loss, parts = supervised(run.joint([level[: data.labeled_bs] for level in outputs]), label)
            (target, seen), output = run.joint(view.align(target)), run.joint(outputs[0][first:])
            if masked:
                seen = seen & losses.confidence_mask(target, args.consistency_threshold).unsqueeze(1)
                consistency_dist = losses.masked_mean(distance(output, target, reduction="none"), seen)
            else:
                consistency_dist = distance(output, target)
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + weight * consistency_dist

            updater.step(loss)
            alpha = args.ema_decay * sigmoid_rampup(iteration - 1, args.ema_rampup)
            update_ema_variables(model, ema_model, alpha, ema_start + iteration - 1, args.ema_buffers)
            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": supervised_loss}
            row |= {"consistency_weight": weight, "consistency_dist": consistency_dist}
            row |= {"compared_share": seen.float().mean()} if masked else {}
            run.end_iteration(**row, teacher_distance=relative_distance(model, ema_model))


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
