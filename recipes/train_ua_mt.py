"""UA-MT: Mean Teacher that compares only where the teacher is certain, by the entropy of several noisy passes.

    python recipes/train_ua_mt.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_16_labeled/UAMT/iter_6000.pth

Yu et al., "Uncertainty-aware Self-ensembling Model for Semi-supervised 3D Left Atrium Segmentation", MICCAI 2019
(arXiv:1907.07034), equations 2 and 3. It differs from train_mean_teacher.py in the mask alone. The uncertainty of a
voxel is the entropy u = -sum_c m_c log m_c of the mean m of the teacher's probabilities over the passes. Voxels with
u < H are compared; H rises from 3/4 of the largest entropy, log C, to all of it, along a sigmoid over all iterations.
"""

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="UAMT", unlabeled=True, teacher=True)
flag, rare = PARSER.group("uncertainty-aware mean teacher")
flag("--ema_decay", type=flags.fraction, default=0.99, help="share of the teacher that an update keeps")
flag("--consistency", type=flags.rate, default=0.1, help="weight of the consistency loss after its ramp")
flag("--consistency_rampup", type=flags.rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
flag("--uncertainty_passes", type=flags.even, default=8, help="noisy passes of the teacher, an even number")
flags.answer_help(PARSER, __name__)

import copy
import math

import torch

from mtseg import losses
from mtseg.ema import relative_distance, update_ema_variables
from mtseg.ramps import consistency_weight, sigmoid_rampup
from mtseg.script import build
from mtseg.script.run import script_main


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
    supervised = build.make_supervised(args, run)
    labeled_bs = data.labeled_bs
    ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model, "teacher": ema_model}, updater, fixed_length=True):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            unlabeled = volume[labeled_bs:]
            with run.autocast:
                outputs = student(volume)
                with torch.no_grad():
                    target = teacher(noisy(unlabeled))[0]
                    # Two copies at a time, as in the authors' code: the teacher's batch norm sees both.
                    twice = torch.cat([unlabeled, unlabeled])
                    passes = [teacher(noisy(twice))[0].float().softmax(1) for _ in range(args.uncertainty_passes // 2)]
            mean = torch.stack(passes).unflatten(1, (2, len(unlabeled))).mean((0, 1))
            uncertainty = -(mean * torch.log(mean + 1e-6)).sum(1)
            threshold = (0.75 + 0.25 * sigmoid_rampup(iteration - 1, args.max_iterations)) * math.log(args.num_classes)
            if args.ignore_padding:
                uncertainty = uncertainty.masked_fill(~run.inside[labeled_bs:, 0], math.inf)
            certain = run.joint(uncertainty) < threshold

            labeled_outputs = run.joint([level[:labeled_bs] for level in outputs])
            supervised_loss, parts = supervised(labeled_outputs, run.joint(label[:labeled_bs]))
            output, target = run.joint(outputs[0][labeled_bs:]), run.joint(target)
            consistency_dist = losses.masked_mean(losses.softmax_mse_loss(output, target, reduction="none"), certain)
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + weight * consistency_dist

            updater.step(loss)
            alpha = args.ema_decay * sigmoid_rampup(iteration - 1, args.ema_rampup)
            update_ema_variables(model, ema_model, alpha, ema_start + iteration - 1, args.ema_buffers)
            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": supervised_loss}
            row |= {"consistency_weight": weight, "consistency_dist": consistency_dist}
            row |= {"uncertainty_threshold": threshold, "compared_share": certain.float().mean()}
            run.end_iteration(**row, teacher_distance=relative_distance(model, ema_model))


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
