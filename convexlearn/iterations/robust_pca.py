"""Robust principal component analysis: low rank plus sparse (Candes et al. 2011), and its unfolding (CORONA)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from convexlearn.checks import SIZES, number, require_that, shown
from convexlearn.convolution import Convolution, JointConvolution
from convexlearn.errors import CompileError, OptionError, suggest
from convexlearn.iterations.base import Iteration, Layer, Slot
from convexlearn.iterations.proximal_gradient import FISTA, ISTA, State
from convexlearn.split_instance import Instance
from convexlearn.splitting import Split, split

PRODUCTS = ("W1", "W2", "W3", "W4", "W5", "W6")


def robust_pca(
    shape: tuple[int, int], low_rank: float, sparse: float, *, grouped: bool = False, is_complex: bool = False
) -> Split:
    """min 1/2 |D - L - S|^2 + low_rank |L|_* + sparse |S|_1, context D `(B, p, q)`, decision (L, S), split.

    grouped: 2-norms of the rows of S in place of entries, as in CORONA, where a row is a pixel over time. The
    weights are parameters named low_rank and sparse. Source: Solomon et al. 2019 (reference 37 of the paper).

    >>> print(robust_pca((4, 3), 0.5, 0.1))
    smooth 1/2|L+S-D|^2 (L = 2) + low_rank |L|_* [singular value threshold] + sparse |S|_1 [soft threshold]
    """
    _check_shape("robust_pca", shape)
    for name, weight in {"low_rank": low_rank, "sparse": sparse}.items():
        require_that("robust_pca", name, number(least=0), weight)
    D = cp.Parameter(shape, name="D", complex=is_complex)
    L, S = (cp.Variable(shape, name=name, complex=is_complex) for name in "LS")
    weights = [cp.Parameter(nonneg=True, name=n, value=v) for n, v in (("low_rank", low_rank), ("sparse", sparse))]
    size = cp.sum(cp.norm(S, 2, axis=1)) if grouped else cp.sum(cp.abs(S))
    fit = 0.5 * cp.sum_squares(D - L - S)
    return split(cp.Problem(cp.Minimize(fit + weights[0] * cp.normNuc(L) + weights[1] * size)), [D], [L, S])


def principal_component_pursuit(shape: tuple[int, int], weight: float | None = None) -> Split:
    """min |L|_* + weight |S|_1 subject to L + S = D, by default weight = 1/sqrt(max(shape)) (Candes et al. 2011).

    Run `Converged(ADMM(principal_component_pursuit(shape)))`. A penalty near p q/(8 sum |D|) suits it.
    """
    _check_shape("principal_component_pursuit", shape)
    if weight is not None:
        require_that("principal_component_pursuit", "weight", number(least=0), weight)
    D = cp.Parameter(shape, name="D")
    L, S = (cp.Variable(shape, name=name) for name in "LS")
    sparse = cp.Parameter(nonneg=True, name="sparse", value=max(shape) ** -0.5 if weight is None else weight)
    goal = cp.normNuc(L) + sparse * cp.norm1(S)
    return split(cp.Problem(cp.Minimize(goal), [L + S == D]), [D], [L, S])


def _check_shape(where: str, shape: Any) -> None:
    if not SIZES.fits(shape) or len(shape) != 2:
        raise OptionError(f"{where}: shape must be (p, q), got {shown(shape)}")


class RobustPCA(ISTA):
    """Proximal gradient for D = L + S with a slot for every product, as CORONA unfolds it.

    L+ = prox(W1 D + W3 S + W5 L), S+ = prox(W2 D + W4 S + W6 L). By default W1 and W2 are step, W3 and W6 minus
    step, W4 and W5 one minus step: proximal gradient on the split of `robust_pca`. The slots W1 to W6 take modules
    (B, p, q) -> (B, p, q); `convolve("W1", ..., "W6", image=(h, w))` fills them with convolutions of the q frames, at
    first multiples of a single pixel. low_rank_prox and sparse_prox take (v, t) -> v in place of the thresholdings.
    threshold: (low rank, sparse), by default step times the weights.
    """

    slots = (
        Slot("step", "positive"),
        Slot("threshold", "threshold"),
        *(Slot(name, "module", objective=True) for name in PRODUCTS),
        Slot("low_rank_prox", "prox", objective=True),
        Slot("sparse_prox", "prox", objective=True),
    )

    def check_split(self) -> None:
        """D = L + S with one term on each."""
        shapes = [v.shape for v in self.split.variables]
        fits = len(shapes) == 2 and shapes[0] == shapes[1] and len(self.split.terms) == 2
        if not fits or len(self.split.quadratics) != 1 or self.split.quadratics[0].map.shape != shapes[0]:
            raise CompileError(
                f"RobustPCA takes the split of cl.robust_pca, D = L + S with a term on each, got: {self.split}"
            )

    def layer(self, instance: Instance, slots: Mapping[str, Any] | None = None) -> Layer:
        """One step."""
        given = self.given(slots, instance)
        step = given.get("step", 1 / instance.L)
        thresholds = instance.thresholds(step)
        if given.get("threshold") is not None:
            thresholds = self.split_threshold(given["threshold"], thresholds)
        D = instance.y.reshape(instance.batch, *instance.y_shape)
        inner = inner_sums([given.get(name) for name in PRODUCTS], D, step)
        shrinks: list[Any] = [given.get(name) for name in ("low_rank_prox", "sparse_prox")]

        def shrink(k: int, v: Tensor) -> Tensor:
            term, t, own = instance.terms[k], thresholds[k], shrinks[k]
            return term.entry.bare(v, term.fit(t), **term.data) if own is None else own(v, t)

        def advance(state: State) -> State:
            found = (shrink(k, v) for k, v in enumerate(inner(*self.unstack(state.z))))
            return State(self.stack(tuple(found)))

        return advance

    def replaced(self, values: Mapping[str, Any], freed: Sequence[str] = ()) -> Iteration:
        """A copy with other values; step stays what scales the thresholds."""
        return Iteration.replaced(self, values, freed)

    def convolution(
        self,
        name: str,
        *,
        image: tuple[int, int] | None = None,
        size: int | None = None,
        boundary: str = "zero",
        exact: bool = True,
    ) -> Convolution:
        """The factor of a product slot as a kernel `(size, size)`, 5 by default, on frames of h w = p pixels."""
        shape, split = self.split.variables[0].shape, self.split
        if not SIZES.fits(image) or len(image or ()) != 2 or math.prod(image or ()) != shape[0]:
            raise OptionError(
                f"convolve: rows are the {shape[0]} pixels of frames; give image=(h, w) with h w = {shape[0]}"
            )
        if name not in PRODUCTS:
            raise OptionError(f"convolve: slot '{name}' is no product; {suggest(name, PRODUCTS)}")
        step = float(self.initial("step"))
        scale = factors(step)[PRODUCTS.index(name)]
        is_complex = split.variables[0].is_complex
        return Convolution.delta(
            size or 5, scale, is_complex=is_complex, dtype=torch.float64, boundary=boundary, image=image
        )

    def initial(self, name: str, k: int = 0) -> Tensor:
        """Start value of a slot."""
        self.slot(name)
        if name in self.values:
            return self.values[name]
        if name == "step":
            return 1 / self.nominal(name).L
        return self.initial_threshold(self.initial("step")) if name == "threshold" else torch.tensor(1.0)

    def limits(self, instance: Instance) -> dict[str, Any]:
        """step < 2/L = 1, while the products are the problem's."""
        return {} if set(PRODUCTS) & self.values.keys() else {"step": 2 / instance.L}


def factors(step: Any) -> tuple[Any, ...]:
    """W1 to W6 of proximal gradient."""
    return step, step, -step, 1 - step, 1 - step, -step


def inner_sums(modules: list[Any], D: Tensor, step: Any) -> Callable[[Tensor, Tensor], Sequence[Tensor]]:
    """(L, S) -> what is thresholded, W1 D + W3 S + W5 L and W2 D + W4 S + W6 L."""
    if JointConvolution.fits(modules):
        joint = JointConvolution([modules[0::2], modules[1::2]])
        return lambda L, S: joint([D, S, L])
    W = [module or (lambda v, c=c: c * v) for module, c in zip(modules, factors(step))]
    drive = W[0](D), W[1](D)
    return lambda L, S: (drive[0] + W[2](S) + W[4](L), drive[1] + W[3](S) + W[5](L))


__all__ = ["FISTA", "RobustPCA", "principal_component_pursuit", "robust_pca"]
