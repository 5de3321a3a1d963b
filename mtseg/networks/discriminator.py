"""The discriminator of SASSNet: from which kind of patch, labelled or not, are these signed distance maps?"""

from torch import nn


class Discriminator(nn.Module):
    """Two logits (N, 2) from an image and the maps that were predicted for it.

    Li et al., "Shape-aware Semi-supervised 3D Semantic Segmentation for Medical Images" (arXiv:2007.10732).
    Input: float (N, n_maps + n_channels, *spatial), the maps first, with `dims` (2 or 3) sides of at least 16 voxels.
    Maps and image pass a convolution each, whose sum three more follow, all of kernel 4 and stride 2 with 64, 128, 256
    and 512 channels; after each LeakyReLU, and after the first three in training mode whole channels dropped with
    p = 0.5. The mean over space goes through a linear layer, so that patches may have any size.
    """

    def __init__(self, n_maps, n_channels, dims=3):
        super().__init__()
        conv, dropout = (nn.Conv2d, nn.Conv3d)[dims - 2], (nn.Dropout2d, nn.Dropout3d)[dims - 2]
        self.parts = n_maps, n_channels
        self.maps, self.image = conv(n_maps, 64, 4, 2, 1), conv(n_channels, 64, 4, 2, 1)
        layers = [nn.LeakyReLU(0.2), dropout(0.5)]
        for channels in (64, 128, 256):
            layers += [conv(channels, 2 * channels, 4, 2, 1), nn.LeakyReLU(0.2), dropout(0.5)]
        self.layers = nn.Sequential(*layers[:-1])
        self.classify = nn.Linear(512, 2)

    def forward(self, maps_and_image):
        maps, image = maps_and_image.split(self.parts, 1)
        return self.classify(self.layers(self.maps(maps) + self.image(image)).flatten(2).mean(2))
