"""UA-MT: Mean Teacher that compares only where the teacher is certain, by the entropy of several noisy passes.

    python recipes/train_ua_mt.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_16_labeled/UAMT/iter_6000.pth

Yu et al., "Uncertainty-aware Self-ensembling Model for Semi-supervised 3D Left Atrium Segmentation", MICCAI 2019
(arXiv:1907.07034): equations 2 to 4. From train_mean_teacher.py it differs in the mask alone.
"""

import copy
import math

from mtseg.script import flags

PARSER = flags.teacher_parser(__doc__, model="UAMT", compare=False)
flag = PARSER.add_argument_group("uncertainty").add_argument
flag("--uncertainty_passes", type=flags.positive, default=8, help="noisy passes of the teacher, an even number")
flags.answer_help(PARSER, __name__)

import torch

from mtseg import losses
from mtseg.ema import relative_distance, update_ema_variables
from mtseg.ramps import consistency_weight, sigmoid_rampup
from mtseg.script import build
from mtseg.script.run import script_main

COLUMNS = ["supervised_loss", "consistency_weight", "consistency_dist", "phase", "teacher_distance"]
COLUMNS += ["uncertainty_threshold", "certain_share"]


def noisy(volume):
    return volume + torch.clamp(torch.randn_like(volume) * 0.1, -0.2, 0.2)


def train(args, run):
    # ------------------------------------------------------------------------------ data, student, teacher, optimizer
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels)
    ema_model = copy.deepcopy(model).requires_grad_(False)
    ema_start = build.load_teacher_checkpoint(args, run, model, ema_model)
    student, teacher = build.make_forward(args, run, model), build.make_forward(args, run, ema_model)
    updater = build.make_updater(args, run, model.parameters())
    supervised = build.make_supervised(args, run, args.ignore_index)
    labeled_bs, own_labeled = data.labeled_bs, data.own_labeled

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model, "teacher": ema_model}, updater, COLUMNS):
        for iteration, volume, label in run.batches(data):
            unlabeled = volume[own_labeled:]
            with run.autocast:
                outputs = student(volume)
                with torch.no_grad():
                    target = teacher(noisy(unlabeled))[0]
                    # Two copies at a time, as the authors' code: the teacher's batch norm sees both.
                    twice = torch.cat([unlabeled, unlabeled])
                    passes = [teacher(noisy(twice))[0].float().softmax(1) for _ in range(args.uncertainty_passes // 2)]
            mean = torch.stack(passes).unflatten(1, (2, len(unlabeled))).mean((0, 1))
            uncertainty = -(mean * torch.log(mean + 1e-6)).sum(1)

            outputs, label = run.joint(outputs, own_labeled), run.joint(label[:own_labeled])
            target, uncertainty = run.joint(target), run.joint(uncertainty)

            supervised_loss, parts = supervised([output[:labeled_bs] for output in outputs], label)
            ramp = 0.75 + 0.25 * sigmoid_rampup(iteration - 1, args.max_iterations)
            threshold = ramp * math.log(args.num_classes)  # of the largest entropy there can be
            certain = uncertainty < threshold
            distances = losses.softmax_mse_loss(outputs[0][labeled_bs:], target, reduction="none")
            consistency_dist = losses.masked_mean(distances, certain)
            ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + weight * consistency_dist

            run.check_loss(loss)
            updater.step(loss)
            alpha = args.ema_decay * sigmoid_rampup(iteration - 1, args.ema_rampup)
            update_ema_variables(model, ema_model, alpha, ema_start + iteration - 1, args.ema_buffers)
            row = {"loss": loss, "supervised_loss": supervised_loss, **parts, "phase": phase}
            row |= {"consistency_weight": weight, "consistency_dist": consistency_dist}
            row |= {"uncertainty_threshold": threshold, "certain_share": certain.float().mean()}
            run.end_iteration(**row, teacher_distance=relative_distance(model, ema_model))


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
