"""CPS, cross pseudo supervision: two networks, each of which learns from what the other calls most probable.

    python recipes/train_cps.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_16_labeled/CPS/iter_6000.pth

Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021 (arXiv:2106.01226),
equations 1 to 4, on volumes as in SSL4MIS: the cross-entropy of one network with the other's argmax, on unlabelled
patches. The two differ in their initial weights alone; the first network is the result, second_iter_<N>.pth the other.
"""

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="CPS", unlabeled=True)
flag, rare = PARSER.group("cross pseudo supervision")
flag("--consistency", type=flags.rate, default=0.1, help="weight of the cross pseudo supervision after its ramp")
flag("--consistency_rampup", type=flags.rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
flags.answer_help(PARSER, __name__)

from itertools import chain

from mtseg.losses import cross_entropy_loss
from mtseg.ramps import consistency_weight
from mtseg.script import build
from mtseg.script.run import script_main


def train(args, run):
    if args.pretrained and args.pretrained_parts != "encoder":
        raise flags.FlagError("--pretrained: both networks would start alike; take --pretrained_parts encoder with it")
    # ------------------------------------------------------------------------------ data, two networks, one optimizer
    data = build.read_data(args, run)
    model_one, model_two = (build.make_network(args, run, data.n_channels) for _ in range(2))
    first, second = build.make_forward(args, run, model_one), build.make_forward(args, run, model_two)
    updater = build.make_updater(args, run, chain(model_one.parameters(), model_two.parameters()))
    supervised = build.make_supervised(args, run)
    labeled_bs, ignored = data.labeled_bs, data.unknown if args.ignore_padding else None
    ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model_one, "second": model_two}, updater):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            with run.autocast:
                outputs_one, outputs_two = first(volume), second(volume)

            label = run.joint(label[:labeled_bs])
            loss_one, parts = supervised(run.joint([level[:labeled_bs] for level in outputs_one]), label)
            loss_two, _ = supervised(run.joint([level[:labeled_bs] for level in outputs_two]), label)
            one, two = run.joint(outputs_one[0][labeled_bs:]), run.joint(outputs_two[0][labeled_bs:])
            # max, since argmax takes 15 times as long on a CPU
            for_one, for_two = two.max(1).indices, one.max(1).indices
            if args.ignore_padding:
                padded = ~run.joint(run.inside[labeled_bs:, 0])
                for_one, for_two = (labels.masked_fill(padded, data.unknown) for labels in (for_one, for_two))
            cross_loss = cross_entropy_loss(one, for_one, ignore_index=ignored)
            cross_loss = cross_loss + cross_entropy_loss(two, for_two, ignore_index=ignored)
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = loss_one + loss_two + weight * cross_loss

            updater.step(loss)
            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": loss_one + loss_two}
            run.end_iteration(**row, consistency_weight=weight, cross_loss=cross_loss)


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
