"""Networks, flows, denoisers and convolutions with sound inputs, and arguments that none of them can take."""

import math
from collections.abc import Callable
from typing import Any

import torch
from fuzz_functions import Function, maker
from fuzz_subjects import H, normal
from torch import Tensor, nn

import convexlearn as cl
from convexlearn import flows, networks, stacked_networks
from convexlearn.convolution import JointConvolution
from convexlearn.denoisers import as_images

NAN = math.nan
V, IMAGES, PIXELS = normal(3, 4, seed=11), normal(3, 5, 6, seed=12), normal(3, 30, seed=13)
KERNEL = normal(3, 3, seed=14)
LEVEL = normal(3, seed=15).abs() + 0.1
GAP = 1e-7
"""Between batched and single products of networks, in float32."""


class Soften(nn.Module):
    """A denoiser without weights."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


class Returns(nn.Module):
    """A network that returns the same thing whatever it is given."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *x: Any) -> Any:
        return self.value


def seeded(module: nn.Module) -> nn.Module:
    """The module with random weights in float64."""
    generator = torch.Generator().manual_seed(0)
    for p in module.double().parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module


def flow() -> flows.Flow:
    """Two couplings and an affine map."""
    base = flows.Affine(torch.eye(4).double() + 0.1, torch.ones(4).double())
    return seeded(flows.real_nvp(4, couplings=2, hidden=(5,), base=base))  # pyright: ignore


def module_functions() -> dict[str, Callable[[], Function]]:
    """networks.py, stacked_networks.py, flows.py, denoisers.py, convolution.py."""
    model, affine = flow(), flows.Affine(torch.eye(4).double() + 0.1, torch.ones(4).double())
    coupling = model.layers[0]
    wave = cl.Convolution(torch.complex(KERNEL, KERNEL.flip(0)))
    blur, framed = cl.Convolution(KERNEL), cl.Convolution(KERNEL, image=(5, 6), boundary="circular")
    joint = JointConvolution([[framed, framed]])
    sizes = {"lengths": True}
    pictures, stack = {"lengths": True, "leading": True}, {"lengths": True, "leading": True}
    return {
        "ImageNetwork": maker(seeded(networks.ImageNetwork(width=4, upsample=2)), IMAGES, **pictures),
        "StackedLinear": maker(seeded(stacked_networks.StackedLinear(2, 3, 4)), normal(3, 2, 3, seed=16), leading=True),
        "stacked_mlp": maker(
            seeded(stacked_networks.stacked_mlp(2, 3, 4, hidden=(5,))), normal(3, 2, 3, seed=16), leading=True
        ),
        "SlidingBiLSTM": maker(
            seeded(stacked_networks.SlidingBiLSTM(2, hidden=4, layers=1, length=3)).eval(), V, **sizes, leading=True
        ),
        "SlidingBiLSTM stack": maker(
            seeded(stacked_networks.SlidingBiLSTM(2, hidden=4, layers=1, length=3, stack=2)).eval(),
            normal(3, 2, 7, seed=17),
            **stack,
        ),
        **{f"Affine {k}": maker(lambda v, k=k: getattr(affine, k)(v)[0], V) for k in ("push", "pull")},
        **{f"AffineCoupling {k}": maker(lambda v, k=k: getattr(coupling, k)(v)[0], V) for k in ("push", "pull")},
        **{
            f"Flow {k}": maker(getattr(model, k), V) for k in ("forward", "push", "inverse", "log_density", "potential")
        },
        "DnCNN": maker(seeded(cl.DnCNN(width=4, depth=3)), IMAGES, LEVEL, **pictures),
        "Denoiser": maker(cl.Denoiser(Soften()), IMAGES, LEVEL, **pictures),
        "Denoiser of pixels": maker(cl.Denoiser(Soften(), image=(5, 6)), PIXELS, LEVEL, **pictures),
        "as_images": maker(as_images, IMAGES, **pictures),
        "Convolution": maker(blur, IMAGES, complexes=1, **sizes),
        "Convolution of pixels": maker(framed, PIXELS, complexes=1),
        "Convolution complex": maker(lambda v: wave(v).real, IMAGES, complexes=1, **sizes),
        "Convolution adjoint": maker(blur.adjoint(), IMAGES, complexes=1, **sizes),
        "Convolution upsampling": maker(cl.Convolution(KERNEL, upsample=2), IMAGES, complexes=1, **sizes),
        "JointConvolution": maker(lambda a, b: joint([a, b])[0], PIXELS, PIXELS.flip(0), complexes=2),
    }


COUNTS = (0, -1, 1.5, None, "x", True, NAN, torch.ones(2))
NUMBERS = ("x", NAN, 1j, torch.ones(2), [1.0])
SEEDS = ("x", 1.5, None, 2**70, torch.ones(2))


def unsound_modules() -> list[tuple[str, Callable[[], Any]]]:
    """Of the constructors, and what a network in a slot may return."""
    bad: list[tuple[str, Callable[[], Any]]] = []

    def options(call: Callable[..., Any], arguments: dict[str, Any], junk: dict[str, tuple]) -> None:
        for name, values in junk.items():
            bad.extend((name, lambda name=name, x=x: call(**{**arguments, name: x})) for x in values)

    options(networks.mlp, {"inputs": 2, "outputs": 2}, {
        "inputs": COUNTS, "outputs": COUNTS, "hidden": (None, 3, "x", (0,), (1.5,)), "activation": (None, "x", 3),
        "seed": SEEDS,
    })  # fmt: skip
    options(networks.initialise, {"network": nn.Linear(2, 2)}, {"network": (None, "x", V), "seed": SEEDS})
    counts = dict.fromkeys(("channels", "width", "depth", "upsample"), COUNTS)
    options(networks.ImageNetwork, {}, {**counts, "seed": SEEDS})
    counts = dict.fromkeys(("stack", "inputs", "outputs"), COUNTS)
    options(stacked_networks.StackedLinear, dict.fromkeys(counts, 2), {**counts, "gain": (*NUMBERS, -1.0)})
    options(stacked_networks.stacked_mlp, dict.fromkeys(counts, 2), {
        **counts, "hidden": (None, 3, "x", (0,)), "activations": (3, "x", [nn.ReLU], [None, None]), "seed": SEEDS,
    })  # fmt: skip
    counts = dict.fromkeys(("outputs", "hidden", "layers", "length", "stride"), COUNTS)
    options(stacked_networks.SlidingBiLSTM, {"outputs": 2, "hidden": 2}, {
        **counts, "stack": (0, "x", 1.5), "dropout": (*NUMBERS, -0.1, 1.0), "stride": (21,), "seed": SEEDS,
    })  # fmt: skip
    E, b = torch.eye(2), torch.zeros(2)
    options(flows.Affine, {"A": E, "b": b}, {
        "A": (None, "x", E[0], E[None], torch.zeros(2, 2), E * NAN, 1j * E, normal(3, 3)),
        "b": (None, "x", E, b * NAN, 1j * b, torch.zeros(3)),
    })  # fmt: skip
    options(flows.Affine.fit, {"s": V}, {
        "s": (None, "x", V[0], V[:0], V * NAN, 1j * V), "floor": (*NUMBERS, 0.0, -1.0, None),
    })  # fmt: skip
    options(flows.AffineCoupling, {"size": 4, "moved": [0, 1], "network": nn.Linear(2, 4)}, {
        "size": COUNTS, "moved": (None, [], [0, 0], [0, 1, 2, 3], [4], ["x"], [0.5], 1), "network": (None, "x", len),
        "bound": (*NUMBERS, 0.0, -1.0, None),
    })  # fmt: skip
    options(flows.Flow, {}, {"layers": (None, "x", [None], [nn.Linear(2, 2)], 3)})
    wrong = flows.Affine(E, b)
    options(flows.real_nvp, {"size": 4}, {
        "size": (*COUNTS, 1), "couplings": (-1, "x", None, 1.5), "hidden": (3, "x", (0,)), "seed": SEEDS,
        "base": (wrong, "x", nn.Linear(4, 4)),
    })  # fmt: skip
    options(cl.DnCNN, {}, {**dict.fromkeys(("channels", "width", "depth"), COUNTS), "depth": (1,), "seed": SEEDS})
    options(cl.Denoiser, {"network": Soften()}, {
        "network": (None, "x", len), "image": ((3,), (0, 3), "ab", 3, (1.5, 2), (1, 2, 3, 4)),
    })  # fmt: skip
    options(cl.Convolution, {"kernel": KERNEL}, {
        "kernel": (None, "x", KERNEL[0], KERNEL[:2], KERNEL[None], torch.zeros(0, 0)), "upsample": COUNTS,
        "boundary": (None, "x", "reflect", 3), "image": ((3,), "ab", (0, 2), (1.5, 2), 3),
    })  # fmt: skip
    options(cl.Convolution.delta, {"size": 3}, {"size": COUNTS, "scale": ("x", None, NAN, torch.ones(2))})
    W = torch.eye(6)
    options(cl.Convolution.from_matrix, {"W": W, "inputs": (2, 3), "outputs": (2, 3)}, {
        "W": (None, "x", W[0], W[:3], W * NAN), "inputs": (None, "ab", (6,), (3, 2), (0, 6)),
        "outputs": (None, "ab", (6,), (3, 3)), "size": (0, "x", 1.5, 2), "boundary": (None, "x"),
    })  # fmt: skip
    return [*bad, *returned(), *weights()]


def returned() -> list[tuple[str, Callable[[], Any]]]:
    """What a network returns in a slot that wants something else."""
    values = (None, "x", torch.ones(3, 2), torch.ones(3), (V, V))
    coupling = lambda x: flows.AffineCoupling(4, [0, 1], Returns(x))  # noqa: E731
    return [
        *[("network", lambda x=x: coupling(x).push(V)) for x in values],
        *[("denoiser", lambda x=x: cl.Denoiser(Returns(x))(IMAGES, 0.1)) for x in values],
    ]


def weights() -> list[tuple[str, Callable[[], Any]]]:
    """Noise levels, shapes that look alike, and options of a deep prior."""
    dncnn, levels = cl.DnCNN(width=2, depth=2), (None, "x", -0.1, 1j, torch.ones(2), torch.ones(3, 1), -LEVEL)
    bad = [("sigma", lambda s=s: dncnn(IMAGES, s)) for s in levels]
    bad += [("sigma", lambda s=s: cl.Denoiser(Soften())(IMAGES, s)) for s in levels]
    bad += [("denoiser", lambda x=x: cl.Denoiser(Soften())(x, 0.1)) for x in (V, V[0], None, "x", 1j * IMAGES)]
    bad += [("x", lambda x=x: networks.ImageNetwork()(x)) for x in (V, IMAGES[None, None], IMAGES[:, None][:, [0, 0]])]
    given: dict[str, Any] = {"generator": nn.Linear(2, 6), "H": H, "latent": 2}
    junk: dict[str, tuple] = {
        "generator": (None, "x", V), "H": (None, "x", H[0], H[None], 1j * H), "latent": COUNTS, "restarts": COUNTS,
        "weight": (*NUMBERS, -1.0, None), "penalty": (3, "x"), "seed": ("x", 1.5, None), "gradient": (None, "x", 1),
        "tol": (*NUMBERS, 0.0, -1.0, None), "max_iterations": COUNTS, "learn": ("weight", ["x"], [None], 3, None),
    }  # fmt: skip
    return bad + [(k, lambda k=k, x=x: cl.DeepPrior(**{**given, k: x})) for k, xs in junk.items() for x in xs]
