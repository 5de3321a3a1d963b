"""DINOv2's ViT-S/14, with and without registers, as an encoder, under its authors' names: their weights, timm's and
transformers' load.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (arXiv:2304.07193); Darcet et al., "Vision
Transformers Need Registers" (arXiv:2309.16588).
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Self-attention of tokens (N, T, C) with `heads` heads."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and perceptron, each after layer norm, scaled, and its input added."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, mlp = Attention(width, heads), [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        self.mlp = nn.Sequential(OrderedDict(zip(("fc1", "act", "fc2"), mlp, strict=True)))
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(width)}) for _ in range(2))

    def forward(self, x):
        x = x + self.ls1.gamma * self.attn(self.norm1(x))
        return x + self.ls2.gamma * self.mlp(self.norm2(x))


class DINOv2(nn.Module):
    """The features of an image after a quarter, half, three quarters and all of the blocks, with the last layer norm on
    each: four maps (N, width, H / 14, W / 14), which `decoders.Pyramid` brings to four sizes.

    Input: float (N, n_channels, H, W) with sides that are multiples of 14: pad, do not resize. `registers`: 4 of the
    models with registers, else 0. `grid`: the side, in patches, of the images whose positions the weights know; other
    sizes get theirs by interpolation as the authors do it. ViT-S/14 has 22 056 576 parameters, of which the mask token,
    which has no use here, is a buffer.
    """

    divisor = 14
    stem = "patch_embed.proj.weight"  # the one weight whose shape tells the number of input channels

    def __init__(self, n_channels=3, registers=0, width=384, depth=12, heads=6, grid=37):
        super().__init__()
        if depth % 4:
            raise ValueError(f"{depth} blocks: take a multiple of 4, after whose quarters the features are taken")
        self.channels, self.strides, self.grid = (width,) * 4, (14,) * 4, grid
        # Beginnings of the names of the stages' weights; here each block is one.
        self.stages = [("cls_token", "register_tokens", "mask_token", "pos_embed", "patch_embed.")]
        self.stages += [(f"blocks.{number}.",) for number in range(depth - 1)]
        self.stages += [(f"blocks.{depth - 1}.", "norm.")]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid**2 + 1, width))
        self.register_buffer("mask_token", torch.zeros(1, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(n_channels, width, 14, 14)))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    def positions(self, height, width):
        """The embeddings of height x width positions, float (1, C, height, width)."""
        known = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        if height == width == self.grid:
            return known
        # Without registers, the authors enlarge by the ratio of the sides plus 0.1 of a patch: against rounding, once.
        how = {"size": (height, width), "antialias": True}
        if self.register_tokens is None:
            how = {"scale_factor": ((height + 0.1) / self.grid, (width + 0.1) / self.grid)}
        return F.interpolate(known.float(), mode="bicubic", **how).to(known.dtype)

    def forward(self, x):
        x = self.patch_embed(x)
        _, _, height, width = x.shape
        x = (x + self.positions(height, width)).flatten(2).transpose(1, 2)
        first = [self.cls_token + self.pos_embed[:, :1]]
        first += [] if self.register_tokens is None else [self.register_tokens]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in first), x], dim=1)
        features = []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number % (len(self.blocks) // 4) == 0:
                patches = self.norm(x)[:, -height * width :]
                features.append(patches.transpose(1, 2).unflatten(2, (height, width)))
        return features

    @staticmethod
    def translate(state):
        """The state_dict `state` under DINOv2's names, where it is under timm's or transformers'."""
        replaced = {"embeddings.patch_embeddings.projection": "patch_embed.proj"}
        replaced |= {"embeddings.position_embeddings": "pos_embed", "embeddings.": "", "encoder.layer.": "blocks."}
        replaced |= {"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "layernorm.": "norm."}
        replaced |= {"attention.output.dense": "attn.proj", "attention.o_proj": "attn.proj"}
        for part in ("query", "key", "value"):
            replaced |= {f"attention.attention.{part}": f"attn.{part}", f"attention.{part[0]}_proj": f"attn.{part}"}
        translated = {}
        for name, value in state.items():
            name = name.removeprefix("dinov2_with_registers.").removeprefix("dinov2.")
            for theirs, ours in replaced.items():
                name = name.replace(theirs, ours)
            translated[name] = value
        for name in [name for name in translated if ".attn.query." in name]:
            parts = [translated.pop(name.replace("query", part), None) for part in ("query", "key", "value")]
            if all(part is not None for part in parts):
                translated[name.replace("query", "qkv")] = torch.cat(parts)
        if "reg_token" in translated:  # timm has added the position of the class's token to it
            translated["register_tokens"], positions = translated.pop("reg_token"), translated["pos_embed"]
            translated["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
        if "pos_embed" in translated:  # timm leaves the mask's token out
            translated.setdefault("mask_token", torch.zeros_like(translated["pos_embed"][0, :1]))
        return translated
