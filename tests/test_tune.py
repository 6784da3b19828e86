import contextlib
import json
import math
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import nn

from convexlearn.domains import Domain
from convexlearn.errors import FailureWarning, NonFiniteError, OptionError, SolverError, ZeroGradientWarning
from convexlearn.networks import mlp
from convexlearn.objectives import accuracy, cost, cross_entropy, mean_squared_error, psnr, squared_error
from convexlearn.rules.affine import AffineRule
from convexlearn.rules.base import DecisionRule, Role
from convexlearn.rules.convex import ConvexRule
from convexlearn.simulate.base import Trajectory
from convexlearn.simulate.pairs import Pairs
from convexlearn.tune import History, NonFiniteWarning, tune


def draw(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = draw(24, 3)
W_TRUE = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 1.0]], dtype=torch.float64)
S = X @ W_TRUE.mT + 0.1 * draw(24, 2, seed=1)
PAIRS = Pairs(X, S)
VALID = Pairs(draw(10, 3, seed=2), draw(10, 3, seed=2) @ W_TRUE.mT)


def affine():
    return AffineRule(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))


class Scale(DecisionRule):
    """s = a x with a >= 0."""

    def __init__(self, a=0.5):
        super().__init__()
        self.declare("a", a, Domain.from_attributes((), {"nonneg": True}), Role.HYPER)

    def forward(self, *x):
        return self.a * x[0]


def sgd(groups):
    return torch.optim.SGD(groups)


def noisy(rule, batch_size, generator):
    x = torch.randn(batch_size, 3, generator=generator, dtype=torch.float64)
    s = rule(x)
    return Trajectory(x, s, cost=(s - 1).square())


def run(rule=None, **options):
    rule = affine() if rule is None else rule
    defaults = {"steps": 5, "learning_rate": 0.1, "progress": False}
    return rule, tune(rule, PAIRS, squared_error, **{**defaults, **options})


def test_equals_gradient_descent_by_hand():
    rule, history = run(optimizer=sgd, learning_rate=0.05, clip=None, steps=4)
    W, b, losses = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), []
    for _ in range(4):
        error = X @ W.mT + b - S
        losses.append(error.square().sum(1).mean().item())
        W, b = W - 0.05 * 2 * error.mT @ X / 24, b - 0.05 * 2 * error.mean(0)
    torch.testing.assert_close(rule.W.detach(), W, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rule.b.detach(), b, rtol=1e-12, atol=1e-12)
    assert history.column("loss") == pytest.approx(losses, rel=1e-12)
    assert history.best["step"] == 4


def test_reaches_the_closed_form():
    def lbfgs(groups):
        return torch.optim.LBFGS(groups, tolerance_grad=1e-13, tolerance_change=0)

    rule, _ = run(steps=20, optimizer=lbfgs, learning_rate=1.0, clip=None)
    best = AffineRule.fit(X, S)
    torch.testing.assert_close(rule.W.detach(), best.W.detach(), rtol=0, atol=1e-8)


def test_clipping_bounds_the_step():
    rule, history = run(optimizer=sgd, learning_rate=1.0, clip=1e-3, steps=1)
    change = torch.cat([p.detach().flatten() for p in rule.parameters()]).norm().item()
    assert change == pytest.approx(1e-3, rel=1e-9)
    assert history[0]["gradient_norm"] > 1


def test_learning_rates_by_name_and_schedule():
    rule, _ = run(learning_rate={"W": 0.0, "b": lambda step: 0.5 if step == 0 else 0.0}, optimizer=sgd, clip=None)
    assert not rule.W.any()
    expected = 0.5 * 2 * S.mean(0)
    torch.testing.assert_close(rule.b.detach(), expected, rtol=1e-12, atol=0)


def test_learning_rates_reach_submodules_and_default():
    network = nn.Sequential(mlp(3, 4, hidden=()), mlp(4, 2, hidden=())).double()
    before = [p.detach().clone() for p in network.parameters()]
    tune(network, PAIRS, squared_error, steps=1, learning_rate={"0": 0.0}, progress=False, clip=None)
    changes = [(p.detach() - q).abs().max().item() for p, q in zip(network.parameters(), before)]
    assert changes[:2] == [0, 0]
    assert changes[2] == pytest.approx(1e-2, rel=1e-3)  # Adam's first step


def test_regularizer_is_added():
    _, history = run(regularizer=lambda r: 3 + 0 * r.W.sum(), steps=1)
    plain = run(steps=1)[1]
    assert history[0]["loss"] == pytest.approx(plain[0]["loss"] + 3)


def test_only_learned_parameters_change():
    rule = affine().freeze("W")
    run(rule)
    assert not rule.W.any()
    assert rule.b.detach().all()


def test_minibatches_run_through_epochs_without_replacement():
    seen = []

    def rule_spy(x):
        seen.append(x)

    network = nn.Linear(3, 2).double()
    network.register_forward_pre_hook(lambda module, x: rule_spy(x[0]))
    tune(network, PAIRS, squared_error, steps=6, batch_size=8, progress=False)
    for epoch in (seen[:3], seen[3:]):
        rows = torch.cat(epoch)
        assert torch.equal(rows[rows[:, 0].argsort()], X[X[:, 0].argsort()])
    assert not torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))


@pytest.mark.parametrize("batch_size", [None, 8])
def test_same_seed_same_history(batch_size):
    network = mlp(3, 2, hidden=(4,)).double()
    start = {k: v.clone() for k, v in network.state_dict().items()}
    model, outcomes = nn.Sequential(network, nn.Dropout(0.5)), []
    for disturbance, seed in ((0, 0), (7, 0), (0, 1)):
        network.load_state_dict(start)
        torch.manual_seed(disturbance)
        state = torch.get_rng_state()
        history = tune(model, PAIRS, squared_error, steps=4, batch_size=batch_size, seed=seed, progress=False)
        assert torch.equal(state, torch.get_rng_state())
        outcomes.append((list(history), [p.clone() for p in network.parameters()]))
    assert outcomes[0][0] == outcomes[1][0] != outcomes[2][0]
    assert all(torch.equal(a, b) for a, b in zip(outcomes[0][1], outcomes[1][1]))


def test_simulators_without_length():
    rule = affine()
    history = tune(rule, noisy, cost, steps=60, learning_rate=0.1, progress=False, validation=noisy)
    assert history[-1]["validation"] < 0.05 < history.start
    assert "validation" in history[-1]


def test_unsupervised_tuning():
    rule = Scale(0.5)
    tune(rule, Pairs(X), lambda t: (t.decision.square().sum(1) - 4).square(), steps=200, progress=False, clip=None)
    r = X.square().sum(1)  # minimize the mean of (a^2 r - 4)^2: a^2 = 4 mean(r) / mean(r^2)
    assert rule.a.item() == pytest.approx(math.sqrt(4 * r.mean() / r.square().mean()), rel=1e-3)


def test_best_weights_by_validation_are_restored():
    # the validation optimum a = 1 is passed on the way to the training optimum a = 3
    train, valid = Pairs(X, 3 * X), Pairs(X, X)
    rule = Scale(0.1)
    history = tune(rule, train, squared_error, steps=80, learning_rate=0.1, validation=valid, progress=False)
    values = [history.start, *history.column("validation")]
    assert history.best == {"step": values.index(min(values)), "value": min(values), "measure": "validation"}
    assert 0 < history.best["step"] < 60
    assert rule.a.item() == pytest.approx(1, abs=0.05)


def test_worse_than_the_start_restores_the_start():
    rule = Scale(1.0)
    history = tune(rule, Pairs(X, 3 * X), squared_error, steps=5, validation=Pairs(X, X), progress=False)
    assert rule.a.item() == pytest.approx(1, rel=1e-12)
    assert history.best["step"] == 0


def test_patience_stops_early():
    rule = Scale(0.1)
    options = {"steps": 500, "learning_rate": 0.1, "validation": Pairs(X, X), "patience": 4, "progress": False}
    history = tune(rule, Pairs(X, 3 * X), squared_error, **options)
    assert len(history) == history.best["step"] + 4 < 100
    assert "no improvement in 4 validations" in history.stopped


def test_validation_objective_may_differ_and_be_maximized():
    valid = (Pairs(X, X), psnr(1.0))
    history = tune(
        Scale(0.2), Pairs(X, 3 * X), squared_error, steps=60, learning_rate=0.1, validation=valid, progress=False
    )
    assert history.best["value"] == max(history.column("validation"))


def test_a_utility_is_maximized():
    rule = Scale(0.5)
    tune(rule, Pairs(X, X), psnr(1.0), steps=20, progress=False)
    assert rule.a.item() > 0.55


def test_classification():
    labels = (X[:, 0] > 0).long()
    rule = AffineRule(torch.zeros(2, 3, dtype=torch.float64))
    validation = (Pairs(X, labels), accuracy)
    history = tune(
        rule, Pairs(X, labels), cross_entropy, steps=40, learning_rate=0.1, validation=validation, progress=False
    )
    assert history[0]["loss"] == pytest.approx(math.log(2))
    assert history.best["value"] > 0.9


def failing_rule(rows):
    class Failing(Scale):
        def forward(self, *x):
            lost = torch.isin(x[0][:, 0], X[rows, 0])[:, None]
            return torch.where(lost, torch.nan, super().forward(*x))

    return Failing(0.5)


def test_failed_samples_are_left_out_counted_and_named():
    rule, kept = failing_rule([3, 7]), [i for i in range(24) if i not in (3, 7)]
    with pytest.warns(FailureWarning, match="step 0: 2 of 24 samples failed: 3, 7"):
        history = tune(rule, Pairs(X, 2 * X), squared_error, steps=5, progress=False)
    clean = Scale(0.5)
    expected = tune(clean, Pairs(X[kept], 2 * X[kept]), squared_error, steps=5, progress=False)
    assert history.column("failures") == [2] * 5
    assert history.column("loss") == pytest.approx(expected.column("loss"), rel=1e-12)
    assert rule.a.item() == pytest.approx(clean.a.item(), rel=1e-12)


def test_failures_in_a_batch_bear_the_numbers_of_the_data_set():
    with pytest.warns(FailureWarning, match=r"1 of 4 samples failed: 20"):
        tune(failing_rule([20]), Pairs(X, X), squared_error, steps=6, batch_size=4, progress=False)


def test_over_half_failed_is_an_error():
    with pytest.raises(SolverError, match="13 of 24"):
        tune(failing_rule(range(13)), Pairs(X, X), squared_error, steps=5, progress=False)


class Exploding(Scale):
    """Finite at the start; NaN once a has passed 0.6, in `what`."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, *x):
        a = self.a
        if a.item() > 0.6 and self.what == "decision":
            a = a * torch.nan
        if a.item() > 0.6 and self.what == "gradient":
            a = a + 0 * (a - a.detach()).abs().sqrt()
        return a * x[0]

    def objective(self, trajectory):
        values = (trajectory.decision - 3 * trajectory.context).square().sum(1)
        return values * torch.nan if self.what == "loss" and self.a.item() > 0.6 else values


EXPLOSIONS = {
    "decision": "all decisions became NaN or infinite while tuning a",
    "loss": "loss became nan while tuning a",
    "gradient": "gradient of parameter 'a'",
}


@pytest.mark.parametrize("what", EXPLOSIONS)
@pytest.mark.parametrize("batch_size", [None, 8])
def test_stops_on_non_finite_values(what, batch_size):
    rule = Exploding(what)
    options = {"steps": 50, "learning_rate": 0.05, "batch_size": batch_size, "progress": False}
    with pytest.warns(NonFiniteWarning, match=rf"step \d+: .*{EXPLOSIONS[what]}.*restored"):
        history = tune(rule, Pairs(X), rule.objective, **options)
    assert EXPLOSIONS[what] in history.stopped
    assert 0.5 < rule.a.item() <= 0.6
    assert all(math.isfinite(loss) for loss in history.column("loss"))


def test_non_finite_validation_stops_too():
    rule = Exploding("decision")
    with pytest.warns(NonFiniteWarning, match="on the validation set became NaN"):
        history = tune(
            rule, Pairs(X), rule.objective, steps=50, validation=(Pairs(X, X), squared_error), progress=False
        )
    assert rule.a.item() <= 0.6
    assert history.best["step"] == len(history) - 1


def test_non_finite_at_the_first_step_is_an_error():
    rule = Scale(0.5)
    with pytest.raises(NonFiniteError, match="step 0: the loss became nan while tuning a"):
        tune(rule, Pairs(X), lambda t: t.decision.sum(1) * torch.nan, steps=5, progress=False)
    assert rule.a.item() == pytest.approx(0.5, rel=1e-12)


def test_a_parameter_that_overflows_is_named():
    rule = affine()
    with pytest.raises(NonFiniteError, match="parameter 'W' became NaN or infinite"):
        tune(rule, PAIRS, squared_error, steps=5, learning_rate=1e308, clip=1e300, optimizer=sgd, progress=False)
    assert not rule.W.any()


def test_interrupt_keeps_the_best_weights():
    def callback(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    rule, history = run(steps=10, callback=callback)
    reference, _ = run(steps=3)
    assert history.stopped == "interrupted after step 4"
    assert len(history) == 4
    assert torch.equal(rule.W, reference.W)  # the last loss known is that after three steps


@pytest.mark.parametrize("options", [{}, {"validation": VALID, "batch_size": 7}])
@pytest.mark.parametrize("optimizer", [None, torch.optim.LBFGS])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_interrupt_in_the_middle_of_a_step_loses_no_complete_step(error, optimizer, options, tmp_path):
    """The checkpoint holds the last complete step, and a resumed run equals one without interruption."""
    calls = []

    def objective(trajectory):
        if trajectory.decision.requires_grad:
            calls.append(None)
            if len(calls) == stop_at:
                raise error
        return squared_error(trajectory)

    def call(rule, checkpoint=None):
        calls.clear()
        common = {"steps": 8, "learning_rate": 0.1, "optimizer": optimizer, "progress": False}
        return tune(rule, PAIRS, objective, **common, checkpoint=checkpoint, **options)

    stop_at, whole, path = 0, affine(), tmp_path / "run.pt"
    expected, asked = call(whole), len(calls)
    stop_at = round(0.7 * asked)
    broken, resumed = affine(), affine()
    with contextlib.suppress(ZeroDivisionError):
        call(broken, path)
    if optimizer is None:  # LBFGS was stopped in the middle of its search: an earlier checkpoint is left
        assert torch.load(path, weights_only=True)["step"] == stop_at - 1
    stop_at = 0
    assert list(call(resumed, path)) == list(expected)
    assert torch.equal(resumed.W, whole.W)


def test_callback_sees_records_and_stops():
    records = []

    def callback(record):
        records.append(record)
        return len(records) == 3

    _, history = run(steps=10, callback=callback)
    assert len(history) == 3
    assert records == list(history)
    assert "callback" in history.stopped


def test_training_mode_is_restored():
    network = nn.Sequential(nn.Linear(3, 2), nn.Dropout()).double()
    network[1].eval()
    tune(network, PAIRS, squared_error, steps=2, validation=VALID, progress=False)
    assert [part.training for part in network.modules()] == [True, True, False]


class Stop(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"batch_size": 8}, {"validation": VALID, "batch_size": 7, "patience": 30}])
@pytest.mark.parametrize("optimizer", [None, lambda g: torch.optim.SGD(g, momentum=0.9)])
def test_resumed_run_is_identical(options, optimizer, tmp_path):
    def stop(record):
        if record["step"] == 6:
            raise Stop

    def network():
        return nn.Sequential(mlp(3, 2, hidden=(4,)), nn.Dropout(0.2)).double()

    common = {"steps": 12, "optimizer": optimizer, "progress": False, **options}
    whole, broken, resumed = network(), network(), network()
    expected = tune(whole, PAIRS, mean_squared_error, **common)
    path = tmp_path / "deep" / "run.pt"
    with pytest.raises(Stop):
        tune(broken, PAIRS, mean_squared_error, **common, callback=stop, checkpoint=path)
    history = tune(resumed, PAIRS, mean_squared_error, **common, checkpoint=path)
    again = tune(network(), PAIRS, mean_squared_error, **common, checkpoint=path)
    assert list(history) == list(expected) == list(again)
    assert history.to_dict() == expected.to_dict() == again.to_dict()
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    assert torch.load(path, weights_only=True)["step"] == 12
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]


def test_a_finished_run_continues_with_more_steps(tmp_path):
    expected_rule, expected = run(steps=9, validation=VALID, batch_size=5)
    run(steps=4, validation=VALID, batch_size=5, checkpoint=tmp_path / "run.pt")
    rule, history = run(steps=9, validation=VALID, batch_size=5, checkpoint=tmp_path / "run.pt")
    assert list(history) == list(expected)
    assert torch.equal(rule.W, expected_rule.W)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(checkpoint=path)
    with pytest.raises(OptionError, match=r"another run: clip was 1.0, is 2.0; seed was 0, is 1; choose another"):
        run(checkpoint=path, seed=1, clip=2.0)
    with pytest.raises(OptionError, match="simulator was Pairs"):
        tune(affine(), VALID, squared_error, steps=5, learning_rate=0.1, checkpoint=path, progress=False)
    path.write_bytes(b"nonsense")
    with pytest.raises(OptionError, match="no checkpoint of tune"):
        run(checkpoint=path)


def test_progress_is_quiet_off_a_terminal(capsys):
    run(progress=True)
    run(progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps must be an integer of at least 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"clip": 0}, "clip must be a number above 0 or None"),
        ({"learning_rate": {"w": 0.1}}, "names 'w', which is not trained"),
        ({"learning_rate": {"W": -0.1}}, "learning_rate of 'W' must be >= 0"),
        ({"batch_size": 3, "patience": 2}, "patience needs a validation simulator"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        run(**options)


def test_nothing_to_train():
    with pytest.raises(OptionError, match="no trainable parameter"):
        run(affine().freeze())
    with pytest.raises(OptionError, match="does not depend on the trainable parameters"):
        tune(affine(), PAIRS, lambda t: t.decision.detach().sum(1), steps=1, progress=False)


def test_history_plots_and_serialises():
    pytest.importorskip("matplotlib")
    _, history = run(steps=6, validation=VALID)
    assert isinstance(history, list)
    assert History.from_dict(json.loads(history.to_json())).to_dict() == history.to_dict()
    ax = history.plot()
    assert [line.get_label() for line in ax.get_lines()] == ["loss", "validation", "best"]
    assert list(ax.get_lines()[0].get_ydata()) == history.column("loss")
    assert history.plot(ax) is ax


def test_numpy_learning_rates_can_be_resumed(tmp_path):
    path, rates = tmp_path / "run.pt", np.geomspace(0.1, 0.01, 9)
    expected_rule, _ = run(steps=9, learning_rate=lambda k: rates[k])
    run(steps=4, learning_rate=lambda k: rates[k], checkpoint=path)
    rule, _ = run(steps=9, learning_rate=lambda k: rates[k], checkpoint=path)
    assert torch.equal(rule.W, expected_rule.W)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"simulator": torch.zeros(4, 2)}, r"tune: Tensor is no simulator; give one, as Pairs\(x, s\)"),
        ({"simulator": (1, 2)}, "tune: tuple is no simulator"),
        ({"objective": "mse"}, "tune: the objective must be a function of a Trajectory"),
        ({"objective": nn.MSELoss()}, "tune: the objective must be a function of a Trajectory"),
        ({"objective": lambda x, y: x}, "tune: the objective must be a function of a Trajectory"),
        ({"optimizer": "adam"}, "optimizer must be a class, such as torch.optim.SGD, got 'adam'"),
        ({"validation": (torch.zeros(4, 2), torch.zeros(4, 2))}, "tune, validation: Tensor is no simulator"),
    ],
)
def test_what_is_no_simulator_objective_or_optimizer(change, message):
    pairs = Pairs(torch.ones(4, 2), torch.ones(4, 2))
    arguments = {"rule": AffineRule(torch.eye(2)).learn("W"), "simulator": pairs, "objective": squared_error} | change
    rule, simulator, objective = (arguments.pop(name) for name in ("rule", "simulator", "objective"))
    with pytest.raises(OptionError, match=message):
        tune(rule, simulator, objective, steps=1, **arguments)


class Gated(DecisionRule):
    """s = clip(gate weight x + 0 idle, -limit, limit)."""

    def __init__(self, gate, limit=9.0):
        super().__init__()
        for name, value in {"weight": 1.0, "gate": gate, "idle": 1.0, "limit": limit}.items():
            self.declare(name, torch.tensor(value, dtype=torch.float64))
        self.freeze("limit")

    def forward(self, *x):
        return (self.gate * self.weight * x[0] + torch.relu(-9 - self.idle)).clamp(-self.limit, self.limit)


def zero_gradients(rule, steps):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ZeroGradientWarning)
        tune(rule, Pairs(1 + X.abs(), 0.5 * X), squared_error, steps=steps, learning_rate=1e-3, progress=False)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("gate", [0.0, 1.0])  # behind a gate that opens in the first step, the weight has a gradient
def test_parameters_without_influence_are_named_once(gate):
    (message,) = zero_gradients(Gated(gate), 5)
    assert "step 1: the gradient of idle is exactly zero" in message
    assert zero_gradients(Gated(gate).freeze("idle"), 5) == []


def test_a_saturated_rule_is_told_at_once():
    (message,) = zero_gradients(Gated(1.0, limit=0.5), 1)
    assert "step 0: the gradient of weight, gate, idle is exactly zero" in message
    assert "does not depend on them" in message
    assert zero_gradients(Gated(1.0, limit=0.5), 5) == [message]


def test_a_constraint_that_binds_nowhere_has_no_gradient():
    x, y, cap = cp.Variable(3), cp.Parameter(3, name="y"), cp.Parameter(name="cap", value=50.0)
    weight = cp.Parameter(name="weight", nonneg=True, value=0.5)
    cost = cp.sum_squares(x - y) + weight * cp.sum_squares(x)
    rule = ConvexRule(cp.Problem(cp.Minimize(cost), [x <= cap]), [y], x)
    (message,) = zero_gradients(rule, 3)
    assert "gradient of cap is exactly zero" in message
    assert zero_gradients(rule.freeze("cap"), 3) == []


@pytest.mark.parametrize("batch_size", [None, 6])
def test_targets_that_are_no_numbers_are_named(batch_size):
    target = S.clone()
    target[17, 1] = torch.inf
    rule, options = affine(), {"steps": 4, "batch_size": batch_size, "progress": False}
    told = "the loss became inf while tuning W, b: objective 'squared_error' is no number for samples 17, whose target"
    with contextlib.ExitStack() as stack:
        expected = pytest.raises(NonFiniteError, match=told) if batch_size is None else contextlib.nullcontext()
        stack.enter_context(expected)
        if batch_size is not None:
            stack.enter_context(pytest.warns(NonFiniteWarning, match=told))
        tune(rule, Pairs(X, target), squared_error, **options)


def test_a_history_is_shown_in_one_line():
    _, history = run(steps=20, validation=VALID)
    best = f"best validation {history.best['value']:.4g} after {history.best['step']} steps"
    ends = f"loss {history[0]['loss']:.4g} first, {history[-1]['loss']:.4g} last"
    seconds = f"{history.seconds:.3g}"
    text = f"History(20 steps in {seconds} s, {ends}, validation {history.start:.4g} at the start, {best})"
    assert repr(history) == str(history) == text
    assert 0 < history.seconds < 60
    _, history = run(callback=lambda record: record["step"] == 1)
    assert repr(history).endswith(", stopped: stopped by the callback after step 2)")
    assert repr(History()) == "History(0 steps)"
