"""MC-Net+ and MC-Net: one encoder with several decoders, each of which learns the sharpened output of the others.

    python recipes/train_mc_net.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_16_labeled/MCNet/iter_15000.pth

Wu et al., "Mutual Consistency Learning for Semi-supervised Medical Image Segmentation", MedIA 2022 (arXiv:2109.09960),
section 3: three decoders that differ in their upsampling; with --decoders 2 it is MC-Net (MICCAI 2021,
arXiv:2103.02911). Of p_i, the softmax of decoder i, s_i = p_i^(1/T) / (p_i^(1/T) + (1 - p_i)^(1/T)) is sharpened, and

    L = lambda sum_i Dice(p_i, y) + w sum_(i != j) mean (p_i - s_j)^2

The second sum runs over labelled and unlabelled patches. As in the authors' code, the gradient flows through s_j too;
the papers speak of pseudo-labels, which have none: --detach_targets. The result is the encoder with its first decoder.
"""

import argparse

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="MCNet", unlabeled=True)
flag, rare = PARSER.group("mutual consistency")
flag("--decoders", type=int, choices=(2, 3), default=3, help="decoders: 3 as in MC-Net+, or 2 as in MC-Net")
flag("--consistency", type=flags.rate, default=1.0, help="weight of the mutual consistency after its ramp")
flag("--consistency_rampup", type=flags.rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
flag("--temperature", type=flags.positive_fraction, default=0.1, help="T of the sharpening; 1 leaves p as it is")
switch = argparse.BooleanOptionalAction
rare("--detach_targets", action=switch, default=False, help="no gradient through the sharpened outputs")
PARSER.set_defaults(max_iterations=15000, lr_schedule="constant", loss="linear_dice:0.5")
flags.answer_help(PARSER, __name__)

from itertools import permutations

import torch.nn.functional as F
from torch import nn

from mtseg.pseudo import sharpen
from mtseg.ramps import consistency_weight
from mtseg.script import build
from mtseg.script.run import script_main


class MCNet(nn.Module):
    """The student and further decoders on its encoder: `forward(batch)` gives the logits of each decoder."""

    def __init__(self, student, further):
        super().__init__()
        self.student, self.further = student, further

    def forward(self, batch):
        features = self.student.encode(batch)
        return [net.classify(net.decode(features)) for net in (self.student, *self.further.values())]


def train(args, run):
    if args.deep_supervision:
        raise flags.FlagError("--deep_supervision: the decoders of MC-Net have one output each; leave it out")
    # ------------------------------------------------------------------------------ data, network, decoders, optimizer
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels)
    # The student's own upsampling, and then one of the others for each further decoder, under MC-Net's names for them.
    own = "nearest" if args.network in flags.ENCODED else "deconv"
    own = "linear" if args.network.endswith(("_ssl4mis", "_deeplab")) else own
    others = [how for how in ("deconv", "linear", "nearest") if how != own][: args.decoders - 1]
    further = {f"decoder{n}": model.another_decoder(how) for n, how in enumerate(others, start=2)}
    net = MCNet(model, build.prepare(args, run, nn.ModuleDict(further)))
    forward = build.make_forward(args, run, net)
    updater = build.make_updater(args, run, net.parameters())
    supervised = build.make_supervised(args, run)
    labeled_bs = data.labeled_bs
    ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model}, updater, decoders=net.further):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            with run.autocast:
                outputs = forward(volume)

            label = run.joint(label[:labeled_bs])
            terms = [supervised(run.joint(output[:labeled_bs]), label) for output in outputs]
            supervised_loss, parts = sum(loss for loss, _ in terms), terms[0][1]
            soft = [output.float().softmax(1) for output in run.joint(outputs)]
            sharp = [sharpen(p.detach() if args.detach_targets else p, args.temperature) for p in soft]
            pairs = permutations(zip(soft, sharp, strict=True), 2)
            consistency_dist = sum(F.mse_loss(p, s) for (p, _), (_, s) in pairs)
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + weight * consistency_dist

            updater.step(loss)
            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": supervised_loss}
            run.end_iteration(**row, consistency_weight=weight, consistency_dist=consistency_dist)


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
