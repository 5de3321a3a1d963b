"""The networks that --network names: V-Net, U-Nets, encoders with decoders, one's own; the files they start from."""

import functools
import importlib.util
import inspect
from pathlib import Path

import torch

from mtseg.checkpoint import load_checkpoint
from mtseg.finetuning import stages_of
from mtseg.networks import NETWORKS as COMPLETE
from mtseg.networks.convnext import ConvNeXtT
from mtseg.networks.decoders import DeepLabV3Plus, EncoderDecoder, Pyramid, UNetDecoder
from mtseg.networks.dinov2 import DINOv2
from mtseg.networks.efficientnet import EfficientNetB0
from mtseg.networks.resnet import ResNet
from mtseg.safetensors_file import load_safetensors
from mtseg.script.checks import ENCODED, FlagError, check_network_fits, is_own

# Each takes a number of channels and an output stride; ConvNeXt and DINOv2 have but one.
ENCODERS = {f"resnet{depth}": functools.partial(ResNet, depth) for depth in (18, 34, 50)}
ENCODERS |= {"efficientnet_b0": EfficientNetB0, "convnext_t": lambda n_channels, _: ConvNeXtT(n_channels)}
ENCODERS["efficientnet_b0_tf"] = functools.partial(EfficientNetB0, tensorflow=True)
ENCODERS["dinov2_vits14"] = lambda n_channels, _: Pyramid(DINOv2(n_channels))
ENCODERS["dinov2_vits14_reg"] = lambda n_channels, _: Pyramid(DINOv2(n_channels, registers=4))
DECODERS = {"unet": UNetDecoder, "deeplab": DeepLabV3Plus}


class Encoded(EncoderDecoder):
    """The network of images that a `name` in ENCODED stands for; each is a class of its own, with its `name`."""

    def __init__(self, n_channels, n_classes, n_filters, normalization, has_dropout, dims):
        if dims != 2:
            raise ValueError(f"dims is {dims!r}; {self.name} takes images")
        encoder, decoder = self.name.rsplit("_", 1)
        settings = {"n_filters": n_filters, "normalization": normalization, "has_dropout": has_dropout}
        encoder = ENCODERS[encoder](n_channels, ENCODED[self.name])
        super().__init__(encoder, DECODERS[decoder], n_classes=n_classes, **settings)


NETWORKS = COMPLETE | {name: type(name, (Encoded,), {"name": name}) for name in ENCODED}


# What some methods begin in, and a network of one's own need not have.
PARTS = ("encode", "decode", "classify", "another_decoder", "channels")


class Own:
    """What a network of one's own, `word`, gets beside its class: defaults, and a sentence for what it lacks."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in PARTS:
                raise
        raise FlagError(
            f"--network {self.word} has no {name}, which this method needs: net(x) must be "
            f"net.classify(net.decode(net.encode(x))), as VNet's docstring says; add it, or take another method"
        )

    @staticmethod
    def settings_of(state):
        """What the weights tell of the network's settings: nothing."""
        return {}


def load_own(flag, word):
    """(path, what the file at it has under this name) of FILE.py:NAME, the value `word` of a `flag`; the file runs."""
    path, _, name = word.rpartition(":")
    if not Path(path).is_file():
        raise FlagError(f"{flag} {word}: there is no file {path}; give FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(f"own_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise FlagError(f"{flag} {word}: {path} cannot be loaded ({type(error).__name__}: {error}); mend it") from error
    return path, getattr(module, name, None)


def network_class(word):
    """The class that --network `word` names: of NETWORKS, or, of FILE.py:CLASS, of a file, which runs as it is read.

    Call it with the settings of flags.network_settings by name; a class of one's own gets those that it takes.
    """
    if not is_own(word):
        return NETWORKS[word]
    path, kind = load_own("--network", word)
    if not (inspect.isclass(kind) and issubclass(kind, torch.nn.Module)):
        name = word.rpartition(":")[2]
        raise FlagError(f"--network {word}: {path} has no class {name} that is a torch.nn.Module; mend it")
    return type(kind.__name__, (Own, kind), {"word": word, "__init__": functools.partialmethod(make_own, kind)})


def make_own(self, kind, **settings):
    """The constructor of a network of one's own, with those of the `settings` that its class takes."""
    taken = inspect.signature(kind).parameters
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    given = {name: value for name, value in settings.items() if everything or name in taken}
    try:
        kind.__init__(self, **given)
        self.not_taken = settings.keys() - given.keys()
    except TypeError as error:
        raise FlagError(
            f"--network {self.word}: {error}; it must take n_channels and n_classes, and may take n_filters, "
            f"normalization, has_dropout and dims"
        ) from error
    if not hasattr(self, "divisors"):
        self.divisors = (1,) * settings["dims"]


def check_own(net, patch_size, n_channels, n_classes):
    """FlagError where a network of one's own does not give logits (N, classes, *sides) of a patch."""
    check_network_fits(patch_size, net.divisors)
    with torch.no_grad():
        try:
            output = net.eval()(torch.zeros(1, n_channels, *patch_size))
        except (RuntimeError, ValueError, TypeError) as error:
            raise FlagError(f"--network {net.word} takes no patch of {tuple(patch_size)} ({error}); mend it") from error
    net.train()
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    wanted = (1, n_classes, *patch_size)
    if shape != wanted:
        raise FlagError(f"--network {net.word} gives {shape} in eval mode and must give logits {wanted}; mend it")


def check_stages(args, net):
    """FlagError where flags are about the encoder of a network of one's own that does not say what of it is one."""
    asked = {
        "encoder_lr_factor": args.encoder_lr_factor != 1,
        "layer_decay": args.layer_decay != 1,
        "pretrained_parts": args.pretrained_parts == "encoder",
        "freeze": args.freeze in ("stem", "encoder"),
    }
    name = next((name for name in asked if asked[name]), None)
    if name and not stages_of(net):
        raise FlagError(
            f"--{name} {getattr(args, name)}: --network {args.network} does not say what its encoder is; give the "
            f"class stages, as docs/pretraining.md says, or leave the flag out"
        )


def load_pretrained(path):
    """What lies in a checkpoint or a .safetensors file."""
    return load_safetensors(path) if Path(path).suffix == ".safetensors" else load_checkpoint(path)
