"""CPS, cross pseudo supervision: two networks, each of which learns from what the other calls most probable.

    python recipes/train_cps.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_16_labeled/CPS/iter_6000.pth

Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021 (arXiv:2106.01226),
equations 1 to 4, on volumes as in SSL4MIS. The first network is the result; the two differ in their initial weights.
"""

from mtseg.script import flags

PARSER = flags.unlabeled_parser(__doc__, model="CPS")
flags.answer_help(PARSER, __name__)

from mtseg.losses import cross_entropy_loss
from mtseg.ramps import consistency_weight
from mtseg.script import build
from mtseg.script.run import script_main

COLUMNS = ["supervised_loss", "cross_loss", "consistency_weight", "phase"]


def train(args, run):
    # ------------------------------------------------------------------------------- data, two networks, one optimizer
    data = build.read_data(args, run)
    models = [build.make_network(args, run, data.n_channels) for _ in range(2)]
    first, second = (build.make_forward(args, run, model) for model in models)
    updater = build.make_updater(args, run, [p for model in models for p in model.parameters()])
    supervised = build.make_supervised(args, run, args.ignore_index)
    labeled_bs, own_labeled = data.labeled_bs, data.own_labeled

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, dict(zip(("student", "second"), models, strict=True)), updater, COLUMNS):
        for iteration, volume, label in run.batches(data):
            with run.autocast:
                both = first(volume), second(volume)
            label = run.joint(label[:own_labeled])
            (one, two) = (run.joint(outputs, own_labeled) for outputs in both)

            (loss_one, parts), (loss_two, _) = (supervised([o[:labeled_bs] for o in net], label) for net in (one, two))
            one, two = one[0][labeled_bs:], two[0][labeled_bs:]
            cross_loss = cross_entropy_loss(one, two.argmax(1)) + cross_entropy_loss(two, one.argmax(1))
            ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = loss_one + loss_two + weight * cross_loss

            run.check_loss(loss)
            updater.step(loss)
            row = {"loss": loss, "supervised_loss": loss_one + loss_two, **parts, "phase": phase}
            run.end_iteration(**row, consistency_weight=weight, cross_loss=cross_loss)


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
