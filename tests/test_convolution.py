"""Convolution: against scipy, as an adjoint pair, read from a matrix."""

import cvxpy as cp
import pytest
import torch
from scipy.signal import convolve2d

from convexlearn.convolution import Convolution, JointConvolution
from convexlearn.errors import OptionError, ShapeError
from convexlearn.iterations.admm import ADMM
from convexlearn.iterations.proximal_gradient import FISTA, ISTA
from convexlearn.rules.iterative import Unfolded
from convexlearn.splitting import split

BOUNDARY = {"zero": "fill", "circular": "wrap"}


def draw(*shape, is_complex=False, seed=0):
    dtype = torch.complex128 if is_complex else torch.float64
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrix(function, inputs):
    """Columns are the responses to single pixels."""
    pixels = torch.eye(inputs[0] * inputs[1], dtype=torch.float64).reshape(-1, *inputs)
    with torch.no_grad():
        return function(pixels).flatten(1).mT


@pytest.mark.parametrize("boundary", ["zero", "circular"])
@pytest.mark.parametrize("kinds", [(False, False), (True, False), (False, True), (True, True)])
def test_equals_scipy(boundary, kinds):
    kernel, v = draw(3, 5, is_complex=kinds[0]), draw(2, 6, 7, is_complex=kinds[1], seed=1)
    found = Convolution(kernel, boundary=boundary)(v)
    for image, result in zip(v, found.detach()):
        expected = convolve2d(image.numpy(), kernel.numpy(), mode="same", boundary=BOUNDARY[boundary])
        torch.testing.assert_close(result, torch.from_numpy(expected), rtol=0, atol=1e-13)


@pytest.mark.parametrize("boundary", ["zero", "circular"])
def test_adjoint(boundary):
    blur = Convolution(draw(3, 5, is_complex=True), boundary=boundary)
    u, v = (draw(1, 6, 7, is_complex=True, seed=k) for k in (1, 2))
    left, right = (v.conj() * blur(u)).sum(), (blur.adjoint()(v).conj() * u).sum()
    torch.testing.assert_close(left, right)
    with pytest.raises(OptionError, match="upsample = 2"):
        Convolution(draw(4, 4), upsample=2).adjoint()


@pytest.mark.parametrize(("size", "start"), [(4, 0), (3, 0), (7, 2)])
def test_upsampling_puts_the_kernel_on_its_pixel(size, start):
    kernel, pixels = draw(size, size), torch.zeros(1, 5, 5, dtype=torch.float64)
    pixels[0, 2, 1] = 2.0
    grown = Convolution(kernel, upsample=3 if size != 4 else 4)(pixels)[0].detach()
    r = 3 if size != 4 else 4
    expected = torch.zeros(5 * r, 5 * r, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            if r - start + j >= 0:
                expected[2 * r - start + i, r - start + j] = 2 * kernel[i, j]
    torch.testing.assert_close(grown, expected, rtol=0, atol=1e-14)


def test_pixels_and_frames():
    blur, movie = Convolution(draw(3, 3), image=(4, 5)), draw(2, 20, 3, is_complex=True)
    expected = torch.stack([Convolution(draw(3, 3))(movie[:, :, k].reshape(2, 4, 5)).flatten(1) for k in range(3)], 2)
    torch.testing.assert_close(blur(movie), expected)
    torch.testing.assert_close(blur(movie[:, :, 0]), expected[:, :, 0])
    with pytest.raises(ShapeError, match=r"takes pixels \(B, 20\)"):
        blur(draw(2, 4, 5))
    with pytest.raises(ShapeError, match=r"see image=\(h, w\)"):
        Convolution(draw(3, 3))(draw(2, 4))


@pytest.mark.parametrize("kinds", [(False, False), (True, False), (False, True), (True, True)])
def test_gradient(kinds):
    blur, v = Convolution(draw(3, 3, is_complex=kinds[0]), boundary="circular"), draw(1, 4, 5, is_complex=kinds[1])
    weight = blur.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w, v: torch.func.functional_call(blur, {"weight": w}, v), (weight, v.requires_grad_())
    )


@pytest.mark.parametrize("boundary", ["zero", "circular"])
@pytest.mark.parametrize("upsample", [1, 2, 3])
def test_read_from_a_matrix(boundary, upsample):
    for size in (upsample, upsample + 2):
        original = Convolution(draw(size, size), upsample=upsample, boundary=boundary)
        W, outputs = matrix(original, (5, 6)), (5 * upsample, 6 * upsample)
        found = Convolution.from_matrix(W, (5, 6), outputs, boundary=boundary)
        torch.testing.assert_close(found.kernel, original.kernel, rtol=0, atol=1e-14)
        padded = Convolution.from_matrix(W, (5, 6), outputs, boundary=boundary, size=upsample + 4)
        torch.testing.assert_close(matrix(padded, (5, 6)), W, rtol=0, atol=1e-13)


def test_a_kernel_around_the_whole_image_is_read_once():
    W = matrix(Convolution(draw(3, 5), boundary="circular"), (4, 4))
    gram = W.mT @ W
    found = Convolution.from_matrix(gram, (4, 4), (4, 4), boundary="circular")
    torch.testing.assert_close(matrix(found, (4, 4)), gram, rtol=0, atol=1e-12)


def test_what_is_no_convolution_is_refused():
    W = matrix(Convolution(draw(3, 3)), (6, 6))
    with pytest.raises(OptionError, match=r"no convolution with a kernel \(5, 5\).*A'A is none: convolve W1 alone"):
        Convolution.from_matrix(W.mT @ W, (6, 6), (6, 6))
    close = Convolution.from_matrix(W.mT @ W, (6, 6), (6, 6), exact=False)
    torch.testing.assert_close(matrix(close, (6, 6))[14], (W.mT @ W)[14], rtol=0, atol=1e-13)
    with pytest.raises(ShapeError, match="no whole multiple"):
        Convolution.from_matrix(W, (6, 6), (5, 7))
    with pytest.raises(ShapeError, match="size of an image"):
        Convolution.from_matrix(W, (36,), (36,))
    with pytest.raises(OptionError, match="did you mean 'circular'"):
        Convolution(draw(3, 3), boundary="circula")
    with pytest.raises(ShapeError, match="no centre"):
        Convolution(draw(4, 3))


def blurred(factor=1, vector=False):
    """1/2 |x - H s|^2 + rho |s|_1 with H a circular blur and the mean of `factor` x `factor` pixels."""
    blur = Convolution(torch.outer(*[torch.tensor([0.2, 1.0, 0.5], dtype=torch.float64)] * 2), boundary="circular")
    side, small = 6, 6 // factor
    H = matrix(blur, (side, side)).reshape(small, factor, small, factor, -1).mean((1, 3)).reshape(small**2, -1).numpy()
    x = cp.Parameter(small**2 if vector else (small, small), name="x")
    s = cp.Variable(side**2 if vector else (side, side), name="s")
    rho = cp.Parameter(nonneg=True, name="rho", value=0.1)
    image = H @ (s if vector else cp.vec(s, order="C"))
    fit = cp.sum_squares(x - (image if vector else cp.reshape(image, (small, small), order="C")))
    parts = split(cp.Problem(cp.Minimize(0.5 * fit + rho * cp.sum(cp.abs(s)))), [x], s)
    return parts, draw(3, *x.shape)


@pytest.mark.parametrize("algorithm", [ISTA, FISTA, ADMM])
@pytest.mark.parametrize("names", [("W1",), ("W2",), ("W1", "W2")])
@pytest.mark.parametrize("vector", [False, True])
def test_unfolded_convolutions_start_as_the_iteration(algorithm, names, vector):
    parts, x = blurred(vector=vector)
    options = {"boundary": "circular", "image": (6, 6) if vector else None}
    iteration = algorithm(parts)
    net = Unfolded(iteration.convolve(*names, **options), 4, untie=[*names, "threshold"])
    torch.testing.assert_close(net(x), Unfolded(iteration, 4)(x), rtol=0, atol=1e-12)
    net(x).sum().backward()
    assert getattr(net, names[0])[2].weight.grad.abs().max() > 0
    with pytest.raises(OptionError, match="no convolution"):
        iteration.convolve(*names, **{**options, "boundary": "zero"})


@pytest.mark.parametrize("vector", [False, True])
def test_the_coupled_form_upsamples_the_residual(vector):
    parts, x = blurred(factor=2, vector=vector)
    iteration = ISTA(parts).convolve("W1", boundary="circular", image=(6, 6) if vector else None, size=6)
    net = Unfolded(iteration, 4, untie=["W1", "threshold"])
    torch.testing.assert_close(net(x), Unfolded(ISTA(parts), 4)(x), rtol=0, atol=1e-12)
    assert net.W1[0].kernel.shape == (6, 6)  # pyright: ignore


@pytest.mark.parametrize("boundary", ["zero", "circular"])
@pytest.mark.parametrize("kinds", [(False, False), (True, False), (False, True), (True, True)])
def test_joint_convolutions_equal_their_sum(boundary, kinds):
    table = [
        [
            Convolution(draw(3, 5, is_complex=kinds[0], seed=2 * i + j), boundary=boundary, image=(4, 5))
            for j in range(2)
        ]
        for i in range(3)
    ]
    movies = [draw(2, 20, 3, is_complex=kinds[1], seed=7 + j) for j in range(2)]
    assert JointConvolution.fits([m for row in table for m in row])
    for row, found in zip(table, JointConvolution(table)(movies)):
        torch.testing.assert_close(found, row[0](movies[0]) + row[1](movies[1]), rtol=0, atol=1e-13)


def test_convolutions_that_differ_are_not_joined():
    one = Convolution(draw(3, 3), image=(4, 5))
    others = [Convolution(draw(5, 5), image=(4, 5)), Convolution(draw(3, 3)), torch.nn.Identity(), None]
    assert not any(JointConvolution.fits([one, other]) for other in others)


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("is_complex", [False, True])
def test_an_empty_batch_stays_empty_and_differentiable(upsample, is_complex):
    size = 3 if upsample == 1 else 4
    blur = Convolution(draw(size, size, is_complex=is_complex), upsample=upsample)
    full, empty = blur(draw(2, 5, 6)), blur(draw(0, 5, 6))
    assert empty.shape == (0, *full.shape[1:])
    assert empty.dtype == full.dtype
    empty.abs().sum().backward()
    assert blur.weight.grad is not None
    assert not blur.weight.grad.any()
