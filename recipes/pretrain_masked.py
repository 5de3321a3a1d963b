"""Masked reconstruction: before anybody has labelled an image, a network learns to fill in what is hidden of it.

    python recipes/pretrain_masked.py --root_path /data/LA
    python train_sup.py --root_path /data/LA --labelnum 8 --intensity zscore \\
        --pretrained model/LA_vnet_0_labeled/masked/iter_6000.pth --pretrained_parts encoder
    python -m mtseg.figures reconstructions model/LA_vnet_0_labeled/masked

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (arXiv:2111.06377), with the very network that
is fine-tuned, as Wald et al. do, "Revisiting MAE pre-training for 3D medical image segmentation", CVPR 2025
(arXiv:2410.23132): of the blocks of a patch a share r is hidden, set to 0 in an image of mean 0, and
    L = mean over hidden voxels of (f(x) - x)^2.
Learned from are all cases of train.list and of unlabeled.list, or of --unlabeled_root, never those of --val_list, whose
loss is logged. Nothing looks at a label. The defaults are those of Wald et al.'s code, but for a shorter run, smaller
patches and batches, and a momentum of 0.9: their 0.99, made for 250 000 iterations, gave weights worse than none in
2000 (docs/pretraining.md). At the end weights that batch norm follows get the norm of new ones, without which
fine-tuning would hardly move them, and batch norm's statistics are taken from whole images, as fine-tuning sees them.
"""

import argparse

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="masked")
flag, rare = PARSER.group("reconstruction")
flag("--pretext", choices=("masked", "autoencoder", "genesis"), default="masked", help="what hides the image")
flag("--mask_ratio", type=flags.fraction, default=0.75, help="share of the blocks that are hidden")
flag("--mask_block", type=flags.positive, default=16, help="voxels a side of a block")
flag("--sparse", action=argparse.BooleanOptionalAction, default=False, help="hidden places stay so in all features")
rare("--unlabeled_root", metavar="DIR", help="folder with more cases (default: root_path, if it has unlabeled.list)")
PARSER.set_defaults(labelnum=0, batch_size=4, rotflip="all", intensity="zscore", nesterov=True)
PARSER.set_defaults(weight_decay=3e-5, lr_schedule="poly", gradient_clipping=12.0)
flags.answer_help(PARSER, __name__)

from mtseg.masking import Reconstructor, corrupted, squared_errors
from mtseg.script import build
from mtseg.script.run import script_main


def train(args, run):
    flags.check_pretext(args)
    # ---------------------------------------------------------------------------------------- data, network, optimizer
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels, n_classes=data.n_channels)  # it gives images
    reconstructor = Reconstructor(model, args.pretext != "autoencoder", args.sparse, args.mask_block).to(run.device)
    forward = build.make_forward(args, run, reconstructor)
    updater = build.make_updater(args, run, reconstructor.parameters())
    tokens = {"tokens": reconstructor.tokens} if args.sparse else {}

    def errors(image):
        """Of each image the mean squared error of its reconstruction."""
        seen, hidden = corrupted(image, args.pretext, args.mask_block, args.mask_ratio)
        with run.autocast:
            output = forward(seen)[0]
        return squared_errors(output, image, hidden)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model}, updater, **tokens):
        for iteration, image, _ in run.batches():
            loss = run.joint(errors(image)).mean()
            updater.step(loss)
            held_out = ""
            if data.held_out is not None and (iteration % args.val_freq == 0 or iteration == args.max_iterations):
                held_out = build.held_out_loss(args, run, data, reconstructor, errors)
            run.end_iteration(loss=loss, held_out_loss=held_out)
        build.ready_to_start_from(args, run, data, model)


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
