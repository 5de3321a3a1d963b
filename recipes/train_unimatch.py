"""UniMatch: two strong views and one with dropped features learn from what the same network is sure of on a weak view.

    python recipes/train_unimatch.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_16_labeled/UniMatch/iter_14000.pth

Yang et al., "Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation", CVPR 2023
(arXiv:2208.09910), section 3.4, without a teacher: y = argmax p(w), ignored where max p(w) < t, on patches w, and
    L = (L_s + D(p(s1), y1) / 4 + D(p(s2), y2) / 4 + D(p'(w), y) / 2) / 2.
s1 and s2 are intensity views with a box of another patch's; y1 and y2 are y with that box of the other's labels; p' has
half of all features' channels dropped between encoder and decoder. D is Dice over all classes, as in the code for
medical images; the paper has cross-entropy. The second half of the unlabelled patches is there to be pasted from.
"""

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="UniMatch", unlabeled=True)
PARSER.set_defaults(max_iterations=14000, batch_size=6, lr_schedule="poly")
flag, rare = PARSER.group("unimatch")
flag("--consistency", type=flags.rate, default=1.0, help="weight of the losses on unlabelled patches after its ramp")
flag("--consistency_rampup", type=flags.rate, default=0.0, help="length of the ramp, in blocks of 150 iterations")
flag("--pseudo_threshold", type=flags.fraction, default=0.95, help="the probability that makes a label")
flag("--feature_dropout", type=flags.below_one, default=0.5, help="share of the channels of features that is dropped")
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
    """`net` on a batch whose first share `weak` holds labelled patches and weak views, and the rest strong views: the
    logits of the former with dropped features, of the latter, and of the former on all levels."""

    def __init__(self, net, weak, dropout):
        super().__init__()
        self.net, self.weak, self.dropout = net, weak, dropout

    def forward(self, batch):
        weak, strong = batch.tensor_split([round(self.weak * len(batch))])
        both = [torch.cat([level, torch.feature_dropout(level, self.dropout, True)]) for level in self.net.encode(weak)]
        both = levels(self.net.classify(self.net.decode(both)))
        return [both[0][len(weak) :], levels(self.net(strong))[0], *(level[: len(weak)] for level in both)]


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
    dice = partial(multiclass_dice_loss, include_background=True, ignore_index=data.unknown)
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
                dropped, strong, *outputs = student(torch.cat([volume[:labeled_bs], weak, *strong]))

            labeled_outputs = run.joint([level[:labeled_bs] for level in outputs])
            supervised_loss, parts = supervised(labeled_outputs, run.joint(label[:labeled_bs]))
            known = pseudo(outputs[0][labeled_bs:])
            targets = run.joint([known, *(torch.where(box[:, 0], pasted, known) for box in boxes)])
            dropout_loss, one, two = map(dice, run.joint([dropped[labeled_bs:], *strong.chunk(2)]), targets)
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = (supervised_loss + weight * (one / 4 + two / 4 + dropout_loss / 2)) / 2

            updater.step(loss)
            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": supervised_loss}
            row |= {"consistency_weight": weight, "strong_loss": (one + two) / 2, "dropout_loss": dropout_loss}
            run.end_iteration(**row, **pseudo_label_statistics(targets[0], ignore_index=data.unknown))


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
