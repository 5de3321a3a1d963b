"""SS-Net: outputs that an adversarial noise does not change, and features that lie near prototypes of their class.

    python recipes/train_ss_net.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_16_labeled/SSNet/iter_15000.pth

Wu et al., "Exploring Smoothness and Class-Separation for Semi-supervised Medical Image Segmentation", MICCAI 2022
(arXiv:2203.01324), section 2: L_seg + w (L_smooth + 0.1 (L_class(labelled) + L_class(unlabelled))).
L_smooth = 1 - Dice(f(x + r), f(x)), r of length epsilon towards the largest change, by one step of power iteration.
L_class = 1/C sum_c mean_ij a_i b_j (1 - cos(g_i, m_j)): g are features of class c (by label, else by argmax), m of 32
labelled voxels classified rightly, a and b attention. The paper takes m of the best, the code the lowest scores.
"""

import argparse

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="SSNet", unlabeled=True)
PARSER.set_defaults(max_iterations=15000, loss="linear_dice")
flag, rare = PARSER.group("smoothness and class separation")
flag("--consistency", type=flags.rate, default=1.0, help="weight of both losses after its ramp")
flag("--consistency_rampup", type=flags.rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
flag("--epsilon", type=flags.rate, default=10.0, help="length of the adversarial noise of a patch (2-D code: 6)")
flag("--prototype_weight", type=flags.rate, default=0.1, help="weight of the class separation within both")
rare("--prototypes", type=flags.positive, default=32, help="prototypes of a class, chosen anew in each iteration")
best = "those of the highest scores, as in the paper"
flag("--best_prototypes", action=argparse.BooleanOptionalAction, default=False, help=best)
rare(
    "--prototype_voxels",
    type=flags.positive,
    default=32768,
    help="voxels drawn of either kind for the class separation",
)
flags.answer_help(PARSER, __name__)

from itertools import chain

import torch

from mtseg.memory import frozen_statistics
from mtseg.prototypes import ClassPrototypes, WithFeatures, draw_voxels
from mtseg.ramps import consistency_weight
from mtseg.script import build
from mtseg.script.run import script_main
from mtseg.script.windows import counted_classes
from mtseg.vat import virtual_adversarial_noise


def dice_distance(outputs, probabilities):
    """1 - 2 sum(p q) / (sum(p) + sum(q)), sums over voxels and classes: each below the bar is the number of voxels."""
    return 1 - (outputs[0].float().softmax(1) * probabilities).sum(1).mean()


def train(args, run):
    if min(args.prototypes, args.prototype_voxels) < 2:
        raise flags.FlagError("--prototypes and --prototype_voxels: one vector has no statistics; take at least 2")
    # ------------------------------------------------------------------------------ data, student, heads, optimizer
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels)
    heads = ClassPrototypes(model.channels[0], args.num_classes, counted_classes(args)).to(run.device)
    student = build.make_forward(args, run, WithFeatures(model))
    updater = build.make_updater(args, run, chain(model.parameters(), heads.parameters()))
    supervised = build.make_supervised(args, run)
    labeled_bs, voxels = data.labeled_bs, args.prototype_voxels
    ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model}, updater, heads=heads):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            with run.autocast:
                *outputs, features = student(volume)
                with torch.no_grad():  # with dropout of its own
                    clean = student(volume)[0].float().softmax(1)
                with frozen_statistics(model):
                    noise = virtual_adversarial_noise(student, dice_distance, clean, volume, args.epsilon)
                    perturbed = student(volume + noise)[:1]

            labeled_outputs = run.joint([level[:labeled_bs] for level in outputs])
            supervised_loss, parts = supervised(labeled_outputs, run.joint(label[:labeled_bs]))
            smooth_loss = dice_distance(run.joint(perturbed), run.joint(clean))
            sizes = [labeled_bs, len(volume) - labeled_bs]
            features, named = features.split(sizes), outputs[0].max(1).indices.split(sizes)
            labeled, truth, guess = run.joint(draw_voxels(voxels, features[0], label[:labeled_bs], named[0]))
            unlabeled = run.joint(draw_voxels(voxels, features[1], named[1]))
            right = torch.where(truth == guess, truth, -1)  # -1 is no class
            prototypes = heads.choose(labeled, right, args.prototypes, args.best_prototypes)
            class_loss = heads(labeled, truth, prototypes) + heads(*unlabeled, prototypes)
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + weight * (smooth_loss + args.prototype_weight * class_loss)

            updater.step(loss)
            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": supervised_loss}
            run.end_iteration(**row, consistency_weight=weight, smooth_loss=smooth_loss, class_loss=class_loss)


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
