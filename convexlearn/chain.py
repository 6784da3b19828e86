"""Inference on chains of discrete variables: log marginals and best paths by messages in the log domain.

A chain s_0, ..., s_{T-1} of states 0, ..., S - 1 has the probability proportional to the product over t of
exp(pairwise_t[s_{t-1}, s_t] + unary_t[s_t]), with s_{-1} summed out. Minus infinity forbids a transition.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from convexlearn.errors import OptionError, ShapeError, suggest
from convexlearn.inputs import as_floating
from convexlearn.parallel import block_of, run

SEMIRINGS = ("sum", "max")


class ChainFactors(NamedTuple):
    """Log potentials of a chain: pairwise, broadcastable to `(*batch, T, S, S)` as [before, after]; unary
    `(*batch, T, S)` or None.

    One transition matrix for all times stays a `(S, S)` tensor: memory is that of the unary terms.
    """

    pairwise: Tensor
    unary: Tensor | None = None


def log_marginals(factors: ChainFactors | Tensor, initial: Tensor | None = None, semiring: str = "sum") -> Tensor:
    """log p(s_t = j) `(*batch, T, S)` by the forward-backward algorithm (Bahl, Cocke, Jelinek, Raviv 1974).

    factors: ChainFactors, or the pairwise potentials `(*batch, T, S, S)` alone. initial: log potentials of
    the state before the first, broadcastable to `(*batch, S)`, zero by default. semiring "max": log max-marginals,
    the largest log probability of a path through j at time t less that of the best path.

    Sum and maximum are taken in the log domain, so that nothing under- or overflows. A chain without a possible
    path, or with a potential that is NaN or plus infinity, is NaN and its gradient zero. Derivatives of all
    orders are exact; on CPU the first is computed by a compiled recursion in float64.

    >>> stay = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    >>> seen = torch.tensor([[[0.8, 0.2], [0.5, 0.5]]]).log()
    >>> log_marginals(ChainFactors(stay, seen)).exp()
    tensor([[[0.8000, 0.2000],
             [0.7400, 0.2600]]])
    """
    chain = _Chain.of(factors, initial, semiring)
    maximum = semiring == "max"
    ahead, back = _Messages.apply(chain.pairwise, chain.unary, maximum)  # pyright: ignore[reportGeneralTypeIssues]
    total = ahead + chain.unary[:, 1:] + back
    dead = ~(total.amax(-1, keepdim=True) > -math.inf) | chain.bad[:, None, None]
    total = total.masked_fill(dead, 0.0)
    total = total - total.amax(-1, keepdim=True) if maximum else torch.log_softmax(total, -1)
    return total.masked_fill(dead, math.nan).reshape(*chain.batch, *total.shape[1:])


def best_path(factors: ChainFactors | Tensor, initial: Tensor | None = None) -> Tensor:
    """The most probable path `(*batch, T)` of states, int64, by the Viterbi algorithm; arguments as above.

    -1 throughout where no path is possible or a potential is NaN. Of several best paths it is one.

    >>> best_path(torch.tensor([[[[0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]]]))
    tensor([[1, 1]])
    """
    from convexlearn import chain_kernels  # on first use: numba

    chain = _Chain.of(factors, initial, "max")
    pairwise, unary = _array(chain.pairwise), _array(chain.unary.double())
    into, out = _entering(unary, False), _compiled(pairwise, unary, True, False)
    total = torch.from_numpy(out[:, -1] + unary[:, -1])
    path = torch.empty(len(total), chain.steps, dtype=torch.int64)
    path[:, -1] = total.argmax(-1)
    numbers = path.numpy()
    run(lambda a, b, _: chain_kernels.trace_back(pairwise, into, out, numbers, a, b), len(path), block=_block(out))
    path[~(total.amax(-1) > -math.inf) | chain.bad.cpu()] = -1
    return path.reshape(*chain.batch, chain.steps).to(chain.unary.device)


class _Chain(NamedTuple):
    """Checked potentials with one batch axis: pairwise `(B or 1, T or 1, S, S)`; unary `(B, 1 + T, S)`, the
    potentials of the state before the first in front; bad `(B,)`; the batch's own shape.
    """

    pairwise: Tensor
    unary: Tensor
    bad: Tensor
    batch: tuple[int, ...]

    @property
    def steps(self) -> int:
        return self.unary.shape[1] - 1

    @classmethod
    def of(cls, factors: ChainFactors | Tensor, initial: Tensor | None, semiring: str) -> "_Chain":
        if semiring not in SEMIRINGS:
            raise OptionError(f"semiring '{semiring}': {suggest(semiring, SEMIRINGS)}")
        if isinstance(factors, tuple) and len(factors) != 2:
            raise ShapeError(f"factors must be ChainFactors(pairwise, unary) or a tensor, got {len(factors)} parts")
        pairwise, unary = factors if isinstance(factors, tuple) else (factors, None)
        pairwise = _potentials("pairwise", pairwise)
        unary = None if unary is None else _potentials("unary", unary)
        initial = None if initial is None else _potentials("initial", initial)
        shape, size = _shape(pairwise, unary)
        batch, steps = shape[:-1], shape[-1]
        if initial is not None and not _broadcasts(initial, (*batch, size)):
            raise ShapeError(f"initial must broadcast to (*batch, S) = {(*batch, size)}, got {tuple(initial.shape)}")
        count = math.prod(batch)
        if unary is None:
            unary = pairwise.new_zeros(*shape, size)
        before = unary.new_zeros(size) if initial is None else initial.to(unary)
        before = before.unsqueeze(-2).expand(*batch, 1, size)
        unary = torch.cat([before, unary.expand(*shape, size)], -2).reshape(count, steps + 1, size)
        if pairwise.ndim == 2:
            pairwise = pairwise[None, None]
        elif math.prod(pairwise.shape[:-3]) == 1:
            pairwise = pairwise.reshape(1, *pairwise.shape[-3:])
        else:
            own = pairwise.shape[-3]
            pairwise = pairwise.expand(*batch, own, size, size).reshape(count, own, size, size)
        bad = ~(unary < math.inf).flatten(1).all(1) | ~(pairwise < math.inf).flatten(1).all(1)
        return cls(pairwise, unary, bad, tuple(batch))


def _potentials(name: str, value: Any) -> Tensor:
    """Log potentials in single precision at least."""
    tensor = as_floating(name, value, "log potentials")
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    padded = (1,) * (len(shape) - tensor.ndim) + tuple(tensor.shape)
    return len(padded) == len(shape) and all(a in (1, b) for a, b in zip(padded, shape))


def _shape(pairwise: Tensor, unary: Tensor | None) -> tuple[tuple[int, ...], int]:
    """The shape `(*batch, T)` that both agree in, and S."""
    got = f"pairwise {tuple(pairwise.shape)}" + ("" if unary is None else f" and unary {tuple(unary.shape)}")
    wanted = f"log potentials must be pairwise (*batch, T, S, S) and unary (*batch, T, S), got {got}"
    size = pairwise.shape[-1] if pairwise.ndim >= 2 else 0
    if not size or pairwise.shape[-2] != size or (unary is not None and unary.shape[-1:] != (size,)):
        raise ShapeError(wanted)
    try:
        shape = torch.broadcast_shapes(pairwise.shape[:-2], () if unary is None else unary.shape[:-1])
    except RuntimeError:
        raise ShapeError(wanted) from None
    if not shape or shape[-1] == 0:
        raise ShapeError(f"{wanted}; T must be positive")
    return tuple(shape), size


class _Messages(torch.autograd.Function):
    """Messages ahead and back `(B, T, S)` in logs, for pairwise `(B or 1, T or 1, S, S)`, unary `(B, 1 + T, S)`.

    ahead_t[j] is the sum (or max) over i of pairwise_t[i, j] + unary_{t-1}[i] + ahead_{t-1}[i], back_t[i] that
    over j of pairwise_{t+1}[i, j] + unary_{t+1}[j] + back_{t+1}[j]. Each is shifted so that its largest entry is
    0, which neither marginals nor their gradients feel. On CPU a compiled recursion; elsewhere, and for second
    derivatives, scans in torch.
    """

    @staticmethod
    def forward(ctx: Any, pairwise: Tensor, unary: Tensor, maximum: bool) -> tuple[Tensor, Tensor]:
        both = []
        for reverse in (False, True):
            if _is_compiled(unary):
                out = torch.from_numpy(_compiled(_array(pairwise), _array(unary.double()), maximum, reverse))
            else:
                terms, start = _terms(pairwise, unary, reverse), torch.zeros_like(unary[:, 0])
                out = _scan(terms, start, _max_product if maximum else _log_product)
            both.append(out.to(unary.dtype))
        ahead, back = both[0], torch.cat([both[1].flip(1), torch.zeros_like(both[0][:, :1])], 1)
        ctx.maximum = maximum
        ctx.save_for_backward(pairwise, unary, ahead, back)
        return ahead, back

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pairwise, unary, ahead, back = ctx.saved_tensors
        messages = ((False, ahead, gradients[0]), (True, back[:, :-1].flip(1), gradients[1][:, :-1].flip(1)))
        if _is_compiled(unary) and not torch.is_grad_enabled():
            return *_compiled_adjoint(pairwise, unary, ctx.maximum, messages, ctx.needs_input_grad[0]), None
        flows = []
        for reverse, out, gradient in messages:
            before = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], 1)
            shares = _shares(_terms(pairwise, unary, reverse) + before[..., None], ctx.maximum)
            flows.append(_accumulate(shares, gradient)[..., None, :] * shares)  # (B, N, S, S)
        nothing = torch.zeros_like(flows[0][:, :1])
        later = torch.cat([nothing, flows[1].flip(1)], 1)
        to_unary = torch.cat([flows[0].sum(-1), nothing[..., 0]], 1) + torch.cat([nothing, later], 1).sum(-1)
        return (flows[0] + later.mT).sum_to_size(pairwise.shape), to_unary, None


def _is_compiled(tensor: Tensor) -> bool:
    """True where the compiled recursion can read the tensor."""
    return tensor.device.type == "cpu"


def _terms(pairwise: Tensor, unary: Tensor, reverse: bool) -> Tensor:
    """pairwise + unary `(B, N, S, S)` of the N steps in one direction, in their order."""
    if not reverse:
        return pairwise + unary[:, :-1, :, None]
    later = pairwise[:, 1:] if pairwise.shape[1] > 1 else pairwise
    return later.flip(1).mT + unary[:, 2:].flip(1)[..., None]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def _entering(unary: np.ndarray, reverse: bool) -> np.ndarray:
    """The unary terms of the steps in one direction, `(B, N, S)`."""
    return (unary[:, 2:][:, ::-1] if reverse else unary[:, :-1]).copy()


def _stepping(pairwise: np.ndarray, reverse: bool) -> np.ndarray:
    """The pairwise terms of the steps in one direction, as a view."""
    if not reverse:
        return pairwise
    later = pairwise[:, 1:][:, ::-1] if pairwise.shape[1] > 1 else pairwise
    return later.swapaxes(2, 3)


def _compiled(pairwise: np.ndarray, unary: np.ndarray, maximum: bool, reverse: bool) -> np.ndarray:
    """Messages in the order of their steps, `(B, N, S)`."""
    from convexlearn import chain_kernels  # on first use: numba

    matrices, into = _stepping(pairwise, reverse), _entering(unary, reverse)
    out = np.empty_like(into)
    run(lambda a, b, _: chain_kernels.messages(matrices, into, maximum, out, a, b), len(out), block=_block(out))
    return out


def _compiled_adjoint(
    pairwise: Tensor, unary: Tensor, maximum: bool, messages: Iterable[tuple[bool, Tensor, Tensor]], wanted: bool
) -> tuple[Tensor | None, Tensor]:
    from convexlearn import chain_kernels

    numbers, extended = _array(pairwise), _array(unary.double())
    shape = (len(unary) if wanted else 0, *numbers.shape[1:])
    to_pairwise = np.zeros(shape, numbers.dtype if shape[1] > 1 else np.float64)  # sums over time in float64
    to_unary = np.zeros_like(extended)
    for reverse, known, gradient in messages:
        into, out, slope = _entering(extended, reverse), _array(known.double()), _array(gradient.double())
        given, taken, flow = _stepping(numbers, reverse), _stepping(to_pairwise, reverse), np.empty_like(into)

        def task(a: int, b: int, _: int, arrays: tuple = (given, into, maximum, out, slope, taken, flow)) -> None:
            chain_kernels.adjoint(*arrays, a, b)

        run(task, len(into), block=_block(into))
        if reverse:
            to_unary[:, 2:] += flow[:, ::-1]
        else:
            to_unary[:, :-1] += flow
    total = torch.from_numpy(to_pairwise).sum_to_size(pairwise.shape).to(pairwise.dtype) if wanted else None
    return total, torch.from_numpy(to_unary).to(unary.dtype)


def _block(chains: np.ndarray) -> int:
    """Chains per task of the thread pool, by the work in one."""
    return block_of(chains.shape[1] * chains.shape[2])


def _shares(terms: Tensor, maximum: bool) -> Tensor:
    """What each state before contributes to each after: softmax over axis -2, or 1 for the first of the largest."""
    possible = terms.amax(-2, keepdim=True) > -math.inf
    if maximum:
        first = torch.nn.functional.one_hot(terms.argmax(-2), terms.shape[-2]).mT
        return first.to(terms.dtype) * possible
    return torch.softmax(torch.where(possible, terms, 0.0), -2) * possible


def _accumulate(shares: Tensor, gradient: Tensor) -> Tensor:
    """Total gradients t_k = gradient_k + shares_{k+1} t_{k+1} `(B, N, S)`: a linear recursion, as a scan."""
    batch, steps, size, _ = shares.shape
    following = torch.cat([shares[:, 1:], torch.zeros_like(shares[:, :1])], 1)
    affine = torch.cat([following.mT, gradient[..., None, :]], -2)  # (t, 1) times this is the next t
    one = torch.zeros(batch, steps, size + 1, 1, dtype=shares.dtype, device=shares.device)
    one[:, :, -1] = 1.0
    start = torch.zeros(batch, size + 1, dtype=shares.dtype, device=shares.device)
    start[:, -1] = 1.0
    return _scan(torch.cat([affine, one], -1).flip(1), start, torch.matmul).flip(1)[..., :size]


def _log_product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product with sums and products of exponentials, less its largest entry."""
    return _shifted(torch.logsumexp(a[..., :, :, None] + b[..., None, :, :], -2))


def _max_product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product with maxima instead of sums and sums instead of products, less its largest entry."""
    return _shifted((a[..., :, :, None] + b[..., None, :, :]).amax(-2))


def _shifted(matrix: Tensor) -> Tensor:
    largest = matrix.amax((-2, -1), keepdim=True)
    return matrix - torch.where(largest > -math.inf, largest, 0.0)


def _scan(matrices: Tensor, start: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """All products start M_0 ... M_k `(B, N, S)` of matrices `(B, N, S, S)` in a semiring, in about 3 sqrt(N) steps.

    Blocks of sqrt(N) matrices are multiplied side by side, the blocks' products are run through one after the
    other, and then all blocks side by side again, one step at a time.
    """
    batch, steps, size, _ = matrices.shape
    length = max(1, math.isqrt(steps - 1) + 1) if steps else 1
    count = -(-steps // length)
    unit = torch.zeros(size, size, dtype=matrices.dtype, device=matrices.device)
    if product is torch.matmul:
        unit = torch.eye(size, dtype=matrices.dtype, device=matrices.device)
    else:
        unit = unit.masked_fill(~torch.eye(size, dtype=torch.bool, device=matrices.device), -math.inf)
    padding = unit.expand(batch, count * length - steps, size, size)
    blocks = torch.cat([matrices, padding], 1).reshape(batch, count, length, size, size)
    whole = blocks
    while whole.shape[2] > 1:
        if whole.shape[2] % 2:
            whole = torch.cat([whole, unit.expand(batch, count, 1, size, size)], 2)
        whole = product(whole[:, :, ::2], whole[:, :, 1::2])
    vector, starts = start[:, None], []
    for total in whole[:, :, 0].unbind(1):
        starts.append(vector)
        vector = product(vector, total)
    vectors, out = torch.stack(starts, 1) if starts else start[:, None, None][:, :0], []
    for matrix in blocks.unbind(2):
        vectors = product(vectors, matrix)
        out.append(vectors)
    return torch.cat(out, 2).flatten(1, 2)[:, :steps]
