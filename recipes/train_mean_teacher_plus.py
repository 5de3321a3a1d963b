"""Mean Teacher plus what later methods brought, each to be had or left: pseudo-labels, copy-paste, a second teacher.

    python recipes/train_mean_teacher_plus.py --labelnum 8 --root_path /data/LA --paste --targets hard --second_teacher
    python inference.py --model_path model/LA_vnet_8_labeled/MTplus/iter_6000.pth

With nothing of this it is Mean Teacher, to the bit. --paste is BCP's (Bai et al., CVPR 2023, arXiv:2305.00673), whose
box stands in every second unlabelled patch, and around a hole in the others: the student sees mixtures, the teachers do
not. --targets hard are the teachers' most probable classes, of each class its largest component, and the loss on them
is the supervised one; soft ones are probabilities, and it is the mean squared difference. A second teacher averages the
student in every second iteration (Zhao et al., ECCV 2024, arXiv:2311.17325); targets are then the mean of both.
--consistency_warmup is a start on labels alone.
"""

import argparse

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="MTplus", unlabeled=True, teacher=True)
flag, rare = PARSER.group("mean teacher plus")
switch = argparse.BooleanOptionalAction
flag("--ema_decay", type=flags.fraction, default=0.99, help="share of the teacher that an update keeps")
flag("--consistency", type=flags.rate, default=0.1, help="weight of the loss on unlabelled patches after its ramp")
flag("--consistency_rampup", type=flags.rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
flag("--targets", choices=("soft", "hard"), default="soft", help="of unlabelled voxels: probabilities or classes")
flag("--largest_component", action=switch, default=True, help="of each class of hard targets")
flag("--paste", action=switch, default=False, help="boxes of labelled patches into unlabelled ones")
rare("--mask_ratio", type=flags.fraction, default=2 / 3, help="share of each side that the pasted box takes")
flag("--second_teacher", action=switch, default=False, help="each averages every second student")
flags.answer_help(PARSER, __name__)

import copy

import torch
import torch.nn.functional as F

from mtseg.ema import relative_distance, update_ema_variables
from mtseg.losses import masked_mean
from mtseg.mixing import inner_box
from mtseg.postprocess import largest_components
from mtseg.ramps import consistency_weight, sigmoid_rampup
from mtseg.script import build
from mtseg.script.run import script_main


def train(args, run):
    # ----------------------------------------------------------------------------- data, student, teachers, optimizer
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels)
    ema_model = copy.deepcopy(model).requires_grad_(False)
    ema_start = build.load_teacher_checkpoint(args, run, model, ema_model)
    ema_models = {"teacher": ema_model}
    ema_models |= {"teacher_two": copy.deepcopy(ema_model)} if args.second_teacher else {}
    student, *teachers = (build.make_forward(args, run, net) for net in (model, *ema_models.values()))
    updater = build.make_updater(args, run, model.parameters())
    supervised, mixed_supervised = (build.make_supervised(args, run, unknown) for unknown in (False, True))
    clean = largest_components if args.largest_component and args.background == 0 else torch.clone
    labeled_bs, ramp = data.labeled_bs, (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model, **ema_models}, updater):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            labeled, unlabeled = volume[:labeled_bs], volume[labeled_bs:]
            noise = torch.clamp(torch.randn_like(unlabeled) * 0.1, -0.2, 0.2)
            mixed, pasted, inside = unlabeled, None, run.inside[labeled_bs:] if args.ignore_padding else None
            if args.paste:
                box = inner_box(unlabeled.shape[2:], args.mask_ratio, run.device).expand(
                    len(unlabeled), 1, *[-1] * args.dims
                )
                places = torch.arange(len(unlabeled), device=run.device)
                pasted, source = box ^ (places % 2 == 1).view(-1, *[1] * (args.dims + 1)), places % labeled_bs
                mixed, glued = torch.where(pasted, labeled[source], unlabeled), label[source]
            with run.autocast:
                outputs = student(torch.cat([labeled, mixed]))
                with torch.no_grad():
                    each = [teacher(unlabeled + noise)[0].float().softmax(1) for teacher in teachers]
                    target = torch.stack(each).mean(0)

            supervised_loss, parts = supervised(
                run.joint([level[:labeled_bs] for level in outputs]), run.joint(label[:labeled_bs])
            )
            if args.targets == "hard":
                target = clean(target.max(1).indices)  # max, since argmax takes 15 times as long on a CPU
                target = target.masked_fill(~inside[:, 0], data.unknown) if args.ignore_padding else target
                target = torch.where(pasted[:, 0], glued, target) if args.paste else target
                levels = run.joint([level[labeled_bs:] for level in outputs])
                consistency_dist, _ = mixed_supervised(levels, run.joint(target))
            else:
                seen = inside if args.ignore_padding else torch.ones_like(target[:, :1], dtype=torch.bool)
                if args.paste:  # what is pasted may have no label
                    classes = torch.arange(args.num_classes, device=run.device).view(-1, *[1] * args.dims)
                    known = glued.unsqueeze(1) == classes
                    target = torch.where(pasted, known.to(target), target)
                    seen = torch.where(pasted, known.any(1, keepdim=True), seen)
                output, target, seen = run.joint(outputs[0][labeled_bs:]), run.joint(target), run.joint(seen)
                errors = F.mse_loss(output.float().softmax(1), target, reduction="none")
                consistency_dist = masked_mean(errors, seen) if args.paste or args.ignore_padding else errors.mean()
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + weight * consistency_dist

            updater.step(loss)
            alpha = args.ema_decay * sigmoid_rampup(iteration - 1, args.ema_rampup)
            turn = (iteration - 1) % len(teachers)
            followed = [*ema_models.values()][turn]
            step = ema_start + (iteration - 1) // len(teachers)
            update_ema_variables(model, followed, alpha, step, args.ema_buffers)
            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": supervised_loss}
            row |= {"consistency_weight": weight, "consistency_dist": consistency_dist}
            run.end_iteration(**row, teacher_distance=relative_distance(model, followed))


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
