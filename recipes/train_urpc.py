"""URPC, uncertainty rectified pyramid consistency: outputs of four levels of one decoder agree with their mean.

    python recipes/train_urpc.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_16_labeled/URPC/iter_6000.pth

Luo et al., "Semi-supervised Medical Image Segmentation via Uncertainty Rectified Pyramid Consistency", MedIA 2022, and
at MICCAI 2021 (arXiv:2012.07042), as in SSL4MIS. Of p_s, the softmax of level s in full size, and their mean m,

    L = mean_s (CE + Dice)(p_s, y) / 2 + w mean_s [mean (m - p_s)^2 e^-K_s / mean e^-K_s + mean K_s],
    K_s = KL(m || p_s) = sum_c m (log m - log p_s) in each voxel,

w over unlabelled patches. The gradient flows through all of it, m and e^-K_s too. One forward pass, no teacher; the
result is the network with its finest head. SSL4MIS has no settings for LA: but for the loss, they are UA-MT's here.
"""

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="URPC", unlabeled=True)
flag, rare = PARSER.group("uncertainty rectified pyramid consistency")
flag("--consistency", type=flags.rate, default=0.1, help="weight of the pyramid consistency after its ramp")
flag("--consistency_rampup", type=flags.rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
flags.answer_help(PARSER, __name__)

import math
from itertools import chain, repeat

import torch
import torch.nn.functional as F
from torch import nn

from mtseg.ramps import consistency_weight
from mtseg.script import build
from mtseg.script.run import script_main


class Pyramid(nn.Module):
    """The student and heads on its decoder's coarser levels: `forward(batch)` gives the logits of each in full size."""

    def __init__(self, student, num_classes, dims):
        super().__init__()
        conv, dropout = ((nn.Conv2d, nn.Dropout2d), (nn.Conv3d, nn.Dropout3d))[dims - 2]
        self.student, self.mode = student, ("bilinear", "trilinear")[dims - 2]
        shares = zip(student.channels[1:-1], chain((0.2, 0.3), repeat(0.5)))  # noqa: B905
        self.heads = nn.ModuleList(nn.Sequential(dropout(p), conv(width, num_classes, 1)) for width, p in shares)

    def forward(self, batch):
        decoded = self.student.decode(self.student.encode(batch))
        coarse = [head(level) for head, level in zip(self.heads, decoded[1:], strict=True)]
        coarse = [F.interpolate(logits, batch.shape[2:], mode=self.mode) for logits in coarse]
        return [self.student.classify(decoded), *coarse]


def pyramid_loss(outputs):
    """The consistency of the logits `outputs`, each (N, C, *spatial), and the mean of K_s."""
    logs = torch.stack([logits.float().log_softmax(1) for logits in outputs])  # of the levels
    log_mean = logs.logsumexp(0) - math.log(len(logs))
    mean = log_mean.exp()
    k = (mean * (log_mean - logs)).sum(2, keepdim=True)
    certain, all_but_levels = torch.exp(-k), tuple(range(1, k.dim()))
    squares = ((mean - logs.exp()) ** 2 * certain).mean(all_but_levels) / (certain.mean(all_but_levels) + 1e-8)
    return squares.mean() + k.mean(), k.mean()


def train(args, run):
    if args.deep_supervision:
        raise flags.FlagError("--deep_supervision: URPC has heads of its own on the coarser levels; leave it out")
    # --------------------------------------------------------------------------------- data, network, heads, optimizer
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels)
    net = Pyramid(model, args.num_classes, args.dims).to(run.device)
    forward = build.make_forward(args, run, net)
    updater = build.make_updater(args, run, net.parameters())
    supervised = build.make_supervised(args, run)
    labeled_bs = data.labeled_bs
    ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model}, updater, heads=net.heads):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            with run.autocast:
                outputs = forward(volume)

            label = run.joint(label[:labeled_bs])
            terms = [supervised(run.joint(output[:labeled_bs]), label) for output in outputs]
            supervised_loss, parts = sum(loss for loss, _ in terms) / len(terms), terms[0][1]
            consistency_dist, uncertainty = pyramid_loss(run.joint([output[labeled_bs:] for output in outputs]))
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + weight * consistency_dist

            updater.step(loss)
            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": supervised_loss}
            row |= {"consistency_weight": weight, "consistency_dist": consistency_dist, "uncertainty": uncertainty}
            run.end_iteration(**row)


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
