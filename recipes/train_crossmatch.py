"""CrossMatch: UniMatch with two decodings of dropped features, a mild and a harsh one, that also teach one another.

    python recipes/train_crossmatch.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_16_labeled/CrossMatch/iter_14000.pth

Zhao et al., "CrossMatch: Enhance Semi-Supervised Medical Image Segmentation ...", IEEE JBHI 2024 (arXiv:2405.00354).
y labels p(w) as in train_unimatch.py; m and h are outputs of features with 1/4 and 3/4 of the channels dropped, ym and
yh label m(w) and h(w); x' is a label x with a box; D is Dice on foreground (the code scales its threshold by log 2):
    ip = D(p(s1), y') + D(p(s2), y'),  tkd = D(m(w), y) + D(h(w), y) + D(m(s2), y') + D(h(s2), y'),
    dkd = D(m(s2), ym') + D(h(s2), yh'),  L = (L_s + ip / 4 + (1 - eta) tkd / 4 + eta dkd / 2) / 2.
"""

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="CrossMatch", unlabeled=True)
PARSER.set_defaults(max_iterations=14000, batch_size=6, optimizer="adamw", base_lr=0.001, lr_schedule="poly")
flag, rare = PARSER.group("crossmatch")
flag("--consistency", type=flags.rate, default=1.0, help="weight of the losses on unlabelled patches after its ramp")
flag("--consistency_rampup", type=flags.rate, default=0.0, help="length of the ramp, in blocks of 150 iterations")
flag("--pseudo_threshold", type=flags.fraction, default=0.75, help="the probability that makes a label")
flag("--feature_dropout", type=flags.below_one, default=0.25, help="share of dropped channels of m; of h the rest")
flag("--eta", type=flags.fraction, default=0.3, help="share of what dropped features teach, dkd, beside tkd")
flags.answer_help(PARSER, __name__)

from functools import partial

import torch

from mtseg.augment import UNIMATCH_VIEWS, intensity_view
from mtseg.losses import levels, multiclass_dice_loss
from mtseg.mixing import cutmix_boxes
from mtseg.pseudo import pseudo_label_statistics, pseudo_labels
from mtseg.ramps import consistency_weight
from mtseg.script import build
from mtseg.script.run import script_main


class Views(torch.nn.Module):
    """`net` on a batch whose first share `weak` holds labelled patches and weak views, and the rest two strong views:
    logits [p(s1), p(s2), m(s2), h(s2)], [m(w), h(w)], and on all levels those of labelled patches and weak views."""

    def __init__(self, net, weak, dropout):
        super().__init__()
        self.net, self.weak, self.dropout = net, weak, (dropout, 1 - dropout)

    def forward(self, batch):
        outputs, (weak, strong) = [], batch.tensor_split([round(self.weak * len(batch))])
        for part in (weak, strong):
            for k, level in enumerate(features := self.net.encode(part)):
                last = level[-len(strong) // 2 :]
                features[k] = torch.cat([level, *(torch.feature_dropout(last, p, True) for p in self.dropout)])
            outputs.append(levels(self.net.classify(self.net.decode(features, turnoff_drop=True))))
        return [outputs[1][0], outputs[0][0][len(weak) :], *(level[: len(weak)] for level in outputs[0])]


def train(args, run):
    flags.check_pairs(args, run.ranks.world_size, views_together=True)
    # --------------------------------------------------------------------------------------------- data, one network
    data = build.read_data(args, run)
    model = build.make_network(args, run, data.n_channels)
    weak_share = (args.batch_size + args.labeled_bs) / (3 * args.batch_size - args.labeled_bs)
    student = build.make_forward(args, run, Views(model, weak_share, args.feature_dropout))
    updater = build.make_updater(args, run, model.parameters())
    supervised = build.make_supervised(args, run)
    pseudo = partial(pseudo_labels, threshold=args.pseudo_threshold, ignore_index=data.unknown)
    dice = partial(multiclass_dice_loss, include_background=args.background is None, ignore_index=data.unknown)
    labeled_bs, ramp = data.labeled_bs, (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model}, updater):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            weak, partner = volume[labeled_bs:].chunk(2)
            boxes = [cutmix_boxes(len(weak), weak.shape[2:], run.device) for _ in range(2)]
            views = [intensity_view(volume[labeled_bs:], **UNIMATCH_VIEWS[args.dims]).chunk(2) for _ in range(2)]
            strong = [torch.where(box, pasted, view) for box, (view, pasted) in zip(boxes, views, strict=True)]
            with torch.no_grad(), run.autocast:
                pasted = pseudo(model.eval()(partner))
            model.train()
            with run.autocast:
                strong, dropped, *outputs = student(torch.cat([volume[:labeled_bs], weak, *strong]))
            labeled_outputs = run.joint([level[:labeled_bs] for level in outputs])
            supervised_loss, parts = supervised(labeled_outputs, run.joint(label[:labeled_bs]))
            (s1, s2, m2, h2), (m, h) = strong.chunk(4), dropped.chunk(2)
            y, ym, yh = map(pseudo, (outputs[0][labeled_bs:], m, h))
            y1, y2, ym2, yh2 = (torch.where(boxes[k][:, 0], pasted, x) for k, x in ((0, y), (1, y), (1, ym), (1, yh)))
            pairs = ((s1, y1), (s2, y2), (m, y), (h, y), (m2, y2), (h2, y2), (m2, ym2), (h2, yh2))
            losses = torch.stack([dice(*run.joint(pair)) for pair in pairs])
            ip_loss, tkd_loss, dkd_loss = losses[:2].mean(), losses[2:6].mean(), losses[6:].mean()
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = (supervised_loss + weight * (ip_loss / 2 + (1 - args.eta) * tkd_loss + args.eta * dkd_loss)) / 2
            updater.step(loss)
            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": supervised_loss}
            row |= {"consistency_weight": weight, "ip_loss": ip_loss, "tkd_loss": tkd_loss, "dkd_loss": dkd_loss}
            run.end_iteration(**row, **pseudo_label_statistics(run.joint(y), None, data.unknown))


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
