"""Denoisers (x, sigma) -> s of images, which fill the prox slot of an iteration (plug-and-play, Example 20)."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from convexlearn.checks import SIZES, checked, count
from convexlearn.errors import OptionError, ShapeError
from convexlearn.networks import initialise
from convexlearn.prox_arguments import as_signal, as_weight
from convexlearn.randomness import as_generator


class Denoiser(nn.Module):
    """Any module network(x, sigma) on images `(B, C, h, w)` as the denoiser in a prox slot, deepinv's included.

    It is called with the variable of the slot, an image `(B, h, w)` (then C = 1) or `(B, C, h, w)`, or with
    image=(h, w) or (C, h, w) its pixels row by row `(B, n)`; and with sigma `()` or `(B,)`, the standard deviation of
    the noise in units of the image. The network is trained with the rule that holds it, unless
    `rule.freeze("prox")`. A ShapeError tells what the network returned where that is no such image.

    For instance `admm.replace(prox=cl.Denoiser(deepinv.models.DRUNet(1, 1, pretrained=file)))`. A module that takes
    the variable as it is, such as DnCNN an image, needs no wrapper. Source: Eq. 26; Chan et al. 2016 (reference 34).

    >>> class Halve(nn.Module):
    ...     def forward(self, x, sigma, **kwargs):
    ...         return x / (1 + sigma**2)
    >>> Denoiser(Halve(), image=(1, 2))(torch.ones(1, 2), torch.tensor(1.0))
    tensor([[0.5000, 0.5000]])
    """

    def __init__(self, network: nn.Module, *, image: tuple[int, ...] | None = None) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise OptionError(f"Denoiser wraps an nn.Module that is called as network(x, sigma), got {network!r}")
        if image is not None and (not SIZES.fits(image) or len(image) not in (2, 3)):
            raise OptionError(f"Denoiser: image must be (h, w) or (C, h, w), got {image!r}")
        self.network, self.image = network, image

    def forward(self, v: Tensor, sigma: Any) -> Tensor:
        """The denoised variable, in the shape of v."""
        images = as_images(v, self.image)
        weight = next(self.network.parameters(), images)
        level = _level(sigma, images).to(weight.dtype)
        s = self.network(images.to(weight.dtype), level)
        if not isinstance(s, Tensor):
            raise ShapeError(f"the denoiser {type(self.network).__name__} must return images, got {type(s).__name__}")
        if s.shape != images.shape:
            raise ShapeError(
                f"the denoiser {type(self.network).__name__} must return images {tuple(images.shape)} as it was given, "
                f"got {tuple(s.shape)}; padding keeps the size of an image, and some networks need sides that "
                "are multiples of a power of two"
            )
        return s.to(images.dtype).reshape(images.shape[:1] + torch.as_tensor(v).shape[1:])


class DnCNN(nn.Module):
    """Convolutional network that predicts the noise (Zhang et al. 2017), told its level by a channel of sigma.

    x `(B, h, w)` or `(B, C, h, w)`, intensities around [0, 1]; sigma a number, `()` or `(B,)`, in the same units.
    Returns x - sigma R(x, sigma), R of `depth` convolutions of 3x3 with `width` channels, without batch normalization;
    so it keeps x as sigma falls to zero, and its last layer starts at zero: untrained, it is the identity. The level
    as an input is that of FFDNet (Zhang, Zuo, Zhang 2018). Computed in its own dtype, returned in that of x.

    >>> DnCNN(width=8, depth=3)(torch.ones(2, 4, 5), 0.1).shape
    torch.Size([2, 4, 5])
    """

    @checked(channels=count(), width=count(), depth=count(2))
    def __init__(self, *, channels: int = 1, width: int = 32, depth: int = 6, seed: int | torch.Generator = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise([channels + 1, *[width] * (depth - 1), channels]):
            layers += [nn.utils.skip_init(nn.Conv2d, before, after, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        self.channels = channels
        initialise(self.layers, as_generator("DnCNN", seed))
        nn.init.zeros_(self.layers[-1].weight)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor, sigma: Any) -> Tensor:
        """Images of the shape of x."""
        given = as_images(x)
        if given.shape[1] != self.channels:
            raise ShapeError(f"DnCNN: x must have {self.channels} channels, got images {tuple(given.shape)}")
        images = given.to(next(self.parameters()).dtype)
        level = _level(sigma, images).reshape(-1, 1, 1, 1)
        noise = self.layers(torch.cat([images, level.expand(len(images), 1, *images.shape[2:])], 1))
        return (images - level * noise).to(given.dtype).reshape(torch.as_tensor(x).shape)


def _level(sigma: Any, images: Tensor) -> Tensor:
    """The noise level `()` or `(B,)`, at least zero, in the dtype of the images."""
    level = as_weight("denoiser", sigma, images, (len(images),), "sigma")
    return torch.as_tensor(level, dtype=images.dtype, device=images.device)


def as_images(v: Tensor, image: tuple[int, ...] | None = None) -> Tensor:
    """v `(B, h, w)`, `(B, C, h, w)`, or with `image` pixels `(B, n)`, as images `(B, C, h, w)`."""
    v = as_signal("denoiser", v, real=True)
    if image is not None:
        if v.ndim != 2 or v.shape[1] != math.prod(image):
            raise ShapeError(f"a denoiser of images {image} takes pixels (B, {math.prod(image)}), got {tuple(v.shape)}")
        return v.reshape(len(v), *([1] if len(image) == 2 else []), *image)
    if v.ndim not in (3, 4) or 0 in v.shape[1:]:
        raise ShapeError(
            f"a denoiser takes images (B, h, w) or (B, C, h, w), got {tuple(v.shape)}; for a variable that is a vector "
            "of pixels row by row wrap it in Denoiser(network, image=(h, w))"
        )
    return v.unsqueeze(1) if v.ndim == 3 else v
