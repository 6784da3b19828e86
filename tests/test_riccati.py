import numpy as np
import pytest
import scipy.linalg
import torch

from convexlearn.errors import DomainError, ShapeError
from convexlearn.riccati import (
    dare,
    dlyap,
    filter_covariance,
    filter_gain,
    kalman_recursion,
    kalman_update,
    lqr_gain,
    lqr_recursion,
)


def system(seed, n=4, m=2, radius=1.1, batch=()):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(*batch, n, n))
    A *= radius / np.abs(np.linalg.eigvals(A)).max(-1)[..., None, None]
    B, Q, R = rng.normal(size=(*batch, n, m)), rng.normal(size=(*batch, n, n)), rng.normal(size=(*batch, m, m))
    Q, R = Q @ Q.swapaxes(-1, -2), R @ R.swapaxes(-1, -2) + 0.1 * np.eye(m)
    return tuple(torch.tensor(M) for M in (A, B, Q, R))


def scipy_dare(*matrices):
    return scipy.linalg.solve_discrete_are(*(M.numpy() for M in matrices))


def relative_error(value, reference):
    return np.abs(value.numpy() - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize("radius", [0.5, 0.99, 1.5, 3.0])
@pytest.mark.parametrize("n", [1, 4, 12])
def test_dare_and_gain_equal_scipy(n, radius):
    A, B, Q, R = system(n, n, 2, radius)
    reference = scipy_dare(A, B, Q, R)
    P = dare(A, B, Q, R)
    assert relative_error(P, reference) < 1e-9
    a, b = A.numpy(), B.numpy()
    gain = np.linalg.solve(R.numpy() + b.T @ reference @ b, b.T @ reference @ a)
    assert relative_error(lqr_gain(A, B, Q, R), gain) < 1e-8
    K = lqr_gain(A, B, Q, R)
    residual = Q + A.mT @ P @ A - A.mT @ P @ B @ K - P
    assert residual.abs().max() < 1e-11 * P.abs().max()


def test_badly_scaled_inputs_equal_scipy():
    A, B, Q, R = system(0)
    for scale in (1e-6, 1e6):
        reference = scipy_dare(A, B, Q, scale * R)
        assert relative_error(dare(A, B, Q, scale * R), reference) < 1e-8


def test_batch_equals_loop_and_broadcasts():
    A, B, Q, R = system(1, batch=(3, 2))
    P = dare(A, B, Q[0, 0], R)
    assert P.shape == (3, 2, 4, 4)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(P[i, j], dare(A[i, j], B[i, j], Q[0, 0], R[i, j]), rtol=1e-12, atol=1e-12)
    assert dare(A[:0], B[:0], Q[:0], R[:0]).shape == (0, 2, 4, 4)
    assert dare(*(M.float() for M in (A, B, Q, R))).dtype == torch.float32


def test_dlyap_equals_scipy():
    A, _, Q, _ = system(2, n=6, radius=0.999)
    Q = Q + torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # not symmetric
    assert relative_error(dlyap(A, Q), scipy.linalg.solve_discrete_lyapunov(A.numpy(), Q.numpy())) < 1e-10


def test_gradients_and_second_derivatives():
    matrices = tuple(M.requires_grad_() for M in system(3, n=3, batch=(2,)))
    assert torch.autograd.gradcheck(dare, matrices, rtol=1e-6)
    assert torch.autograd.gradgradcheck(dare, matrices, rtol=1e-5)
    assert torch.autograd.gradcheck(lqr_gain, matrices, rtol=1e-6)
    A, _, Q, _ = system(4, n=3, radius=0.8)
    assert torch.autograd.gradcheck(dlyap, (A.requires_grad_(), Q.requires_grad_()), rtol=1e-6)
    assert torch.autograd.gradgradcheck(dlyap, (A, Q), rtol=1e-5)


def test_gradient_against_central_differences():
    A, B, Q, R = system(5)
    W = system(6)[2]

    def value(scale):
        return (dare(A * scale, B, Q, R) * W).sum()

    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(scale), scale)
    difference = (value(scale.detach() + 1e-5) - value(scale.detach() - 1e-5)) / 2e-5
    assert abs(gradient / difference - 1) < 1e-8


def test_filter_is_the_dual_of_control():
    A, B, Q, R = system(7)
    reference = scipy_dare(A.mT, B, Q, R)
    assert relative_error(filter_covariance(A, B.mT, Q, R), reference) < 1e-9
    gain = reference @ B.numpy() @ np.linalg.inv(B.T.numpy() @ reference @ B.numpy() + R.numpy())
    assert relative_error(filter_gain(A, B.mT, Q, R), gain) < 1e-8


def test_lqr_recursion_equals_dense_least_squares():
    """The optimal open-loop inputs from z_0, in one dense quadratic program, are those of the recursion."""
    A, B, Q, R = (M.numpy() for M in system(8, n=3))
    T, n, m = 4, 3, 2
    terminal = 2 * np.eye(n)
    K, P = lqr_recursion(*map(torch.tensor, (A, B, Q, R)), T, terminal=torch.tensor(terminal))
    assert K.shape == (T, m, n)
    assert P.shape == (T + 1, n, n)
    power = [np.linalg.matrix_power(A, k) for k in range(T + 1)]
    free = np.concatenate(power)
    forced = np.zeros(((T + 1) * n, T * m))
    for t in range(T + 1):
        for k in range(t):
            forced[t * n : (t + 1) * n, k * m : (k + 1) * m] = power[t - 1 - k] @ B
    weight = scipy.linalg.block_diag(*[Q] * T, terminal)
    hessian = forced.T @ weight @ forced + np.kron(np.eye(T), R)
    z0 = np.array([1.0, -2.0, 0.5])
    inputs = np.linalg.solve(hessian, -forced.T @ weight @ free @ z0)
    states = free @ z0 + forced @ inputs
    cost = states @ weight @ states + inputs @ np.kron(np.eye(T), R) @ inputs
    assert abs(z0 @ P[0].numpy() @ z0 / cost - 1) < 1e-10
    z = z0
    for t in range(T):
        s = -K[t].numpy() @ z
        np.testing.assert_allclose(s, inputs[t * m : (t + 1) * m], rtol=0, atol=1e-10)
        z = A @ z + B @ s


def test_long_recursions_reach_the_stationary_solutions():
    A, B, Q, R = system(9)
    K, P = lqr_recursion(A, B, Q, R, 200)
    torch.testing.assert_close(P[0], dare(A, B, Q, R), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(K[0], lqr_gain(A, B, Q, R), rtol=1e-10, atol=1e-10)
    gains = kalman_recursion(A, B.mT, Q, R, torch.eye(4, dtype=torch.float64), horizon=200)
    torch.testing.assert_close(gains.gain[-1], filter_gain(A, B.mT, Q, R), rtol=1e-10, atol=1e-10)


def test_a_repeated_gain_has_the_whole_gradient():
    """Also where the covariance is stationary from the start, though not its derivative."""
    A, B, V, W = system(10)
    start = filter_covariance(A, B.mT, V, W)
    assert kalman_recursion(A, B.mT, V, W, start, horizon=300).gain.shape == (300, 4, 2)
    V.requires_grad_()
    (g,) = torch.autograd.grad(kalman_recursion(A, B.mT, V, W, start, horizon=300).gain[-1].sum(), V)
    (exact,) = torch.autograd.grad(filter_gain(A, B.mT, V, W).sum(), V)
    torch.testing.assert_close(g, exact, rtol=1e-8, atol=1e-9)
    V.detach_()
    direction = torch.eye(4, dtype=torch.float64)

    def early(step):
        return kalman_recursion(A, B.mT, V + step * direction, W, start, horizon=300).gain[:5].sum()

    V.requires_grad_()
    (g,) = torch.autograd.grad(kalman_recursion(A, B.mT, V, W, start, horizon=300).gain[:5].sum(), V)
    V.detach_()
    difference = (early(1e-5) - early(-1e-5)) / 2e-5
    assert abs((g * direction).sum() / difference - 1) < 1e-6


def test_masked_update_equals_dropped_rows():
    _, B, V, W = system(11, m=3)
    C, kept = B.mT, [0, 2]
    L, P = kalman_update(V, C, W, torch.tensor([True, False, True]))
    fewer, expected = kalman_update(V, C[kept], W[kept][:, kept])
    torch.testing.assert_close(L[:, kept], fewer, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(P, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(L[:, 1], torch.zeros(4, dtype=torch.float64))


def test_covariances_stay_positive_definite():
    """Nearly noiseless observations over a long time, where the textbook form loses definiteness."""
    A = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    C, eye = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    gains = kalman_recursion(A, C, 1e-6 * eye, 1e-9 * eye[:1, :1], 1e3 * eye, horizon=500)
    assert torch.linalg.eigvalsh(gains.posterior).min() > 0


EYE = torch.eye(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ((torch.diag(torch.tensor([1.2, 0.5])), torch.tensor([[0.0], [1.0]]), EYE, EYE[:1, :1]), "not stabilizable"),
        ((EYE, torch.tensor([[0.0], [1.0]]), EYE, EYE[:1, :1]), "eigenvalue 1"),
        ((2 * EYE, EYE, 0 * EYE, EYE), "Q does not weigh the mode"),
        ((EYE, EYE, EYE, -EYE), "R must be positive definite, but it has the eigenvalue -1"),
        ((EYE, EYE, -EYE, EYE), "Q must be positive semidefinite"),
        ((EYE * torch.nan, EYE, EYE, EYE), "A has NaN"),
    ],
)
def test_mistakes_are_named(matrices, message):
    with pytest.raises(DomainError, match=message):
        dare(*(M.double() for M in matrices))


def test_errors_name_the_batch_element():
    A = torch.stack([0.5 * EYE, 1.5 * EYE])
    with pytest.raises(DomainError, match=r"batch element 1 has spectral radius 1\.5"):
        dlyap(A, EYE)
    with pytest.raises(DomainError, match="not stabilizable in batch element 1"):
        dare(A, 0 * EYE, EYE, EYE)
    with pytest.raises(DomainError, match=r"\(A, C\) is not detectable in batch element 1"):
        filter_gain(A, 0 * EYE, EYE, EYE)
    with pytest.raises(DomainError, match="R must be positive definite, but in batch element 1"):
        dare(A, EYE, EYE, torch.stack([EYE, EYE - 2]))
    with pytest.raises(DomainError, match="W must be positive semidefinite"):
        kalman_recursion(EYE, EYE, EYE, -EYE, EYE, horizon=2)
    with pytest.raises(ShapeError, match=r"B does not fit.*A \(2, 2, 2\), B \(3, 1\)"):
        dare(A, torch.ones(3, 1).double(), EYE, EYE)
    with pytest.raises(ShapeError, match="batch dimensions do not fit"):
        dlyap(0.5 * EYE.expand(2, 2, 2), EYE.expand(3, 2, 2))
    with pytest.raises(ShapeError, match="horizon must be a positive number"):
        lqr_recursion(EYE, EYE, EYE, EYE, 0)
