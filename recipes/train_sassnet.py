"""SASSNet: a discriminator makes the signed distance maps of unlabelled patches look like those of labelled ones.

    python recipes/train_sassnet.py --labelnum 16 --root_path /data/LA
    python inference.py --model_path model/LA_vnet_16_labeled/SASSNet/iter_6000.pth

Li et al., "Shape-aware Semi-supervised 3D Semantic Segmentation for Medical Images", MICCAI 2020 (arXiv:2007.10732). A
second head gives signed distances d in (-1, 1), negative inside, and the discriminator D(d, x) says whether the patch x
is labelled. Network and discriminator learn by turns:

    L = L_Dice + 0.3 mean (d_l - T(y))^2 + weight CE(D(d_u, x_u), labelled)             D in eval mode, kept
    L_D = CE(D(d, x), labelled for the labelled patches, else unlabelled)               the network in eval mode, kept

T(y) is the label's signed distance map. As in the authors' code, D sees predicted maps of labelled patches too, from a
further pass of the network after its step. The weight is 0.01 for 16 labelled cases, and for 8 --consistency 0.015.
With several classes D sees the maps of all foreground classes. The network without its second head is the result.
"""

from mtseg.script import flags

PARSER = flags.training_parser(__doc__, model="SASSNet", unlabeled=True)
PARSER.set_defaults(loss="dice")
flag, rare = PARSER.group("shape-aware semi-supervised segmentation")
flag("--consistency", type=flags.rate, default=0.01, help="weight of the adversarial loss after its ramp")
flag("--consistency_rampup", type=flags.rate, default=40.0, help="length of the ramp, in blocks of 150 iterations")
flag("--distance_weight", type=flags.rate, default=0.3, help="weight of the signed distances on labelled patches")
rare("--discriminator_lr", type=flags.rate, default=1e-4, help="learning rate of the discriminator, by Adam")
flags.answer_help(PARSER, __name__)

import torch

from mtseg.distances import WithDistances, signed_distances
from mtseg.losses import cross_entropy_loss, masked_mean
from mtseg.networks.discriminator import Discriminator
from mtseg.optim import Schedule, Updater, gradient_scaler, make_optimizer
from mtseg.ramps import consistency_weight
from mtseg.script import build
from mtseg.script.run import script_main


def train(args, run):
    if min(args.patch_size) < 16:
        raise flags.FlagError("--patch_size has a side below 16, and SASSNet's discriminator halves each four times")
    # ------------------------------------------------------- data, network, its head, discriminator, two optimizers
    data = build.read_data(args, run)
    data.note_on_borders(args)
    model = build.make_network(args, run, data.n_channels)
    two_headed = WithDistances(model, args.num_classes, args.dims).to(run.device)
    discriminator = Discriminator(args.num_classes - 1, data.n_channels, args.dims).to(run.device)
    student, discriminate = build.make_forward(args, run, two_headed), build.make_forward(args, run, discriminator)
    updater = build.make_updater(args, run, two_headed.parameters())
    adam = make_optimizer("adam", discriminator.parameters(), args.discriminator_lr, weight_decay=0, betas=(0.9, 0.99))
    constant = Schedule(adam, "constant", args.max_iterations)
    discriminator_updater = Updater(adam, constant, gradient_scaler(run.device, args.amp))
    others = {f"discriminator_{name}": part for name, part in discriminator_updater.parts().items()}
    others |= {"distance_head": two_headed.head, "discriminator": discriminator}
    supervised = build.make_supervised(args, run)
    labeled_bs = data.labeled_bs
    ramp = (args.consistency_ramp, args.consistency_rampup, args.consistency_warmup)

    # ---------------------------------------------------------------------------------------------------- training
    with run.started(data, {"student": model}, updater, **others):
        for iteration, volume, label in run.batches():  # labelled patches first; the others' labels are hidden
            discriminator.eval().requires_grad_(False)
            with run.autocast:
                outputs = student(volume)
                verdict = discriminator(torch.cat([outputs[-1], volume], 1)[labeled_bs:])

            label = run.joint(label[:labeled_bs])
            *logits, distances = run.joint([output[:labeled_bs] for output in outputs])
            supervised_loss, parts = supervised(logits, label)
            error = (distances.float() - signed_distances(label, args.num_classes)).square()
            distance_loss = masked_mean(error, label != data.unknown)
            verdict = run.joint(verdict)
            adversarial_loss = cross_entropy_loss(verdict, verdict.new_ones(len(verdict)))  # 1: labelled
            weight, phase = consistency_weight(iteration, args.consistency, *ramp)
            loss = supervised_loss + args.distance_weight * distance_loss + weight * adversarial_loss
            updater.step(loss)

            model.eval()
            discriminator.train().requires_grad_(True)
            with run.autocast:
                with torch.no_grad():
                    distances = two_headed(volume)[-1]
                (verdict,) = discriminate(torch.cat([distances, volume], 1))
            model.train()
            verdict, truth = run.joint([verdict, (torch.arange(len(volume), device=run.device) < labeled_bs).long()])
            discriminator_loss = cross_entropy_loss(verdict, truth)
            discriminator_updater.step(discriminator_loss)

            row = {"phase": phase, "loss": loss, **parts, "supervised_loss": supervised_loss}
            row |= {"consistency_weight": weight, "adversarial_loss": adversarial_loss, "distance_loss": distance_loss}
            row |= {"discriminator_loss": discriminator_loss}
            run.end_iteration(**row, discriminator_accuracy=(verdict.argmax(1) == truth).float().mean())


main = script_main(train, PARSER, __file__)

if __name__ == "__main__":
    main()
