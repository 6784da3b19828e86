"""Suites that every rule and every simulator inherits: give the fixtures, get the tests."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from convexlearn.rules.base import DecisionRule, as_rule, as_tuple
from convexlearn.rules.parameters import trainable
from convexlearn.simulate.base import Trajectory


def parts(decision):
    """The tensors of a decision."""
    return list(decision) if isinstance(decision, tuple) else [decision]


def assert_same(a, b, tolerance: float = 0.0) -> None:
    """Decisions agree in shape, dtype and value."""
    assert len(parts(a)) == len(parts(b))
    for left, right in zip(parts(a), parts(b)):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left.detach(), right.detach(), rtol=tolerance, atol=tolerance)


class RuleContract:
    """Every rule: subclass it and give two fixtures.

    `rule`: a fresh rule in float64; `context`: x with batch size 3 at least, float64, a tensor or a
    tuple. `tolerance` bounds differences between solves of one sample in different batches.
    """

    tolerance = 1e-12

    @pytest.fixture
    def rule(self) -> DecisionRule:
        raise NotImplementedError

    @pytest.fixture
    def context(self) -> Tensor | tuple[Tensor, ...]:
        raise NotImplementedError

    @staticmethod
    def perturbed(rule):
        """The rule with other trainable values."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in rule.parameters():
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise.to(parameter.dtype))
        return rule

    def test_is_deterministic(self, rule, context):
        before = torch.get_rng_state()
        assert_same(rule(*as_tuple(context)), rule(*as_tuple(context)))
        assert torch.equal(before, torch.get_rng_state())

    def test_samples_are_independent(self, rule, context):
        joined = rule(*as_tuple(context))
        for i in range(len(as_tuple(context)[0])):
            one = rule(*(x[i : i + 1] for x in as_tuple(context)))
            assert_same(one, tuple(s[i : i + 1] for s in parts(joined)), self.tolerance)

    def test_empty_batch(self, rule, context):
        full = rule(*as_tuple(context))
        empty = rule(*(x[:0] for x in as_tuple(context)))
        for s, e in zip(parts(full), parts(empty)):
            assert e.shape == (0, *s.shape[1:])
            assert e.dtype == s.dtype
            if s.requires_grad:
                e.sum().backward(retain_graph=True)  # the parts of a decision have one graph

    def test_dtype_follows_input(self, rule, context):
        for s in parts(rule(*(x.float() for x in as_tuple(context)))):
            assert s.dtype == torch.float32

    def test_decide_agrees_with_forward(self, rule, context):
        forward, contexts = rule(*as_tuple(context)), as_tuple(context)
        if not rule.recursive:
            decided, _ = rule.decide(context, rule.start(context))
            return assert_same(decided, forward, self.tolerance)
        steps = [tuple(x[:, t] for x in contexts) for t in range(contexts[0].shape[1])]
        steps = [step if isinstance(context, tuple) else step[0] for step in steps]
        memory, decisions = rule.start(steps[0]), []
        for step in steps:
            s, memory = rule.decide(step, memory)
            decisions.append(s)
        assert_same(torch.stack(decisions, 1), forward, self.tolerance)

    def test_forward_leaves_the_module_alone(self, rule, context):
        before = {name: value.clone() for name, value in rule.state_dict().items()}
        keys = set(rule.__dict__)
        rule(*as_tuple(context))
        assert set(rule.__dict__) == keys
        for name, value in rule.state_dict().items():
            assert torch.equal(before[name], value)

    def test_gradients_reach_every_trainable_parameter(self, rule, context):
        decision = rule(*as_tuple(context))
        weights = [torch.linspace(0.5, 1.5, s.numel(), dtype=s.dtype).reshape(s.shape) for s in parts(decision)]
        total = sum((w * s).sum() for w, s in zip(weights, parts(decision)))
        if trainable(rule):
            total.backward()
        for name, parameter in trainable(rule).items():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        if trainable(rule):
            assert any(parameter.grad.abs().sum() > 0 for parameter in trainable(rule).values())

    def test_state_dict_round_trip(self, rule, context):
        fresh, file = copy.deepcopy(rule), io.BytesIO()
        self.perturbed(rule)
        torch.save(rule.state_dict(), file)
        file.seek(0)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert_same(fresh(*as_tuple(context)), rule(*as_tuple(context)), self.tolerance)

    def test_state_dict_holds_learned_tensors_only(self, rule):
        learned = {name for name, _ in rule.named_parameters()}
        extra = {k for k in rule.state_dict() if "running" not in k and "tracked" not in k} - learned
        assert not extra

    def test_deepcopy(self, rule, context):
        self.perturbed(rule)
        twin, before = copy.deepcopy(rule), rule(*as_tuple(context))
        assert_same(twin(*as_tuple(context)), before, self.tolerance)
        self.perturbed(twin)
        assert_same(rule(*as_tuple(context)), before, self.tolerance)

    def test_pickle(self, rule, context):
        self.perturbed(rule)
        twin = pickle.loads(pickle.dumps(rule))
        assert_same(twin(*as_tuple(context)), rule(*as_tuple(context)), self.tolerance)
        assert list(trainable(twin)) == list(trainable(rule))

    def test_counts_every_trainable_entry(self, rule):
        assert sum(rule.count_parameters().values()) == sum(p.numel() for p in trainable(rule).values())
        rule.freeze()
        assert sum(rule.count_parameters().values()) == 0


class SimulatorContract:
    """Every simulator: subclass it and give two fixtures.

    `simulator`, and `rule`: one whose decisions the simulator accepts, in float64, with a trainable
    parameter. `random` says whether two generators give different trajectories.
    """

    random = True

    @pytest.fixture
    def simulator(self):
        raise NotImplementedError

    @pytest.fixture
    def rule(self):
        raise NotImplementedError

    @staticmethod
    def run(simulator, rule, seed=0, batch_size=3) -> Trajectory:
        return simulator(rule, batch_size, torch.Generator().manual_seed(seed))

    def test_batch_comes_first(self, simulator, rule):
        trajectory = self.run(simulator, rule)
        assert len(trajectory) == 3
        for part in parts(trajectory.decision):
            assert len(part) == 3
        assert trajectory.failed.dtype == torch.bool
        assert not trajectory.failed.any()

    def test_is_reproducible_from_the_generator(self, simulator, rule):
        before = torch.get_rng_state()
        a, b = self.run(simulator, rule), self.run(simulator, rule)
        assert_same(a.context, b.context)
        assert_same(a.decision, b.decision)
        assert torch.equal(before, torch.get_rng_state())

    def test_another_seed_gives_another_trajectory(self, simulator, rule):
        if self.random:
            a, b = self.run(simulator, rule), self.run(simulator, rule, seed=1)
            assert any(not torch.equal(x, y) for x, y in zip(as_tuple(a.context), as_tuple(b.context)))

    def test_gradients_pass(self, simulator, rule):
        trajectory = self.run(simulator, rule)
        outcome = trajectory.decision if trajectory.cost is None else trajectory.cost
        sum(part.square().sum() for part in parts(outcome)).backward()
        gradients = [p.grad for p in trainable(as_rule(rule)).values()]
        assert any(g is not None and g.abs().sum() > 0 for g in gradients)

    def test_failed_sample_is_marked(self, simulator, rule):
        def failing(*x):
            s = as_rule(rule)(*x)
            lost = (torch.arange(len(s)) == 1).reshape(-1, *[1] * (s.ndim - 1))
            return torch.where(lost, torch.nan, s)

        assert self.run(simulator, failing).failed.tolist() == [False, True, False]
