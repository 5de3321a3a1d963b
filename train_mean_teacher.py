"""Mean Teacher: a student learns from few labels, and agrees with a teacher, the average of its own past weights.

    python train_mean_teacher.py --labelnum 25                          # LA in data/LA, or the built-in Phantom data
    python train_mean_teacher.py --labelnum 16 --root_path /data/LA     # train.list, test.list and data/ lie there
    python train_mean_teacher.py --labelnum 16 --root_path /data/LA --resume      # go on after an interruption
    torchrun --standalone --nproc_per_node=2 train_mean_teacher.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_25_labeled/MT/iter_6000.pth    # the table of test metrics

Tarvainen and Valpola, NeurIPS 2017 (arXiv:1703.01780); on volumes as in UA-MT (Yu et al., MICCAI 2019,
arXiv:1907.07034), without its uncertainty mask. The last iteration is the result; no checkpoint is selected.
"""

import copy
from dataclasses import astuple

from mtseg.script import flags

PARSER = flags.teacher_parser(__doc__, model="MT")
flags.answer_help(PARSER, __name__)

import torch

from mtseg import losses
from mtseg.augment import strong_view
from mtseg.ema import relative_distance, update_ema_variables
from mtseg.ramps import consistency_weight, sigmoid_rampup
from mtseg.script import build
from mtseg.script.run import script_main

DISTANCES = {"mse": losses.softmax_mse_loss, "kl": losses.softmax_kl_loss, "ce": losses.softmax_ce_loss}
COLUMNS = ["supervised_loss", "consistency_weight", "consistency_dist", "phase", "teacher_distance"]


def train(args, run):
    # ------------------------------------------------------------------------------ data, student, teacher, optimizer
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels)
    # The teacher stays in train() mode, as the student does: with dropout, and batch norm over its own batches.
    ema_model = copy.deepcopy(model).requires_grad_(False)
    ema_start = build.load_teacher_checkpoint(args, run, model, ema_model)
    student, teacher = build.make_forward(args, run, model), build.make_forward(args, run, ema_model)
    updater = build.make_updater(args, run, model.parameters())

    # -------------------------------------------------------------------------------------------------------- losses
    strengths, distance = build.make_strengths(args), DISTANCES[args.consistency_type]
    masked = any(astuple(strengths)) or args.consistency_threshold > 0
    labeled_bs, own_labeled, ignored = data.labeled_bs, data.own_labeled, data.ignore_index
    compare_all = args.consistency_on == "all"
    first = 0 if compare_all else own_labeled  # the patches from here on are compared
    supervised = build.make_supervised(args, run, ignored if masked and compare_all else args.ignore_index)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model, "teacher": ema_model}, updater, COLUMNS):
        for iteration, volume, label in run.batches(data):
            compared = volume[first:]
            noise = torch.clamp(torch.randn_like(compared) * 0.1, -0.2, 0.2)
            pasted = volume[:own_labeled] if strengths.mixin else None
            view = strong_view(compared, strengths, label[first:], pasted, ignore_index=ignored)
            with run.autocast:
                outputs = student(torch.cat([volume[:first], view.image]))
                with torch.no_grad():
                    target = teacher(compared + noise)[0]

            # With torchrun, what follows is computed on the joint batch of all processes, labelled patches first.
            label = run.joint(torch.cat([label[:first], view.labels])[:own_labeled])
            outputs = run.joint(outputs, own_labeled)
            target, seen = run.joint(view.align(target), own_labeled - first)

            supervised_loss, parts = supervised([output[:labeled_bs] for output in outputs], label)
            compared_outputs = outputs[0] if compare_all else outputs[0][labeled_bs:]
            if masked:
                sure = losses.confidence_mask(target, args.consistency_threshold).unsqueeze(1)
                distances = distance(compared_outputs, target, reduction="none")
                consistency_dist = losses.masked_mean(distances, seen & sure)
            else:
                consistency_dist = distance(compared_outputs, target)
            ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + weight * consistency_dist

            run.check_loss(loss)
            updater.step(loss)
            alpha = args.ema_decay * sigmoid_rampup(iteration - 1, args.ema_rampup)
            update_ema_variables(model, ema_model, alpha, ema_start + iteration - 1, args.ema_buffers)
            row = {"loss": loss, "supervised_loss": supervised_loss, **parts, "phase": phase}
            row |= {"consistency_weight": weight, "consistency_dist": consistency_dist}
            run.end_iteration(**row, teacher_distance=relative_distance(model, ema_model))


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
