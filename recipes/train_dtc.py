"""DTC, dual-task consistency: the segmentation agrees with the one that the network's signed distances give.

    python recipes/train_dtc.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_16_labeled/DTC/iter_6000.pth

Luo et al., "Semi-supervised Medical Image Segmentation through Dual-task Consistency", AAAI 2021 (arXiv:2009.04448). A
second head gives signed distances d in (-1, 1), negative inside; T^-1(d) = sigmoid(-k d) makes a segmentation of them:

    L = L_Dice + 0.3 mean (d - T(y))^2 + weight mean (T^-1(d) - p)^2

the first two on labelled patches, the last on all, with gradients to both heads. T(y) is the label's signed distance
map, p the foreground probability. The factor 0.3 is that of the authors' code. There is no teacher. With several
classes each foreground class has a map of its own. The network without its second head is the result.
"""

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="DTC", unlabeled=True)
PARSER.set_defaults(loss="dice")
flag, rare = PARSER.group("dual-task consistency")
flag("--consistency", type=flags.rate, default=1.0, help="weight of the consistency of both heads after its ramp")
flag("--consistency_rampup", type=flags.rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
flag("--distance_weight", type=flags.rate, default=0.3, help="weight of the signed distances on labelled patches")
rare("--steepness", type=flags.rate, default=1500.0, help="k: how steeply distances become a segmentation")
flags.answer_help(PARSER, __name__)

import torch

from mtseg.distances import WithDistances, signed_distances
from mtseg.losses import masked_mean
from mtseg.ramps import consistency_weight
from mtseg.script import build
from mtseg.script.run import script_main


def train(args, run):
    if not args.steepness:
        raise flags.FlagError("--steepness 0: every distance would be a probability of one half; take a number above 0")
    # ---------------------------------------------------------------------------- data, network, its head, optimizer
    data = build.read_data(args, run)
    data.note_on_borders(args)
    model = build.make_network(args, run, data.n_channels)
    two_headed = WithDistances(model, args.num_classes, args.dims).to(run.device)
    student = build.make_forward(args, run, two_headed)
    updater = build.make_updater(args, run, two_headed.parameters())
    supervised = build.make_supervised(args, run)
    labeled_bs = data.labeled_bs
    ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model}, updater, distance_head=two_headed.head):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            with run.autocast:
                outputs = student(volume)

            label = run.joint(label[:labeled_bs])
            *logits, distances = run.joint([output[:labeled_bs] for output in outputs])
            supervised_loss, parts = supervised(logits, label)
            error = (distances.float() - signed_distances(label, args.num_classes)).square()
            distance_loss = masked_mean(error, label != data.unknown)
            foreground = run.joint(outputs[0]).float().softmax(1)[:, 1:]
            from_distances = torch.sigmoid(-args.steepness * run.joint(outputs[-1]).float())
            consistency_dist = (from_distances - foreground).square().mean()
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + args.distance_weight * distance_loss + weight * consistency_dist

            updater.step(loss)
            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": supervised_loss}
            row |= {"consistency_weight": weight, "consistency_dist": consistency_dist}
            run.end_iteration(**row, distance_loss=distance_loss)


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
