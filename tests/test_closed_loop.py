import math
from typing import NamedTuple

import cvxpy as cp
import pytest
import torch
from contracts import SimulatorContract
from torch import Tensor, nn

from convexlearn.errors import ConvexLearnError, FailureWarning, OptionError, ShapeError
from convexlearn.evaluate import evaluate
from convexlearn.failures import collector
from convexlearn.objectives import cost
from convexlearn.riccati import dare, lqr_recursion
from convexlearn.rules.affine import AffineRule
from convexlearn.rules.base import DecisionRule
from convexlearn.rules.convex import ConvexRule
from convexlearn.rules.kalman import KalmanFilter
from convexlearn.rules.lqg import LQG, LQR
from convexlearn.rules.tree import TreeRule
from convexlearn.simulate.closed_loop import ClosedLoop
from convexlearn.simulate.plants import LinearGaussian, random_linear
from convexlearn.tune import tune

n, m = 4, 2
A, B = random_linear(0, n, m)
EYE, SMALL = torch.eye(n, dtype=torch.float64), torch.eye(m, dtype=torch.float64)
PLANT = LinearGaussian(A, B, V=0.25 * EYE)
PARTIAL = LinearGaussian(A, B, V=0.25 * EYE, C=EYE[:3], W=0.1 * EYE[:3, :3])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def loop_of(plant, horizon=6, **options):
    given = {"initial": plant.initial, "noise": plant.noise, "observe": plant.observe, "stage_cost": plant.stage_cost}
    return ClosedLoop(plant, horizon, **given | options)


def linear_rule(scale=0.1):
    return AffineRule(scale * torch.ones(m, n, dtype=torch.float64))


class TestStateFeedback(SimulatorContract):
    @pytest.fixture
    def simulator(self):
        return loop_of(PLANT)

    @pytest.fixture
    def rule(self):
        return linear_rule()


class TestRuleWithMemory(TestStateFeedback):
    @pytest.fixture
    def simulator(self):
        return loop_of(PARTIAL)

    @pytest.fixture
    def rule(self):
        return LQG(A, B, EYE[:3], EYE, SMALL, 0.25 * EYE, 0.1 * EYE[:3, :3])

    def test_failed_sample_is_marked(self, simulator, rule):
        class Failing(DecisionRule):
            def start(self, x):
                return rule.start(x)

            def decide(self, x, memory):
                s, memory = rule.decide(x, memory)
                return torch.where((torch.arange(len(s)) == 1)[:, None], torch.nan, s), memory

        assert self.run(simulator, Failing()).failed.tolist() == [False, True, False]


class Forecast(NamedTuple):
    z: Tensor
    ahead: Tensor


class TestSeveralContexts(TestStateFeedback):
    """A state of two parts, named; the rule sees state and forecast."""

    @pytest.fixture
    def simulator(self):
        def initial(batch, generator):
            return Forecast(PLANT.initial(batch, generator), torch.zeros(batch, 3, dtype=torch.float64))

        return ClosedLoop(
            lambda z, u, w: Forecast(PLANT(z.z, u, w), z.ahead + 1),
            4,
            initial=initial,
            noise=PLANT.noise,
            observe=lambda z, t, w: (z.z, z.ahead),
            stage_cost=lambda z, u: PLANT.stage_cost(z.z, u),
            terminal_cost=lambda z: z.z.square().sum(-1),
        )

    @pytest.fixture
    def rule(self):
        return AffineRule(0.1 * torch.ones(m, n + 3, dtype=torch.float64))

    def test_named_states_stay_named(self, simulator, rule):
        rollout = self.run(simulator, rule)
        assert rollout.state.ahead.shape == (3, 5, 3)
        assert [part.shape for part in rollout.context] == [(3, 4, n), (3, 4, 3)]


def test_equals_the_equations():
    rule, loop = linear_rule(), loop_of(PLANT, 5, terminal_cost=lambda z: 3 * z.square().sum(-1))
    rollout = loop(rule, 2, generator())
    draw = generator()
    z = PLANT.initial(2, draw)
    for t in range(5):
        u = rule(z)
        torch.testing.assert_close(rollout.state[:, t], z)
        torch.testing.assert_close(rollout.context[:, t], z)
        torch.testing.assert_close(rollout.decision[:, t], u)
        stage = z.square().sum(-1) + u.square().sum(-1)
        z = z @ A.mT + u @ B.mT + PLANT.noise(2, t, draw)
        stage = stage + 3 * z.square().sum(-1) if t == 4 else stage
        torch.testing.assert_close(rollout.cost[:, t], stage)
    torch.testing.assert_close(rollout.state[:, 5], z)
    assert rollout.failed_at.tolist() == [5, 5]
    assert rollout.explain() == ""


@pytest.mark.parametrize(
    "rule",
    [linear_rule(), LQR(A, B, EYE, SMALL), TreeRule(SMALL, n)],
    ids=["affine", "LQR", "tree"],
)
def test_batched_equals_looped(rule):
    z0 = PLANT.initial(4, generator())
    noises = [PLANT.noise(4, t, generator(t)) for t in range(6)]

    def loop(rows):
        return loop_of(PLANT, initial=lambda b, g: z0[rows], noise=lambda b, t, g: noises[t][rows])

    together = loop(slice(None))(rule, 4, generator())
    for i in range(4):
        alone = loop(slice(i, i + 1))(rule, 1, generator())
        torch.testing.assert_close(alone.cost, together.cost[i : i + 1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(alone.state, together.state[i : i + 1], rtol=1e-12, atol=1e-12)


def test_common_random_numbers_whatever_the_rule_does():
    """States under two rules differ by what their decisions do, and by nothing else."""
    loop = loop_of(PLANT)
    a, b = loop(linear_rule(0.0), 3, generator()), loop(linear_rule(0.1), 3, generator())
    for rollout in (a, b):
        state, u = rollout.state.detach(), rollout.decision.detach()
        rollout_noise = state[:, 1:] - state[:, :-1] @ A.mT - u @ B.mT
        draw = generator()
        torch.testing.assert_close(state[:, 0], PLANT.initial(3, draw))
        for t in range(6):
            torch.testing.assert_close(rollout_noise[:, t], PLANT.noise(3, t, draw))
    assert torch.equal(loop(linear_rule(), 2).cost, loop(linear_rule(), 2).cost)  # no generator: always seed 0


def test_gradient_against_central_differences():
    rule = LQG(A, B, EYE[:3], EYE, SMALL, 0.25 * EYE, 0.1 * EYE[:3, :3])
    loop = loop_of(PARTIAL, 8, terminal_cost=lambda z: z.square().sum(-1))

    def value():
        return loop(rule, 3, generator()).cost.sum(1).mean()

    value().backward()
    for parameter in rule.free.values():
        for i in range(len(parameter)):
            values = []
            for step in (1e-5, -2e-5, 1e-5):
                with torch.no_grad():
                    parameter[i] += step
                    values.append(value().item())
            difference = (values[0] - values[1]) / 2e-5
            assert abs(parameter.grad[i].item() - difference) < 1e-6 * max(1.0, abs(difference))


def test_lqr_costs_the_trace_and_lqg_the_lyapunov_cost():
    with torch.no_grad():
        lqr = loop_of(PLANT, 220)(LQR(A, B, EYE, SMALL), 400, generator()).cost[:, 20:].mean(1)
        rule = LQG(A, B, EYE[:3], EYE, SMALL, 0.25 * EYE, 0.1 * EYE[:3, :3])
        lqg = loop_of(PARTIAL, 220)(rule, 400, generator()).cost[:, 20:].mean(1)
    optimum = 0.25 * torch.trace(dare(A, B, EYE, SMALL))
    for sample, exact in ((lqr, optimum), (lqg, rule.average_cost().detach())):
        assert abs(sample.mean() - exact) < 3 * sample.std() / len(sample) ** 0.5


def test_finite_horizon_cost_is_exact():
    """E of the total cost = tr(P_0 start) + sum of tr(P_t+1 V)."""
    rule = LQR(A, B, EYE, SMALL, horizon=5)
    loop = loop_of(PLANT, 5, terminal_cost=lambda z: z.square().sum(-1))
    P = lqr_recursion(A, B, EYE, SMALL, 5)[1]
    expected = torch.trace(P[0]) + sum(torch.trace(P[t + 1]) * 0.25 for t in range(5))
    with torch.no_grad():
        total = loop(rule, 20000, generator()).cost.sum(1)
    assert abs(total.mean() - expected) < 3 * total.std() / len(total) ** 0.5


def test_filter_follows_the_plant():
    """A filter that sees the inputs through its context; estimates in `decision`, targets in `state`."""
    rule = KalmanFilter(A, None, EYE[:3], 0.25 * EYE, 0.1 * EYE[:3, :3])
    loop = ClosedLoop(
        lambda z, u, w: PARTIAL(z, z.new_zeros(len(z), m), w), 40, initial=PARTIAL.initial, noise=PARTIAL.noise,
        observe=PARTIAL.observe, stage_cost=lambda z, u: (z - u).square().sum(-1),
    )  # fmt: skip
    rollout = loop(rule, 50, generator())
    torch.testing.assert_close(rollout.decision, rule(rollout.context), rtol=1e-9, atol=1e-9)
    posterior = rule.moments(rollout.context).gains.posterior[0, -1]
    error = (rollout.state[:, 20:-1] - rollout.decision[:, 20:]).square().sum(-1).mean()
    assert abs(error / torch.trace(posterior) - 1) < 0.15


class Growth(nn.Module):
    """u = a z for a scalar plant; a is learned."""

    def __init__(self, a=0.5):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x):
        return self.a * x


def scalar_loop(plant, z0, horizon=8, **options):
    start = torch.tensor(z0, dtype=torch.float64)[:, None]
    return ClosedLoop(
        plant,
        horizon,
        initial=lambda batch, g: start[:batch],
        stage_cost=lambda z, u: z.square()[:, 0] + u.square()[:, 0],
        **options,
    )


def exploding(z, u, w):
    return torch.exp(z) * u  # overflows within a step or two from large z


def test_diverging_sample_does_not_poison_the_batch():
    rule, alone = Growth(), Growth()
    rollout = scalar_loop(exploding, [0.1, 800.0, 0.2])(rule, 3)
    assert rollout.failed.tolist() == [False, True, False]
    assert rollout.failed_at.tolist() == [8, 0, 8]
    assert "sample 1 failed at step 0: the state diverged" in rollout.explain()
    assert all(torch.isfinite(part).all() for part in (rollout.state, rollout.decision, rollout.cost))
    rollout.cost.sum().backward()
    good = scalar_loop(exploding, [0.1, 0.2])(alone, 2)
    good.cost.sum().backward()
    assert torch.isfinite(rule.a.grad)
    torch.testing.assert_close(rule.a.grad, alone.a.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(rollout.cost[[0, 2]], good.cost, rtol=1e-12, atol=0)


def test_divergence_beyond_the_bound_is_a_failure():
    rule = Growth(3.0)
    rollout = scalar_loop(lambda z, u, w: u, [1e-9, 1.0], 20, bound=1e4)(rule, 2)
    assert rollout.failed.tolist() == [False, True]
    assert int(rollout.failed_at[1]) == 8  # 3^9 > 1e4
    rollout.cost.sum().backward()
    alone = Growth(3.0)
    scalar_loop(lambda z, u, w: u, [1e-9], 20, bound=1e4)(alone, 1).cost.sum().backward()
    torch.testing.assert_close(rule.a.grad, alone.a.grad, rtol=1e-10, atol=0)


def test_infinite_gradient_in_the_rule_stays_with_its_sample():
    """sqrt of a negative number: NaN in value and gradient."""

    class Root(Growth):
        def forward(self, x):
            return self.a * torch.sqrt(x)

    rule, alone = Root(), Root()
    plant = lambda z, u, w: 0.5 * z + u  # noqa: E731
    rollout = scalar_loop(plant, [1.0, -1.0, 2.0])(rule, 3)
    assert rollout.failed.tolist() == [False, True, False]
    assert "decision is NaN" in rollout.explain()
    rollout.cost.sum().backward()
    scalar_loop(plant, [1.0, 2.0])(alone, 2).cost.sum().backward()
    torch.testing.assert_close(rule.a.grad, alone.a.grad, rtol=1e-12, atol=0)


def test_all_samples_failed():
    rollout = scalar_loop(exploding, [800.0, 900.0])(Growth(), 2)
    assert rollout.failed.all()
    assert not rollout.cost.requires_grad
    assert torch.isfinite(rollout.cost).all()


def test_nan_in_the_first_state_fails_there():
    rollout = scalar_loop(lambda z, u, w: u, [float("nan"), 1.0])(Growth(), 2)
    assert rollout.failed.tolist() == [True, False]
    assert rollout.explain().startswith("sample 0 failed at step 0: the first state is NaN or infinite; correct")


def test_nan_in_the_noise_is_told_from_divergence():
    """Recorded noise with a gap: the sample is named, the others and their gradient are those of a run without it."""
    recorded = torch.ones(3, 8, 1, dtype=torch.float64)
    recorded[1, 4] = torch.nan
    rule, alone = Growth(), Growth()
    plant = lambda z, u, w: 0.5 * z + 0.1 * u + w  # noqa: E731
    rollout = scalar_loop(plant, [1.0, 2.0, 3.0], noise=lambda b, t, g: recorded[:, t])(rule, 3)
    assert rollout.failed.tolist() == [False, True, False]
    assert rollout.explain().startswith("sample 1 failed at step 4: the noise is NaN or infinite; correct what noise(")
    rollout.cost[~rollout.failed].sum().backward()
    scalar_loop(plant, [1.0, 3.0], noise=lambda b, t, g: recorded[::2, t])(alone, 2).cost.sum().backward()
    torch.testing.assert_close(rule.a.grad, alone.a.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("features", [None, torch.sqrt])
def test_a_nan_context_of_a_convex_rule_fails_its_sample_alone(features):
    """Observed with a gap, or NaN by the features, whose gradient is NaN too."""

    def build():
        u, x = cp.Variable(1), cp.Parameter(1, name="x")
        weight = cp.Parameter(name="weight", value=0.5, nonneg=True)
        problem = cp.Problem(cp.Minimize(cp.sum_squares(u - x) + weight * cp.sum_squares(u)), [u <= 3])
        return ConvexRule(problem, context=x, decision=u, features=features)

    rule, alone = build(), build()
    options = {}
    if features is None:
        gap = torch.tensor([[False], [True], [False]])
        options["observe"] = lambda z, t, w: torch.where(gap & (t == 2), torch.nan, z)
    plant = lambda z, u, w: z + 0.1 * u - torch.where(z == 2.0, 6.0, 0.0)  # noqa: E731
    rollout = scalar_loop(plant, [1.0, 2.0, 3.0], 4, **options)(rule, 3)
    assert rollout.failed.tolist() == [False, True, False]
    step = 1 if features else 2
    assert rollout.explain().startswith(f"sample 1 failed at step {step}: the context is NaN or infinite; correct")
    rollout.cost[~rollout.failed].sum().backward()
    scalar_loop(plant, [1.0, 3.0], 4)(alone, 2).cost.sum().backward()
    torch.testing.assert_close(rule.free["weight"].grad, alone.free["weight"].grad, rtol=1e-10, atol=0)


def test_cost_that_is_not_finite_fails():
    start = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    loop = ClosedLoop(lambda z, u, w: z, 2, initial=lambda b, g: start, stage_cost=lambda z, u: (1 / z)[:, 0] + u[:, 0])
    rollout = loop(Growth(), 2)
    assert rollout.failed.tolist() == [True, False]
    assert "check stage_cost" in rollout.explain()
    assert rollout.cost[0].tolist() == [0.0, 0.0]


def test_policy_that_becomes_infeasible_is_named_with_its_step():
    u, x = cp.Variable(1), cp.Parameter(1, name="x")
    weight = cp.Parameter(name="weight", value=0.5, nonneg=True)
    objective = cp.Minimize(cp.sum_squares(u - x) + weight * cp.sum_squares(u))
    rule = ConvexRule(cp.Problem(objective, [u <= x, x <= 2]), context=x, decision=u, solver="dense")
    assert collector() is None
    loop = scalar_loop(lambda z, u, w: z + 0.5, [0.0, 1.2], 3)
    rollout = loop(rule, 2)
    assert rollout.failed.tolist() == [False, True]
    assert rollout.explain() == (
        "sample 1 failed at step 2: INFEASIBLE: the rule found no decision; soften its constraints, "
        "or give the rule on_failure='fallback'"
    )
    assert rollout.causes == ("", "INFEASIBLE")
    assert rollout.select(rollout.failed).explain([7]).startswith("sample 7 failed at step 2: INFEASIBLE")
    rollout.cost.sum().backward()
    assert torch.isfinite(rule.free["weight"].grad)
    named = "1 of 3 samples failed: 1; they are left out of the average\n  sample 1 failed at step 2: INFEASIBLE"
    with pytest.warns(FailureWarning, match=named):
        evaluate(rule, scalar_loop(lambda z, u, w: z + 0.5, [0.0, 1.2, 0.1], 3), cost, samples=3)


def test_a_warning_of_tune_names_sample_and_step():
    rule = Growth()
    loop = scalar_loop(exploding, [0.1, 800.0, 0.2], 2)
    named = r"tune, step 0: 1 of 3 .*\n  sample 1 failed at step 0: the state diverged"
    with pytest.warns(FailureWarning, match=named):
        tune(rule, loop, cost, steps=1, batch_size=3, progress=False)


def test_a_policy_in_patches_names_the_cause_of_its_sample():
    """A rule that solves two problems per sample: the causes are found by sample."""
    u, x = cp.Variable(), cp.Parameter(name="x")
    inner = ConvexRule(cp.Problem(cp.Minimize(cp.square(u - x)), [x <= 1, u >= 0]), context=x, decision=u)
    rollout = scalar_loop(lambda z, u, w: z, [0.0, 2.0, 1.0], 2)(
        lambda x: inner(torch.cat([x, x - 1], 1).flatten()).reshape(-1, 2)[:, :1], 3
    )
    assert rollout.causes == ("", "INFEASIBLE", "")
    assert rollout.failed.tolist() == [False, True, False]


def test_two_rules_are_compared_by_pairs():
    """On common random numbers the error of the difference is far below that of the means."""
    P = dare(A, B, EYE, SMALL)
    loop = loop_of(PLANT, 20, terminal_cost=lambda z: ((z @ P) * z).sum(-1))  # with it the stationary LQR is optimal
    good, near = LQR(A, B, EYE, SMALL), LQR(A, B, EYE, 4 * SMALL)
    first, second = (evaluate(rule, loop, cost, samples=200) for rule in (near, good))
    difference = first - second
    assert difference.standard_error < 0.2 * math.hypot(first.standard_error, second.standard_error)
    assert difference.mean > 3 * difference.standard_error
    assert difference.mean == pytest.approx(first.mean - second.mean, rel=1e-9)
    with pytest.raises(ShapeError, match="200 and 3 samples have no common random numbers"):
        first - evaluate(good, loop, cost, samples=3)


def test_empty_batch_and_repr():
    rollout = loop_of(PLANT)(linear_rule(), 0, generator())
    assert rollout.cost.shape == (0, 6)
    assert rollout.state.shape == (0, 7, n)
    assert len(loop_of(PLANT)(linear_rule()).failed) == 64
    assert rollout.select(torch.zeros(0, dtype=torch.bool)).failed_at.shape == (0,)


def test_tuning_in_closed_loop_approaches_the_optimum():
    rule = AffineRule(torch.zeros(m, n, dtype=torch.float64))
    loop = loop_of(PLANT, 20)
    tune(rule, loop, cost, steps=60, learning_rate=0.05, batch_size=32, progress=False)
    best = evaluate(LQR(A, B, EYE, SMALL), loop, cost, samples=200).mean
    assert evaluate(rule, loop, cost, samples=200).mean < 1.02 * best


def test_mistakes_are_named():
    rule = linear_rule()
    with pytest.raises(OptionError, match="horizon must be a positive number of steps, got 0"):
        loop_of(PLANT, 0)
    with pytest.raises(TypeError, match="initial must be a real tensor"):
        loop_of(PLANT, initial=3)
    with pytest.raises(OptionError, match="batch_size must be an integer of at least 0"):
        loop_of(PLANT)(rule, -1)
    cases = {
        r"plant\(z, u, w\) must return a state of the shape of z, \[\(3, 4\)\], got \[\(3, 2\)\]": loop_of(
            PLANT, noise=None, observe=None
        ),
        r"stage_cost\(z, u\) must return one real number per sample, \(3,\), got \(3, 4\)": loop_of(
            PLANT, stage_cost=lambda z, u: z
        ),
        r"terminal_cost\(z\) must return": loop_of(PLANT, terminal_cost=lambda z: z),
        r"initial\(batch, generator\) must have the batch first, \(3, ...\), got \(2, 4\)": loop_of(
            PLANT, initial=lambda batch, generator: torch.zeros(2, n)
        ),
        r"noise\(batch, t, generator\) must have the batch first": loop_of(PLANT, noise=lambda b, t, g: torch.zeros(n)),
    }
    first = next(iter(cases))
    cases[first].plant = lambda z, u, w: z[:, :2]
    for message, loop in cases.items():
        with pytest.raises(ShapeError, match=message):
            loop(rule, 3, generator())
    with pytest.raises(ShapeError, match="the rule's decision must have the batch first"):
        loop_of(PLANT)(lambda x: torch.zeros(m), 3)
    with pytest.raises(TypeError, match="stage_cost must be a function or module, got None"):
        loop_of(PLANT, stage_cost=None)


@pytest.mark.parametrize(
    ("rule", "options", "error", "where"),
    [
        (
            lambda x: x[:, :3],
            {},
            ShapeError,
            r"in stage_cost\(z, u\) with u \(5, 3\) at step 0; the state is z \(5, 4\)",
        ),
        (lambda x: x[:, 0, 0], {}, IndexError, "in the rule at step 0"),
        (linear_rule(), {"noise": lambda b, t: None}, TypeError, r"in noise\(batch, t, generator\) at step 0"),
        (linear_rule(), {"observe": lambda z: z}, TypeError, r"in observe\(z, t, w\) at step 0"),
        (linear_rule(), {"stage_cost": lambda z, u: z @ u}, RuntimeError, r"in stage_cost\(z, u\) with u \(5, 2\)"),
        (linear_rule(), {"observe": lambda z, t, w: z[:, t:]}, ShapeError, "in the rule at step 1"),
    ],
)
def test_an_error_in_a_users_function_says_where(rule, options, error, where):
    """The error itself is kept; a note names the function, the step and the shapes."""
    with pytest.raises(error, match=f"ClosedLoop: {where}"):
        loop_of(PLANT, **options)(rule, 5, generator())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_a_state_of_integers_or_truth_values(dtype):
    start = torch.tensor([1, 0, 0], dtype=dtype)
    loop = ClosedLoop(
        lambda z, u, w: z.roll(1, -1), 3, initial=start, stage_cost=lambda z, u: z.double().sum(-1), bound=1.0
    )
    rollout = loop(lambda z: torch.zeros(len(z), 1), 2)
    assert not rollout.failed.any()
    assert rollout.state.dtype == dtype
    torch.testing.assert_close(rollout.state[0].double(), torch.eye(3).double()[[0, 1, 2, 0]])
    grown = ClosedLoop(
        lambda z, u, w: z + 1, 3, initial=start.long(), stage_cost=lambda z, u: z.double().sum(-1), bound=2.0
    )
    assert grown(lambda z: torch.zeros(len(z), 1), 2).failed_at.tolist() == [1, 1]


@pytest.mark.parametrize("unsound", [lambda z: 1j * torch.zeros(len(z), 2), lambda z: (), lambda z: {"u": z}])
def test_a_decision_that_is_no_real_tensor_is_named(unsound):
    with pytest.raises(ConvexLearnError, match="the rule's decision"):
        loop_of(PLANT)(unsound, 3)
