"""Unscented and particle filter of Table 1 by filterpy, on the crude Lorenz model; one trajectory at a time."""

import numpy as np

STEP, ORDER = 0.02, 5
PARTICLES = 100


def flow(z: np.ndarray) -> np.ndarray:
    """The state `(..., 3)` one step later, the matrix of the flow frozen at z."""
    F = np.zeros((*z.shape, 3))
    F[..., 0, 0], F[..., 0, 1], F[..., 1, 1], F[..., 2, 2] = -10, 10, -1, -8 / 3
    F[..., 1, 0], F[..., 2, 0] = 28 - z[..., 2], z[..., 1]
    term = total = z
    for k in range(1, ORDER + 1):
        term = STEP / k * (F @ term[..., None])[..., 0]
        total = total + term
    return total


def unscented(x: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Filtered means `(T, 3)` of the UKF: Merwe's points with 0.1, 2, -1, V = 0.25 I, W = I."""
    from filterpy.kalman import MerweScaledSigmaPoints, UnscentedKalmanFilter

    points = MerweScaledSigmaPoints(3, alpha=0.1, beta=2.0, kappa=-1.0)
    ukf = UnscentedKalmanFilter(3, 3, STEP, hx=lambda z: z, fx=lambda z, dt: flow(z), points=points)
    ukf.x, ukf.P = before.copy(), 1e-5 * np.eye(3)
    ukf.Q, ukf.R = 0.25 * np.eye(3), np.eye(3)
    means = []
    for y in x:
        ukf.predict()
        ukf.update(y)
        means.append(ukf.x.copy())
    return np.stack(means)


def particle(x: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Filtered means `(T, 3)` of a bootstrap filter of 100 particles, V = 0.15 I, W = I, resampled by filterpy."""
    from filterpy.monte_carlo import systematic_resample

    rng = np.random.default_rng(0)
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002  # filterpy draws from numpy's global generator
    z, weights, means = np.tile(before, (PARTICLES, 1)), np.full(PARTICLES, 1 / PARTICLES), []
    for y in x:
        z = flow(z) + np.sqrt(0.15) * rng.standard_normal(z.shape)
        logs = np.log(weights + 1e-300) - 0.5 * np.square(y - z).sum(-1)
        weights = np.exp(logs - logs.max())
        weights /= weights.sum()
        means.append(weights @ z)
        if 1 / np.square(weights).sum() < PARTICLES / 2:
            z = z[systematic_resample(weights)]
            weights = np.full(PARTICLES, 1 / PARTICLES)
    np.random.set_state(state)  # noqa: NPY002
    return np.stack(means)
