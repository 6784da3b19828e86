"""Networks for sequences, and stacks of equal networks that are evaluated and trained side by side.

A stack of C networks maps `(B, C, ...)`, one network per entry of axis 1, in batched products: hundreds of small
networks cost about as much as one large one.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from convexlearn.checks import SIZES, checked, count, instance, number, optional, require_that
from convexlearn.errors import OptionError, ShapeError
from convexlearn.inputs import as_floating
from convexlearn.randomness import as_generator


class StackedLinear(nn.Module):
    """C linear maps: x `(B, C, ..., inputs)` -> `(B, C, ..., outputs)`; without bias also as `product`.

    Weights normal with variance gain / inputs from `generator`, biases zero; gain None: both uniform within
    1 / sqrt(inputs) of zero, as in torch.nn.Linear. Computed in its own dtype, returned in that of x.

    >>> StackedLinear(4, 3, 2)(torch.ones(5, 4, 7, 3)).shape
    torch.Size([5, 4, 7, 2])
    """

    @checked(stack=count(), inputs=count(), outputs=count(), gain=optional(number(least=0)))
    def __init__(
        self,
        stack: int,
        inputs: int,
        outputs: int,
        *,
        gain: float | None = 2.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        weight, bias = torch.empty(stack, inputs, outputs), torch.zeros(stack, 1, outputs)
        if gain is None:
            for drawn in (weight, bias):
                drawn.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
        else:
            weight.normal_(0.0, math.sqrt(gain / inputs), generator=generator)
        self.weight, self.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """Outputs `(B, C, ..., outputs)`."""
        stack, inputs, outputs = self.weight.shape
        x = as_floating("x", x, "StackedLinear: input")
        if x.ndim < 3 or x.shape[1] != stack or x.shape[-1] != inputs:
            raise ShapeError(f"StackedLinear: x must be (B, {stack}, ..., {inputs}), got {tuple(x.shape)}")
        rows = x.transpose(0, 1).reshape(stack, math.prod(x.shape[:-1]) // stack, inputs)
        out = torch.baddbmm(self.bias, rows.to(self.weight.dtype), self.weight).to(x.dtype)
        return out.reshape(stack, len(x), *x.shape[2:-1], outputs).transpose(0, 1)


def stacked_mlp(
    stack: int,
    inputs: int,
    outputs: int,
    *,
    hidden: Sequence[int] = (64, 64),
    activations: Sequence[Callable[[], nn.Module]] | None = None,
    uniform: bool = False,
    zero: bool = False,
    seed: int | torch.Generator = 0,
) -> nn.Sequential:
    """`stack` multilayer perceptrons: `(B, C, ..., inputs)` -> `(B, C, ..., outputs)`; ReLUs by default.

    uniform: weights and biases as torch.nn.Linear draws them, else normal weights and no biases. zero: the last layer
    starts at zero, as suits a SkipConnection.

    >>> stacked_mlp(4, 1, 16, hidden=(8,), activations=[nn.Sigmoid])(torch.ones(2, 4, 9, 1)).shape
    torch.Size([2, 4, 9, 16])
    """
    for name, size in {"stack": stack, "inputs": inputs, "outputs": outputs}.items():
        require_that("stacked_mlp", name, count(), size)
    require_that("stacked_mlp", "hidden", SIZES, hidden)
    if activations is not None and not (isinstance(activations, list | tuple) and all(map(callable, activations))):
        raise OptionError(f"stacked_mlp: activations must be a list of classes of modules, got {activations!r}")
    between = [nn.ReLU] * len(hidden) if activations is None else list(activations)
    if len(between) != len(hidden):
        raise OptionError(f"stacked_mlp: {len(between)} activations for {len(hidden)} hidden layers")
    generator = as_generator("stacked_mlp", seed)
    layers: list[nn.Module] = []
    for (before, after), activation in zip(pairwise([inputs, *hidden]), between):
        layers += [
            StackedLinear(stack, before, after, gain=None if uniform else 2.0, generator=generator),
            activation(),
        ]
    gain = 0.0 if zero else None if uniform else 1.0
    last = StackedLinear(stack, ([inputs, *hidden])[-1], outputs, gain=gain, generator=generator)
    return nn.Sequential(*layers, last)


class SkipConnection(nn.Module):
    """linear(x) + network(x): a residual network, whose `network` learns what the linear map lacks.

    >>> residual = SkipConnection(StackedLinear(4, 1, 2), stacked_mlp(4, 1, 2, hidden=(8,), zero=True))
    >>> x = torch.ones(3, 4, 5, 1)
    >>> torch.equal(residual(x), residual.linear(x))
    True
    """

    @checked(linear=instance(nn.Module, "a module"), network=instance(nn.Module, "a module"))
    def __init__(self, linear: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.linear, self.network = linear, network

    def forward(self, x: Tensor) -> Tensor:
        """Outputs `(B, C, ..., outputs)`."""
        return self.linear(x) + self.network(x)


class SlidingBiLSTM(nn.Module):
    """Sliding bidirectional recurrent network (Farsad and Goldsmith 2018): log probabilities of symbols.

    `layers` bidirectional LSTM layers of `hidden` units read windows of `length` observations that start every
    `stride` steps; what the windows say about a symbol, as probabilities, is averaged. x `(B, T)` -> `(B, T,
    outputs)`, or with `stack` C networks `(B, C, T)` -> `(B, C, T, outputs)`. dropout: share of the units left out
    after each layer in training. Further arguments are ignored.

    >>> SlidingBiLSTM(2, hidden=4, layers=1, length=5)(torch.ones(3, 12)).exp().sum(-1).round(decimals=4).unique()
    tensor([1.], grad_fn=<Unique2Backward0>)
    """

    @checked(
        outputs=count(), hidden=count(), layers=count(), length=count(), stride=count(), stack=count(),
        dropout=number(least=0, below=1),
    )  # fmt: skip
    def __init__(
        self,
        outputs: int,
        *,
        hidden: int = 80,
        layers: int = 3,
        length: int = 20,
        stride: int = 1,
        dropout: float = 0.2,
        stack: int | None = None,
        seed: int | torch.Generator = 0,
    ) -> None:
        super().__init__()
        if stride > length:
            raise OptionError(f"SlidingBiLSTM: stride must be at most length = {length}, got {stride}")
        self.length, self.stride, self.stack, count = length, stride, stack, stack or 1
        generator = as_generator("SlidingBiLSTM", seed)
        self.layers = nn.ModuleList(_BiLSTM(count, 2 * hidden if k else 1, hidden, generator) for k in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.head = StackedLinear(count, 2 * hidden, outputs, gain=1.0, generator=generator)

    def forward(self, x: Tensor, *ignored: Tensor) -> Tensor:
        """Log probabilities `(B, T, outputs)` or `(B, C, T, outputs)`."""
        x = as_floating("x", x, "SlidingBiLSTM: input")
        wanted = "(B, T)" if self.stack is None else f"(B, {self.stack}, T)"
        if x.ndim != wanted.count(",") + 1 or x.shape[-1] == 0 or (x.ndim == 3 and x.shape[1] != self.stack):
            raise ShapeError(f"SlidingBiLSTM: x must be {wanted} with T > 0, got {tuple(x.shape)}")
        own = (x[:, None] if self.stack is None else x).to(self.head.weight.dtype)
        steps = own.shape[-1]
        length = min(self.length, steps)
        starts = [*range(0, steps - length, self.stride), steps - length]
        places = torch.tensor(starts, device=x.device)[:, None] + torch.arange(length, device=x.device)
        h = own[..., places][..., None]  # (B, C, windows, length, 1)
        for layer in self.layers:
            h = self.dropout(layer(h))
        said = torch.softmax(self.head(h), -1).flatten(2, 3)
        sums = said.new_zeros(*said.shape[:2], steps, said.shape[-1]).index_add(2, places.flatten(), said)
        log = torch.log(sums / torch.bincount(places.flatten(), minlength=steps)[:, None])
        return (log[:, 0] if self.stack is None else log).to(x.dtype)


class _BiLSTM(nn.Module):
    """One bidirectional layer of C networks: `(B, C, windows, length, inputs)` -> the same with 2 hidden units."""

    def __init__(self, stack: int, inputs: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden = hidden
        given = {"generator": generator, "dtype": torch.float32}
        bound = 1 / math.sqrt(hidden)
        self.enter = nn.Parameter(bound * (2 * torch.rand(2 * stack, inputs, 4 * hidden, **given) - 1))
        self.repeat = nn.Parameter(bound * (2 * torch.rand(2 * stack, hidden, 4 * hidden, **given) - 1))
        bias = torch.zeros(2 * stack, 1, 4 * hidden, dtype=torch.float32)
        bias[..., hidden : 2 * hidden] = 1.0  # forget gates start open
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Both directions side by side: as 2 C networks, of which the last C read backwards."""
        batch, stack, windows, length, inputs = x.shape
        rows = x.permute(1, 3, 0, 2, 4).reshape(stack, length, batch * windows, inputs)
        rows = torch.cat([rows, rows.flip(1)])
        entered = torch.baddbmm(self.bias, rows.flatten(1, 2), self.enter).unflatten(1, (length, batch * windows))
        h = c = rows.new_zeros(2 * stack, batch * windows, self.hidden)
        out = []
        for gates in entered.unbind(1):
            i, f, g, o = torch.baddbmm(gates, h, self.repeat).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            out.append(h)
        ahead, back = torch.stack(out, 1).chunk(2)
        both = torch.cat([ahead, back.flip(1)], -1)
        return both.unflatten(2, (batch, windows)).permute(2, 0, 3, 1, 4)
