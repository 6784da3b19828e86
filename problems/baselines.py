"""The neural baseline of the control problems: a small network that starts close to a constant decision."""

from collections.abc import Sequence
from typing import Any

import torch

from convexlearn.networks import mlp
from convexlearn.rules.neural import NeuralRule


def gentle_network(
    inputs: int,
    outputs: int,
    *,
    hidden: Sequence[int] = (64, 64),
    seed: int,
    bias: float | None = 0.0,
    scale: float = 0.1,
) -> NeuralRule:
    """A multilayer perceptron whose last layer has `scale` times the usual weights and biases `bias` (None: usual).

    With weights of the usual size the first decisions throw an unstable plant so far off that nothing is learned.
    """
    network = mlp(inputs, outputs, hidden=hidden, seed=seed)
    last: Any = network[-1]
    with torch.no_grad():
        last.weight.mul_(scale)
        if bias is not None:
            last.bias.fill_(bias)
    return NeuralRule(network)
