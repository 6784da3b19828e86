"""Small networks that fill slots and serve as T5 rules, with weights that a seed determines."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from convexlearn.checks import SIZES, count, instance, require_that
from convexlearn.errors import OptionError, ShapeError
from convexlearn.inputs import as_floating
from convexlearn.randomness import as_generator


def initialise(network: nn.Module, seed: int | torch.Generator = 0) -> nn.Module:
    """Draw the weights of all linear and convolutional layers from `seed`, biases zero; returns `network`.

    Normal with variance 2 / fan-in (He et al. 2015), so that signals keep their size through ReLUs.

    >>> bool((initialise(nn.Linear(2, 2), 0).weight == initialise(nn.Linear(2, 2), 0).weight).all())
    True
    """
    require_that("initialise", "network", instance(nn.Module, "an nn.Module"), network)
    generator = as_generator("initialise", seed)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
                deviation = math.sqrt(2 / max(1, layer.weight[0].numel()))
                drawn = torch.randn(layer.weight.shape, generator=generator, dtype=layer.weight.dtype)
                layer.weight.copy_(deviation * drawn)
                if layer.bias is not None:
                    layer.bias.zero_()
    return network


def mlp(
    inputs: int,
    outputs: int,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.ReLU,
    seed: int | torch.Generator = 0,
) -> nn.Sequential:
    """Fully connected network, with ReLUs unless told otherwise: x `(B, inputs)` -> `(B, outputs)`.

    >>> mlp(3, 2, hidden=(8,))(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """
    for name, size in {"inputs": inputs, "outputs": outputs}.items():
        require_that("mlp", name, count(), size)
    require_that("mlp", "hidden", SIZES, hidden)
    if not callable(activation):
        raise OptionError(f"mlp: activation must be a class of modules, such as nn.SiLU, got {activation!r}")
    generator = as_generator("mlp", seed)
    sizes = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.utils.skip_init(nn.Linear, before, after), activation()]
    network = nn.Sequential(*layers[:-1])
    initialise(network, generator)
    return network


class ImageNetwork(nn.Module):
    """Small residual convolutional network: images `(B, h, w)` or `(B, C, h, w)` -> the same, r times larger.

    Interpolates by `upsample` (r, bicubic), then adds a correction computed by `depth` convolutions on
    the small image, whose channels are rearranged to pixels (Shi et al. 2016); Example 11 of the paper.
    The last layer starts at zero, so that an untrained network interpolates. Computed in its own dtype, returned in
    that of x.

    >>> ImageNetwork(upsample=2)(torch.ones(1, 8, 8)).shape
    torch.Size([1, 16, 16])
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        width: int = 16,
        depth: int = 3,
        upsample: int = 1,
        seed: int | torch.Generator = 0,
    ) -> None:
        super().__init__()
        for name, value in {"channels": channels, "width": width, "depth": depth, "upsample": upsample}.items():
            require_that("ImageNetwork", name, count(), value)
        self.channels, self.upsample = channels, upsample
        sizes = [channels, *[width] * (depth - 1), channels * upsample**2]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.utils.skip_init(nn.Conv2d, before, after, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        initialise(self.layers, as_generator("ImageNetwork", seed))
        last = layers[-2]
        if isinstance(last, nn.Conv2d):
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, r h, r w)` or `(B, C, r h, r w)`."""
        x = as_floating("x", x, "ImageNetwork: input")
        images = x.unsqueeze(1) if x.ndim == 3 else x
        if images.ndim != 4 or images.shape[1] != self.channels or 0 in images.shape[2:]:
            raise ShapeError(
                f"ImageNetwork: x must be images (B, h, w) or (B, {self.channels}, h, w), got {tuple(x.shape)}"
            )
        # pixel_shuffle by hand: torch's has no gradient for an empty batch
        (B, _, h, w), r, C = images.shape, self.upsample, self.channels
        correction = (
            self.layers(images.to(next(self.parameters()).dtype))
            .to(x.dtype)
            .reshape(B, C, r, r, h, w)
            .permute(0, 1, 4, 2, 5, 3)
        )
        correction = correction.reshape(B, C, h * r, w * r)
        base = images
        if self.upsample > 1:
            base = nn.functional.interpolate(
                images, scale_factor=float(self.upsample), mode="bicubic", align_corners=False
            )
        s = base + correction
        return s.squeeze(1) if x.ndim == 3 else s
