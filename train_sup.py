"""Supervised training on the labelled cases alone: the baseline every semi-supervised method is compared with.

    python train_sup.py --labelnum 25                          # LA in data/LA, or the built-in Phantom data
    python train_sup.py --labelnum 16 --root_path /data/LA     # train.list, test.list and data/ lie there
    python train_sup.py --labelnum 16 --root_path /data/LA --resume      # go on after an interruption
    python inference.py --model_path model/LA_vnet_25_labeled/supervised/iter_6000.pth    # the table of test metrics

V-Net (Milletari et al., 3DV 2016, arXiv:1606.04797) with the loss and settings of UA-MT (Yu et al., MICCAI 2019,
arXiv:1907.07034). The last iteration is the result; no checkpoint is selected.
"""

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="supervised", strong_views=True)
flags.answer_help(PARSER, __name__)

from mtseg.augment import strong_view
from mtseg.script import build
from mtseg.script.run import script_main


def train(args, run):
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels)
    student = build.make_forward(args, run, model)
    updater = build.make_updater(args, run, model.parameters())
    strengths = build.make_strengths(args)
    supervised = build.make_supervised(args, run, unknown=bool(strengths))

    with run.started(data, {"student": model}, updater):
        for _, volume, label in run.batches():
            view = strong_view(volume, strengths, label, volume, label, ignore_index=data.unknown)
            with run.autocast:
                outputs = student(view.image)
            # The loss is that of the joint batch of all processes, where torchrun started several.
            loss, parts = supervised(run.joint(outputs), run.joint(view.labels))
            updater.step(loss)
            run.end_iteration(loss=loss, **parts)


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
