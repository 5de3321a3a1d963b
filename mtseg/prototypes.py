"""Prototypes of classes, and the distance of voxels' feature vectors to those of their class.

Wu et al., "Exploring Smoothness and Class-Separation for Semi-supervised Medical Image Segmentation" (SS-Net), MICCAI
2022 (arXiv:2203.01324), after Alonso et al., ICCV 2021 (arXiv:2104.13415). Vectors are float (n, channels), one a
voxel; labels integer (n,). A label that is none of the classes takes no part.
"""

import torch
import torch.nn.functional as F
from torch import nn


class WithFeatures(nn.Module):
    """`net`, which has encode, decode and classify, as a network that gives [logits, ..., features]: after its outputs
    the features (N, channels, *spatial) that the first of them is made of."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        decoded = self.net.decode(self.net.encode(batch))
        outputs = self.net.classify(decoded)
        return [*(outputs if isinstance(outputs, list) else [outputs]), decoded[0]]


def draw_voxels(number, features, *maps):
    """[vectors (n, C), values (n,) of each of `maps`] at the same n = min(number, all) voxels of a batch.

    `features` (N, C, *spatial), `maps` (N, *spatial). The voxels are drawn by PyTorch's generator with replacement,
    all equally often; where `number` reaches all of them, each is taken once. Vectors are float32, with a gradient.
    ValueError for maps of another shape.
    """
    if any(values.shape != features.shape[:1] + features.shape[2:] for values in maps):
        shapes = ", ".join(str(tuple(values.shape)) for values in maps)
        raise ValueError(f"maps of {shapes} for features of {tuple(features.shape)}: give (N, *spatial)")
    features, device = features.flatten(2), features.device
    size = features.shape[2]
    voxels = len(features) * size
    index = torch.randint(voxels, (number,), device=device) if number < voxels else torch.arange(voxels, device=device)
    # Both axes are indexed at once: with the channels moved last, all voxels would be copied.
    return [features[index // size, :, index % size].float(), *(values.flatten()[index] for values in maps)]


class ClassPrototypes(nn.Module):
    """Chooses prototypes of `classes` (some of the numbers below `num_classes`), and pulls vectors towards them.

    `channels`: of the vectors, which two small networks project and predict to `size` numbers. For each class a
    selector scores vectors, and another one prototypes.
    """

    def __init__(self, channels, num_classes, classes, size=32):
        super().__init__()
        self.num_classes, self.classes = num_classes, list(classes)
        self.projection = perceptron(channels, size, size, nn.ReLU())
        self.prediction = perceptron(size, size, size, nn.ReLU())
        self.selectors = nn.ModuleList(perceptron(size, size, 1, nn.LeakyReLU(0.2)) for _ in self.classes)
        self.prototype_selectors = nn.ModuleList(perceptron(size, size, 1, nn.LeakyReLU(0.2)) for _ in self.classes)

    @torch.no_grad()
    def choose(self, vectors, labels, number=32, best=False):
        """A list with the prototypes of each class: the up to `number` projections (k, size) of its vectors with the
        lowest scores, or with `best` the highest. Batch norm uses its running statistics. No gradient flows."""
        mode = self.training
        self.eval()
        projected, chosen = self.projection(vectors), []
        for number_of_class, selector in zip(self.classes, self.selectors, strict=True):
            candidates = projected[labels == number_of_class]
            scores = selector(candidates).squeeze(1)
            chosen.append(candidates[scores.topk(min(number, len(scores)), largest=best).indices])
        self.train(mode)
        return chosen

    def forward(self, vectors, labels, prototypes):
        """1/C sum_c mean_ij a_i b_j (1 - cos(g_i, m_j)), a scalar: g_i are the predictions of the vectors of class c
        and m_j its prototypes, as `choose` gives them; a and b are their scores' sigmoids, divided by their mean.

        A class with fewer than two of either counts 0. Gradients reach the prototypes' selectors, not the prototypes.
        """
        predicted = self.prediction(self.projection(vectors))
        loss = predicted.new_zeros(())
        parts = zip(self.classes, prototypes, self.selectors, self.prototype_selectors, strict=True)
        for number_of_class, kept, selector, prototype_selector in parts:
            of_class = predicted[labels == number_of_class]
            if min(len(of_class), len(kept)) > 1:
                a, b = attention(selector(of_class.detach())), attention(prototype_selector(kept))
                # The mean over all pairs without the pairs: a and b have mean 1, and a cosine is a product of vectors.
                loss = loss + 1 - (a * F.normalize(of_class)).mean(0) @ (b * F.normalize(kept)).mean(0)
        return loss / self.num_classes


def perceptron(channels, hidden, out, activation):
    return nn.Sequential(nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), activation, nn.Linear(hidden, out))


def attention(scores):
    weights = scores.sigmoid()
    return weights / weights.mean(0)
