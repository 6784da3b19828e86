"""Inference on chains against enumeration of all paths, finite differences, and itself in other ways."""

import itertools
import math
import time

import pytest
import torch

from convexlearn import chain
from convexlearn.chain import ChainFactors, best_path, log_marginals
from convexlearn.errors import OptionError, ShapeError

DOUBLE = torch.float64


def draw(*shape, seed=0, scale=3.0, dtype=DOUBLE):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(steps, size, shared, seed=0):
    """Potentials of one chain with a forbidden transition, and of the state before the first."""
    pairwise = draw(size, size, seed=seed) if shared else draw(steps, size, size, seed=seed)
    pairwise[..., 0, 1] = -math.inf
    return ChainFactors(pairwise, draw(steps, size, seed=seed + 1)), draw(size, seed=seed + 2)


def enumerate_paths(factors, initial):
    """All paths with the state before the first, and their log potentials."""
    steps, size = factors.unary.shape
    pairwise = factors.pairwise.expand(steps, size, size)
    paths = torch.tensor(list(itertools.product(range(size), repeat=steps + 1)))
    values = initial[paths[:, 0]].clone()
    for t in range(steps):
        values += pairwise[t][paths[:, t], paths[:, t + 1]] + factors.unary[t][paths[:, t + 1]]
    return paths[:, 1:], values


CASES = [(1, 3, False), (1, 3, True), (2, 4, False), (5, 3, True), (5, 3, False), (7, 2, True)]


@pytest.mark.parametrize(("steps", "size", "shared"), CASES)
def test_marginals_equal_those_of_all_paths(steps, size, shared):
    factors, initial = problem(steps, size, shared)
    paths, values = enumerate_paths(factors, initial)
    exact, best = (torch.empty(steps, size, dtype=DOUBLE) for _ in range(2))
    for t, j in itertools.product(range(steps), range(size)):
        exact[t, j] = values[paths[:, t] == j].logsumexp(0) - values.logsumexp(0)
        best[t, j] = values[paths[:, t] == j].max() - values.max()
    torch.testing.assert_close(log_marginals(factors, initial), exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_marginals(factors, initial, "max"), best, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_path_is_the_best_of_all(seed):
    factors, initial = problem(6, 3, seed % 2 == 0, seed)
    paths, values = enumerate_paths(factors, initial)
    assert best_path(factors, initial).tolist() == paths[values.argmax()].tolist()


def test_of_several_best_paths_one_is_returned_whole():
    """Two best paths that share no state: picking each state by itself could mix them."""
    pairwise = torch.full((2, 2), -math.inf).fill_diagonal_(0.0)
    assert best_path(ChainFactors(pairwise, torch.zeros(4, 2))).tolist() in ([0] * 4, [1] * 4)


@pytest.mark.parametrize("semiring", ["sum", "max"])
@pytest.mark.parametrize(("steps", "size", "shared"), [(1, 3, False), (4, 3, True), (4, 3, False)])
def test_gradients_agree_with_finite_differences(steps, size, shared, semiring):
    (pairwise, unary), initial = problem(steps, size, shared)
    pairwise = torch.where(pairwise > -math.inf, pairwise, 0.0)
    arguments = [value.requires_grad_() for value in (pairwise, torch.stack([unary, -unary]), initial)]

    def marginals(pairwise, unary, initial):
        return log_marginals(ChainFactors(pairwise, unary), initial, semiring)

    assert torch.autograd.gradcheck(marginals, arguments)
    if semiring == "sum":
        assert torch.autograd.gradgradcheck(marginals, arguments)


def test_gradient_is_the_covariance_with_the_path():
    """d log p(s_T = j) / d unary_t[i] = p(s_t = i | s_T = j) - p(s_t = i), from all paths, past a forbidden one."""
    factors, initial = problem(4, 3, True)
    unary = factors.unary.clone().requires_grad_()
    log_marginals(ChainFactors(factors.pairwise, unary), initial)[-1, 2].backward()
    paths, values = enumerate_paths(factors, initial)
    weights, given = values.softmax(0), (values + torch.where(paths[:, -1] == 2, 0.0, -math.inf)).softmax(0)
    expected = torch.stack([torch.stack([((given - weights) * (p == i)).sum() for i in range(3)]) for p in paths.T])
    torch.testing.assert_close(unary.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("semiring", ["sum", "max"])
@pytest.mark.parametrize("shared", [False, True])
def test_scans_in_torch_equal_the_compiled_recursion(semiring, shared, monkeypatch):
    pairwise = draw(*(() if shared else (2, 130)), 4, 4).requires_grad_()
    unary = draw(2, 130, 4, seed=1).requires_grad_()
    weights = draw(2, 130, 4, seed=2)

    def both():
        out = log_marginals(ChainFactors(pairwise, unary), semiring=semiring)
        return out, *torch.autograd.grad((weights * out).sum(), [pairwise, unary])

    compiled = both()
    monkeypatch.setattr(chain, "_is_compiled", lambda tensor: False)
    for a, b in zip(both(), compiled):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_long_chain_is_finite_and_normalised(dtype):
    factors = ChainFactors(draw(4, 4, dtype=dtype), draw(50_000, 4, seed=1, scale=100.0, dtype=dtype).requires_grad_())
    out = log_marginals(factors)
    assert out.dtype == dtype
    assert bool(torch.isfinite(out).all())
    torch.testing.assert_close(out.detach().exp().sum(-1), torch.ones(50_000, dtype=dtype))
    out.sum().backward()
    assert bool(torch.isfinite(factors.unary.grad).all())


def test_a_long_chain_of_independent_steps_is_a_softmax():
    unary = draw(50_000, 5)
    out = log_marginals(ChainFactors(torch.zeros(5, 5, dtype=DOUBLE), unary))
    torch.testing.assert_close(out, unary.log_softmax(-1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shared", [True, False])
def test_a_hundred_thousand_symbols_of_sixteen_states_take_under_two_seconds(shared):
    unary = draw(100_000, 16, dtype=torch.float32).requires_grad_()
    pairwise = draw(*(() if shared else (100_000,)), 16, 16, dtype=torch.float32)
    log_marginals(ChainFactors(pairwise if shared else pairwise[:9], unary[:9]))  # compiles
    begin = time.process_time()
    out = log_marginals(ChainFactors(pairwise, unary))
    forward = time.process_time() - begin
    out.sum().backward()
    assert forward < 2.0


def test_a_chain_without_a_path_is_nan_and_leaves_the_others_alone():
    unary = draw(4, 6, 3)
    unary[1, 2] = -math.inf
    unary[2, 3, 0] = math.nan
    unary[3, 0, 1] = math.inf
    pairwise, leaf = draw(3, 3, seed=1).requires_grad_(), unary.clone().requires_grad_()
    out = log_marginals(ChainFactors(pairwise, leaf))
    assert torch.isnan(out).flatten(1).all(1).tolist() == [False, True, True, True]
    torch.testing.assert_close(out[0], log_marginals(ChainFactors(pairwise, unary[0])))
    out[0].square().sum().backward()
    assert bool(torch.isfinite(pairwise.grad).all())
    assert leaf.grad[1:].abs().sum() == 0
    assert best_path(ChainFactors(pairwise, unary))[1:].unique().tolist() == [-1]


def test_axes_between_batch_and_time_are_chains_of_their_own():
    pairwise, unary = draw(3, 1, 5, 4, 4), draw(3, 2, 5, 4, seed=1)
    factors = ChainFactors(pairwise, unary)
    out, path = log_marginals(factors), best_path(factors)
    assert path.shape == (3, 2, 5)
    for b, c in itertools.product(range(3), range(2)):
        one = ChainFactors(pairwise[b, 0], unary[b, c])
        torch.testing.assert_close(out[b, c], log_marginals(one))
        assert path[b, c].tolist() == best_path(one).tolist()


def test_pairwise_potentials_alone_are_enough():
    pairwise = draw(2, 5, 3, 3)
    nothing = ChainFactors(pairwise, torch.zeros(2, 5, 3, dtype=DOUBLE))
    torch.testing.assert_close(log_marginals(pairwise), log_marginals(nothing))


def test_an_empty_batch_has_an_empty_gradient():
    pairwise, unary = draw(3, 3).requires_grad_(), draw(0, 5, 3).requires_grad_()
    out = log_marginals(ChainFactors(pairwise, unary))
    assert out.shape == (0, 5, 3)
    out.sum().backward()
    assert pairwise.grad.abs().sum() == 0
    assert best_path(ChainFactors(pairwise, unary)).shape == (0, 5)


@pytest.mark.parametrize(
    "factors",
    [
        draw(5, 3, 4),
        draw(3, 3),
        draw(0, 3, 3),
        ChainFactors(draw(5, 3, 3), draw(5, 4)),
        ChainFactors(draw(5, 3, 3), draw(2, 6, 3)),
    ],
)
def test_wrong_shapes_are_refused(factors):
    with pytest.raises(ShapeError, match=r"pairwise \(\*batch, T, S, S\)"):
        log_marginals(factors)


def test_wrong_options_are_refused():
    with pytest.raises(OptionError, match="did you mean 'max'"):
        log_marginals(draw(5, 3, 3), semiring="maxx")
    with pytest.raises(ShapeError, match=r"initial must broadcast to .* = \(3,\)"):
        log_marginals(draw(5, 3, 3), torch.zeros(2))
