"""Perceptual loss: the distance of two images in the features of a VGG-19 (Johnson et al. 2016)."""

from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from ldm.checkpoint import MODELS, fill, read_weights

FILE = MODELS / "vgg19-dcbb9e9d.pth"  # the name torchvision gives it
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, images in [0, 1]
RELU1_2, RELU2_2, RELU3_3 = 3, 8, 15  # positions in torchvision's `features`


class PerceptualLoss(nn.Module):
    """Mean squared distance of VGG-19 features, summed over `layers`: one value per item.

    forward(restored, sharp): both (b, 3, h, w) in [-1, 1] -> (b,) (Johnson et al. 2016, eq. 2).
    The weights come from `models/vgg19-dcbb9e9d.pth` if it is there, else torchvision downloads them once,
    with a progress bar. Raises FileNotFoundError if there is no file and the download fails.
    """

    def __init__(self, layers: Sequence[int] = (RELU1_2, RELU2_2, RELU3_3), file: Path = FILE):
        super().__init__()
        self.layers = tuple(layers)
        features = _read_features(file).features[: max(layers) + 1]
        for layer in features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the next layer must not overwrite a compared feature
        self.features = features.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1))

    def forward(self, restored: Tensor, sharp: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self._features(sharp)
        distances = [
            (feature.float() - target.float()).square().mean(dim=(1, 2, 3))
            for feature, target in zip(self._features(restored), targets, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)

    def _features(self, image: Tensor) -> list[Tensor]:
        h = ((image + 1) / 2 - self.mean) / self.std
        features = []
        for index, layer in enumerate(self.features):
            h = layer(h)
            if index in self.layers:
                features.append(h)
        return features


def _read_features(file: Path) -> nn.Module:
    from torchvision.models import VGG19_Weights, vgg19  # here: not needed to restore images

    if Path(file).is_file():
        return fill(vgg19(), read_weights(file), file)
    try:
        return vgg19(weights=VGG19_Weights.IMAGENET1K_V1, progress=True)
    except (URLError, OSError) as error:
        raise FileNotFoundError(
            f"the perceptual loss needs VGG-19: put torchvision's {Path(file).name} at {file} "
            f"({VGG19_Weights.IMAGENET1K_V1.url}), or train without the perceptual loss. "
            f"Its download failed: {error}"
        ) from error
