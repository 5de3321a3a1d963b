"""ICT, interpolation consistency: what the student says of a mixture of two patches is the mixture of what is said of
each.

    python recipes/train_ict.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_16_labeled/ICT/iter_6000.pth

Verma et al., "Interpolation Consistency Training for Semi-Supervised Learning", IJCAI 2019 (arXiv:1903.03825), on
volumes as in SSL4MIS. With Mix(a, b) = lambda a + (1 - lambda) b and lambda from Beta(alpha, alpha) for each pair,
    L = L_supervised + w mean((p(Mix(u_0, u_1)) - Mix(q(u_0), q(u_1)))^2),
p the student's probabilities and q the teacher's, which sees no noise. docs/methods/ict.md says what else is known.
"""

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="ICT", unlabeled=True, teacher=True)
flag, rare = PARSER.group("interpolation consistency training")
flag("--ema_decay", type=flags.fraction, default=0.99, help="share of the teacher that an update keeps")
flag("--consistency", type=flags.rate, default=0.1, help="weight of the consistency loss after its ramp")
flag("--consistency_rampup", type=flags.rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
flag("--mix_alpha", type=flags.rate, default=0.2, help="of Beta(alpha, alpha): below 1 one patch of a pair prevails")
flags.answer_help(PARSER, __name__)

import copy

import torch

from mtseg.ema import relative_distance, update_ema_variables
from mtseg.mixing import mixup
from mtseg.ramps import consistency_weight, sigmoid_rampup
from mtseg.script import build
from mtseg.script.run import script_main


def train(args, run):
    flags.check_pairs(args, run.ranks.world_size)
    if not args.mix_alpha:
        raise flags.FlagError("--mix_alpha 0: nothing would be mixed; take a number above 0")
    seen = (args.batch_size + args.labeled_bs) // 2 // args.accumulation_steps // run.ranks.world_size
    flags.check_normalization(args, max(seen, 1))  # of the labelled patches and the mixtures
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
    beta = torch.distributions.Beta(args.mix_alpha, args.mix_alpha)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model, "teacher": ema_model}, updater):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            unlabeled = volume[labeled_bs:]
            share = beta.sample((len(unlabeled) // 2,))
            with run.autocast:
                outputs = student(torch.cat([volume[:labeled_bs], mixup(*unlabeled.chunk(2), share)]))
                with torch.no_grad():
                    target = mixup(*teacher(unlabeled)[0].float().softmax(1).chunk(2), share)

            labeled_outputs = run.joint([level[:labeled_bs] for level in outputs])
            supervised_loss, parts = supervised(labeled_outputs, run.joint(label[:labeled_bs]))
            output, target = run.joint(outputs[0][labeled_bs:]), run.joint(target)
            consistency_dist = (output.float().softmax(1) - target).square().mean()
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + weight * consistency_dist

            updater.step(loss)
            alpha = args.ema_decay * sigmoid_rampup(iteration - 1, args.ema_rampup)
            update_ema_variables(model, ema_model, alpha, ema_start + iteration - 1, args.ema_buffers)
            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": supervised_loss}
            row |= {"consistency_weight": weight, "consistency_dist": consistency_dist}
            run.end_iteration(**row, teacher_distance=relative_distance(model, ema_model))


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
