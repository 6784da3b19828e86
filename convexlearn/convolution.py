"""Convolution with one trainable kernel: what fills a matrix slot where decisions are images."""

from collections.abc import Sequence
from typing import Any

import torch
from scipy.fft import next_fast_len
from torch import Tensor, nn

from convexlearn.checks import SIZES, checked, count, number, require_that, word
from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.prox_arguments import as_signal

BOUNDARIES = ("zero", "circular")

EXACT = 1e-10
"""A matrix that differs from a convolution by more than this, relative to its action, is none."""


class Convolution(nn.Module):
    """Images `(B, h, w)` convolved with a kernel `(k, l)`, real or complex: the response to an impulse is the kernel.

    upsample r: the images grow r times, and the impulse of pixel i covers r i - (k - r)//2 and the k - 1 pixels that
    follow, so that for r = 1 an odd kernel is centred. boundary: "zero" beyond the rim, or "circular". image
    `(h, w)`: takes pixels row by row instead, `(B, h w)`, or `(B, h w, q)` with q frames as columns. A complex kernel
    gives complex images; a real one acts on both parts of complex images alike. dtype and device follow the input.

    The kernel is trained by its real numbers, kept in `weight`: `(k, l)`, or `(k, l, 2)` for a complex one.
    Source: the convolutional slots of Solomon et al. 2019 (reference 37 of the paper).

    >>> blur = Convolution(torch.tensor([[0.0, 1.0, 0.0], [1.0, 4.0, 1.0], [0.0, 1.0, 0.0]]))
    >>> blur(torch.eye(2).unsqueeze(0)).detach()
    tensor([[[4., 2.],
             [2., 4.]]])
    """

    @checked(upsample=count(), boundary=word(BOUNDARIES))
    def __init__(
        self, kernel: Tensor, *, upsample: int = 1, boundary: str = "zero", image: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        kernel = as_signal("Convolution: kernel", kernel)
        if image is not None and (not SIZES.fits(image) or len(image) != 2):
            raise OptionError(f"Convolution: image must be (h, w), got {image!r}")
        if kernel.ndim != 2 or min(kernel.shape) < upsample:
            raise ShapeError(
                f"Convolution takes a kernel (k, l) with k, l >= upsample = {upsample}, got shape {tuple(kernel.shape)}"
            )
        if upsample == 1 and any(k % 2 == 0 for k in kernel.shape):
            raise ShapeError(
                f"Convolution: a kernel of even size {tuple(kernel.shape)} has no centre; pad it with zeros"
            )
        self.upsample, self.boundary, self.image = upsample, boundary, image
        start = kernel.detach().clone()
        self.weight = nn.Parameter(torch.view_as_real(start) if start.is_complex() else start)

    @classmethod
    def delta(
        cls, size: int, scale: complex | Tensor = 1.0, *, is_complex: bool = False, dtype: Any = None, **options: Any
    ) -> "Convolution":
        """The kernel `(size, size)` that multiplies by `scale`; options: boundary, image.

        >>> Convolution.delta(3, 2.0)(torch.ones(1, 1, 2)).detach()
        tensor([[[2., 2.]]])
        """
        require_that("Convolution.delta", "size", count(), size)
        require_that("Convolution.delta", "scale", number(), abs(scale) if isinstance(scale, complex) else scale)
        real = torch.get_default_dtype() if dtype is None else dtype
        kernel = torch.zeros(size, size, dtype=real.to_complex() if is_complex else real)
        kernel[size // 2, size // 2] = torch.as_tensor(scale)
        return cls(kernel, **options)

    @classmethod
    def from_matrix(
        cls,
        W: Tensor,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        size: int | None = None,
        boundary: str = "zero",
        exact: bool = True,
    ) -> "Convolution":
        """The convolution that a matrix W `(H W, h w)` is, its kernel read from the response to the middle pixel.

        inputs `(h, w)`, outputs `(H, W)` with H = r h, W = r w; pixels row by row. size: of the kernel, by default as
        small as holds the response. OptionError where W is no convolution, or where it needs a larger
        kernel, unless exact=False: then the kernel stands for its action at the middle of the image.
        """
        W = as_signal("Convolution.from_matrix: W", W, (2,))
        for name, sides in {"inputs": inputs, "outputs": outputs}.items():
            if not SIZES.fits(sides) or len(sides) != 2:
                raise ShapeError(f"Convolution.from_matrix: {name} must be the size of an image (h, w), got {sides!r}")
        if not bool(torch.isfinite(W).all()):
            raise DomainError("Convolution.from_matrix: W has NaN or infinite entries")
        if size is not None:
            require_that("Convolution.from_matrix", "size", count(), size)
        factor = _factor(W, inputs, outputs)
        middle = (inputs[0] // 2, inputs[1] // 2)
        column = W.reshape(*outputs, *inputs)[:, :, middle[0], middle[1]]
        spans = _spans(column, middle, factor, size, boundary)
        rows, columns = (torch.tensor([p % side for p in span]) for span, side in zip(spans, outputs))
        kept = [torch.tensor(_inside(span, side, boundary)) for span, side in zip(spans, outputs)]
        kernel = column[rows][:, columns] * (kept[0][:, None] & kept[1])
        found = cls(kernel, upsample=factor, boundary=boundary)
        if exact:
            _require_equal(found, W, inputs)
        return found

    @property
    def kernel(self) -> Tensor:
        """The kernel `(k, l)`."""
        return torch.view_as_complex(self.weight) if self.weight.ndim == 3 else self.weight

    def adjoint(self) -> "Convolution":
        """The convolution with the conjugate kernel turned around, for upsample = 1 the adjoint of this map."""
        if self.upsample != 1:
            raise OptionError(f"adjoint: upsample = {self.upsample} has an adjoint that is no Convolution")
        kernel = self.kernel.detach().flip(0, 1).conj().resolve_conj()
        return Convolution(kernel, boundary=self.boundary, image=self.image)

    def forward(self, v: Tensor) -> Tensor:
        """Images `(B, r h, r w)`, or with `image` pixels `(B, r h r w)` or `(B, r h r w, q)`."""
        v = as_signal("Convolution", v)
        if self.image is None:
            if v.ndim != 3:
                raise ShapeError(f"Convolution takes images (B, h, w), got shape {tuple(v.shape)}; see image=(h, w)")
            return self._convolve(v.unsqueeze(-1)).squeeze(-1)
        frames = self.frames(v)
        return self._convolve(frames).reshape(len(v), v.shape[1] * self.upsample**2, *v.shape[2:])

    def frames(self, v: Tensor) -> Tensor:
        """Pixels `(B, h w)` or `(B, h w, q)` as images `(B, h, w, q)`."""
        h, w = self.image or (0, 0)
        if v.ndim not in (2, 3) or v.shape[1] != h * w:
            raise ShapeError(
                f"Convolution of {h} x {w} images takes pixels (B, {h * w}) or (B, {h * w}, q), got {tuple(v.shape)}"
            )
        return v.reshape(len(v), h, w, *v.shape[2:], *[1] * (3 - v.ndim))

    def extra_repr(self) -> str:
        """Shape of the kernel and options."""
        kind = "complex " if self.weight.ndim == 3 else ""
        return f"{kind}kernel {tuple(self.weight.shape[:2])}, upsample={self.upsample}, boundary={self.boundary}"

    def _convolve(self, v: Tensor) -> Tensor:
        """Images `(B, h, w, q)`, all with the same kernel, by the fast Fourier transform."""
        if v.dtype in (torch.float16, torch.bfloat16):  # which have no transform
            found = self._convolve(v.float())
            return found if found.is_complex() else found.to(v.dtype)
        r, sides = self.upsample, (self.upsample * v.shape[1], self.upsample * v.shape[2])
        if 0 in sides:
            raise ShapeError(f"Convolution: images must have pixels, got {sides[0]} x {sides[1]}")
        if r > 1:
            spread = v.new_zeros(len(v), v.shape[1], r, v.shape[2], r, v.shape[3])
            spread[:, :, 0, :, 0] = v
            v = spread.reshape(len(v), *sides, v.shape[3])
        size = self.grid(sides)
        full = v.is_complex() or self.weight.ndim == 3
        if not len(v):  # for which there is no transform
            dtype = v.dtype.to_complex() if full else v.dtype
            return v.new_zeros(0, *sides, v.shape[3], dtype=dtype) * self.weight.sum().to(dtype)
        forward, backward = (torch.fft.fftn, torch.fft.ifftn) if full else (torch.fft.rfftn, torch.fft.irfftn)
        product = forward(self.response(size, v)).unsqueeze(-1) * forward(v, s=size, dim=(1, 2))
        return backward(product, s=size, dim=(1, 2))[:, : sides[0], : sides[1]]

    def grid(self, sides: tuple[int, int]) -> list[int]:
        """Size of the periodic grid for images of `sides`: larger by the kernel where zeros lie beyond."""
        zero = self.boundary == "zero"
        return [next_fast_len(side + k - 1) if zero else side for side, k in zip(sides, self.weight.shape)]

    def response(self, size: list[int], like: Tensor) -> Tensor:
        """The kernel on a periodic grid, in the precision of `like`."""
        r, kernel = self.upsample, self.kernel
        dtype = like.dtype.to_complex() if kernel.is_complex() else like.dtype.to_real()
        places = [(torch.arange(k, device=like.device) - (k - r) // 2) % n for k, n in zip(kernel.shape, size)]
        zeros = torch.zeros(size, dtype=dtype, device=like.device)
        return zeros.index_put((places[0][:, None], places[1]), kernel.to(zeros), accumulate=True)


class JointConvolution:
    """Sums of convolutions of several movies by kernels of one size, at one transform per movie and per sum.

    table: rows are sums, columns movies; all convolutions have the same size, boundary and image, and upsample 1.

    >>> twice, thrice = (Convolution.delta(3, scale, image=(1, 2)) for scale in (2.0, 3.0))
    >>> [found] = JointConvolution([[twice, thrice]])([torch.ones(1, 2), torch.ones(1, 2)])
    >>> found.detach()
    tensor([[5., 5.]])
    """

    def __init__(self, table: Sequence[Sequence[Convolution]]) -> None:
        self.table = table

    @staticmethod
    def fits(modules: Sequence[Any]) -> bool:
        """True where all modules are convolutions alike in all but their numbers."""
        if not all(isinstance(m, Convolution) and m.image is not None and m.upsample == 1 for m in modules):
            return False
        return len({(tuple(m.weight.shape), m.boundary, m.image) for m in modules}) == 1

    def __call__(self, movies: Sequence[Tensor]) -> list[Tensor]:
        """The sums, each as large as a movie `(B, h w)` or `(B, h w, q)`."""
        first, movies = self.table[0][0], [as_signal("JointConvolution: movie", v) for v in movies]
        shapes = [tuple(v.shape) for v in movies]
        if len(set(shapes)) > 1 or len(movies) != len(self.table[0]):
            raise ShapeError(f"JointConvolution takes {len(self.table[0])} movies of one shape, got {shapes}")
        if not movies[0].numel() or any(v.dtype in (torch.float16, torch.bfloat16) for v in movies):  # no transform
            rows = (sum(m(v) for m, v in zip(row, movies)) for row in self.table)
            return [found for found in rows if isinstance(found, Tensor)]
        frames = [first.frames(v) for v in movies]
        sides = (frames[0].shape[1], frames[0].shape[2])
        size = first.grid(sides)
        spectra = [torch.fft.fftn(v, s=size, dim=(1, 2)) for v in frames]
        found = []
        for row in self.table:
            terms = (torch.fft.fftn(m.response(size, v)).unsqueeze(-1) * v for m, v in zip(row, spectra))
            image = torch.fft.ifftn(sum(terms), s=size, dim=(1, 2))[:, : sides[0], : sides[1]]  # pyright: ignore
            image = image if movies[0].is_complex() or first.weight.ndim == 3 else image.real
            found.append(image.reshape(movies[0].shape))
        return found


def _factor(W: Tensor, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> int:
    """How much larger the output images are."""
    factor = outputs[0] // inputs[0]
    if factor < 1 or outputs != (factor * inputs[0], factor * inputs[1]):
        raise ShapeError(f"outputs {outputs} are no whole multiple of inputs {inputs}; use free() for a full matrix")
    if tuple(W.shape) != (outputs[0] * outputs[1], inputs[0] * inputs[1]):
        raise ShapeError(f"the matrix W from images {inputs} to {outputs} has not the shape {tuple(W.shape)}")
    return factor


def _spans(column: Tensor, middle: tuple[int, int], factor: int, size: int | None, boundary: str) -> list[range]:
    """Output rows and columns under the kernel of the middle pixel."""
    spans = []
    used = column.abs() > EXACT * column.abs().max()
    for axis in range(2):
        at, side = factor * middle[axis], column.shape[axis]
        length = size
        if length is None:
            offsets = used.any(1 - axis).nonzero().flatten() - at
            if boundary == "circular":  # the nearer way round
                offsets = (offsets + side // 2) % side - side // 2
            low, high = (int(offsets.min()), int(offsets.max())) if len(offsets) else (0, 0)
            length = max(factor, factor + 2 * max(-low, high - factor + 1))
        start = at - (length - factor) // 2
        spans.append(range(start, start + length))
    return spans


def _inside(span: range, side: int, boundary: str) -> list[bool]:
    """Places of a window to be read: not beyond a zero boundary, and round a circle no pixel twice."""
    circular = boundary == "circular"
    return [k < side if circular else 0 <= place < side for k, place in enumerate(span)]


def _require_equal(found: Convolution, W: Tensor, inputs: tuple[int, ...]) -> None:
    """OptionError where the convolution and the matrix act differently on random images."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(4, *inputs, generator=generator, dtype=torch.float64).to(W.dtype)
    expected = probes.flatten(1) @ W.mT
    with torch.no_grad():
        away = (found(probes).flatten(1) - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
    if not away <= EXACT:
        raise OptionError(
            f"the matrix is no convolution with a kernel {tuple(found.kernel.shape)} and boundary='{found.boundary}': "
            f"it differs by {away.item():.1e} relative. Take the boundary that the problem declares; near a rim "
            "of zeros A'A is none: convolve W1 alone then, or pass exact=False to start close to the problem"
        )
