"""Fine-tuning of pretrained networks: which weights to take over, to hold fixed, and to move more slowly than others.

A network here has `stages`, for each of its encoder's stages, finest first, the beginnings of its weights' names, and
`head`, that of its last layer's. What is of neither is the decoder's; of a network without them, all.
"""

import re
from itertools import pairwise

import torch

BatchNorm = torch.nn.modules.batchnorm._BatchNorm


class FinetuningError(ValueError):
    """Parts that a network has not, or nothing left to learn; the message is one sentence with the remedy."""


def stages_of(net):
    return getattr(net, "stages", ())


def stage_of(net, name):
    """The number of the encoder's stage that the weight `name` of `net` is of, from 0; None of decoder and head."""
    return next((n for n, prefixes in enumerate(stages_of(net)) if name.startswith(tuple(prefixes))), None)


def names_of(net, parts):
    """The names of the weights and buffers of `net` that are of its 'stem', its 'encoder', of 'all' of it but the head,
    or of the whole 'network'; with any other word those that it fits from their beginning on, as a regular expression.
    """
    stages = {name: stage_of(net, name) for name in net.state_dict()}
    if parts == "stem":
        return [name for name, stage in stages.items() if stage == 0]
    if parts == "encoder":
        return [name for name, stage in stages.items() if stage is not None]
    if parts == "all":
        return [name for name in stages if not (hasattr(net, "head") and name.startswith(net.head))]
    try:
        return [name for name in stages if parts == "network" or re.match(parts, name)]
    except re.error as error:
        raise FinetuningError(f"{parts!r} is no regular expression ({error}); give encoder, stem or another") from error


def learning_rates(net, encoder_factor=1.0, layer_decay=1.0):
    """{parameter: factor of its learning rate}, of those whose factor is not 1.

    The encoder's is `encoder_factor` times `layer_decay` to the power of the stages between a weight's own stage and
    the decoder: of S stages, the stem's exponent is S. So does BEiT (Bao et al., arXiv:2106.08254), by layers.
    """
    factors = {}
    for name, parameter in net.named_parameters():
        stage = stage_of(net, name)
        factor = 1.0 if stage is None else encoder_factor * layer_decay ** (len(stages_of(net)) - stage)
        if factor != 1.0:
            factors[parameter] = factor
    return factors


def freeze(net, parts):
    """Hold the weights of `names_of(net, parts)` fixed. Batch norms among them compute as in eval mode, by their
    running statistics, also while `net` is in training mode. FinetuningError where that is nothing, or everything."""
    chosen = {*names_of(net, parts)}
    parameters = dict(net.named_parameters())
    if not chosen & parameters.keys():
        some = ", ".join([*parameters][:3])
        raise FinetuningError(f"{parts!r} fits no weight of the network, whose first names are {some}; mend it")
    if parameters.keys() <= chosen:
        raise FinetuningError(f"{parts!r} fits every weight of the network, so nothing would learn; take fewer")
    for name in chosen & parameters.keys():
        parameters[name].requires_grad_(False)
    for name, module in net.named_modules():
        if isinstance(module, BatchNorm) and f"{name}.running_mean" in chosen:
            module.register_forward_pre_hook(to_eval)
            module.frozen = True


def unfreeze(net):
    """Let the batch norms of `net` that `freeze` holds in eval mode be in the mode of `net` again. Which weights learn
    again is the caller's choice, as a copy of `net`, a teacher, has the same batch norms and never learns."""
    for module in net.modules():
        if getattr(module, "frozen", False):
            module.frozen = False
            module.train(net.training)


def to_eval(module, _):
    """Before its forward pass: a batch norm that `freeze` holds is in eval mode, whatever the network is in."""
    if module.frozen:
        module.training = False


@torch.no_grad()
def take_norms(net, fresh):
    """Give the weights of each convolution of `net` that batch norm follows the norm that they have in `fresh`, a new
    network of its kind. What `net` computes stays the same but for rounding and batch norm's epsilon.

    Batch norm takes the size of such weights away, but a step of SGD turns large ones less than small ones: the rate
    that counts is lr / |w|^2 (van Laarhoven, "L2 Regularization versus Batch and Weight Normalization", 2017,
    arXiv:1706.05350). After long pretraining the same rate would hardly move them. Pairs of convolution and batch norm
    are found in an nn.Sequential, and where a module's `folds` has their names.
    """
    others = dict(fresh.named_modules())
    for name, block in net.named_modules():
        names = pairwise([*block._modules]) if type(block) is torch.nn.Sequential else getattr(block, "folds", ())
        for first, second in names:
            layer, norm = getattr(block, first), getattr(block, second)
            if isinstance(norm, BatchNorm) and hasattr(layer, "weight"):
                factor = getattr(others[name], first).weight.norm().to(layer.weight) / layer.weight.norm()
                layer.weight *= factor
                if layer.bias is not None:
                    layer.bias *= factor
                if norm.running_var is not None:
                    norm.running_mean *= factor
                    norm.running_var *= factor**2
