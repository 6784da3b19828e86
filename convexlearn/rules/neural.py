"""T5: a neural network as a decision rule."""

import torch
from torch import Tensor, nn

from convexlearn.checks import SIZES, checked, instance
from convexlearn.errors import ShapeError
from convexlearn.inputs import as_contexts
from convexlearn.rules.base import DecisionRule


class NeuralRule(DecisionRule):
    """Any network x -> s as a rule (type T5 of the paper); its weights have the role NETWORK.

    A plain nn.Module is accepted everywhere as a rule; this adds `learn`, `freeze`, counts and, with
    `shape`, the decision's shape: x `(B, ...)` -> s `(B, *shape)`.

    >>> from convexlearn.networks import mlp
    >>> sum(NeuralRule(mlp(3, 2, hidden=(4,), seed=0)).count_parameters().values())
    26
    """

    @checked(network=instance(nn.Module, "an nn.Module"), shape=SIZES)
    def __init__(self, network: nn.Module, *, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.network = network
        self.shape = shape

    def forward(self, *x: Tensor) -> Tensor:
        """s `(B, ...)`, computed in the network's dtype and returned in that of x."""
        s = run_network(self.network, as_contexts(type(self).__name__, x))
        if self.shape is None:
            return s
        if s.shape[1:].numel() != torch.Size(self.shape).numel():
            got = f"the network gives {tuple(s.shape)} and shape is {tuple(self.shape)}"
            raise ShapeError(f"NeuralRule: {got}, of other size per sample; set its last layer, or shape, accordingly")
        return s.reshape(len(s), *self.shape)


def run_network(network: nn.Module, x: tuple[Tensor, ...]) -> Tensor:
    """network(*x), computed in the network's dtype and returned in that of x; a rule sees to its dtype itself."""
    if isinstance(network, DecisionRule):
        return network(*x)
    weight = next(network.parameters(), x[0])
    return network(*(part.to(weight.dtype) for part in x)).to(x[0].dtype)
