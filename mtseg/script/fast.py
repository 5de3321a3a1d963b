"""What --fast means on a device: the one place that decides it."""

import os
import shutil

import torch

from mtseg.winograd import WinogradError, check_compiler, winograd_convolutions

WORDS = {
    "channels_last": "channels_last",
    "winograd": "Winograd's convolutions",
    "tf32": "TF32",
    "compile": "torch.compile",
}


def switch_on(args, device):
    """Set in `args` what --fast stands for on `device`, beside what other flags ask for; returns notes for the log.

    Afterwards `args` has channels_last, winograd, tf32 and compile, True or False; what is False before, as by
    --no-compile, stays so. What is chosen depends on the machine and the flags alone, so that a resumed run chooses the
    same. float32 convolutions on a GPU round their factors to TF32, with 10 bits instead of 23, only with --fast;
    PyTorch's own default is that they do.
    """
    asked = {name: getattr(args, name, None) for name in WORDS}
    chosen, notes = set(), []
    if args.fast:
        settings, why_not = {"channels_last": True}, ""
        if device.type == "cpu":
            why_not = "" if asked["winograd"] is False else _why_not_winograd(args)
            settings["winograd"] = not why_not
        else:
            settings |= {"tf32": True, "compile": _can_compile(args)}
        chosen = {name for name, on in settings.items() if on and asked[name] is not False}
        notes.append(f"--fast: {', '.join(WORDS[name] for name in WORDS if name in chosen) or 'nothing'}{why_not}")
    vars(args).update({name: name in chosen or bool(asked[name]) for name in WORDS})
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    return notes


def convolutions(args, net):
    """`net` with Winograd's convolutions where `args` ask for them; with --fast only where a layer suits them."""
    try:
        return winograd_convolutions(net) if args.winograd else net
    except WinogradError:
        if not args.fast:
            raise
        return net


def _why_not_winograd(args):
    """The words behind the log's sentence where Winograd's convolutions are left out, else ''."""
    if getattr(args, "compile", False) or getattr(args, "amp", "off") != "off":
        return f"; without {WORDS['winograd']}, which are for float32 in eager mode"
    try:
        check_compiler()
    except WinogradError as error:
        return f"; without {WORDS['winograd']}: {error}"
    return ""


def _can_compile(args):
    """Whether torch.compile can be used on a GPU: in training, with Triton and the C compiler that it needs."""
    if not hasattr(args, "gradient_checkpointing") or args.gradient_checkpointing:
        return False
    from torch.utils._triton import has_triton

    return has_triton() and any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang")))
