import math

import pytest
import torch

from convexlearn import objectives
from convexlearn.errors import MissingParameterError, OptionError, ShapeError
from convexlearn.simulate.base import Trajectory

S = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
TARGET = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]], dtype=torch.float64)
T = Trajectory(S, S, target=TARGET)
SCORES = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (objectives.squared_error, [30.0, 4.0]),
        (objectives.mean_squared_error, [7.5, 1.0]),
        (objectives.absolute_error, [10.0, 2.0]),
        (objectives.psnr(10.0), [10 * math.log10(100 / 7.5), 20.0]),
    ],
)
def test_errors_by_hand(objective, expected):
    values = objective(T)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert objectives.maximizes(objective) == (objectives.objective_name(objective) == "psnr")
    empty = T.select(torch.tensor([], dtype=torch.long))
    assert objective(empty).shape == (0,)


def test_classification_by_hand():
    t = Trajectory(SCORES, SCORES, target=torch.tensor([0, 0]))
    expected = torch.tensor([math.log1p(math.exp(-2)), math.log1p(math.exp(1))], dtype=torch.float64)
    torch.testing.assert_close(objectives.cross_entropy(t), expected, rtol=1e-12, atol=0)
    assert objectives.error_rate(t).tolist() == [0, 1]
    assert objectives.accuracy(t).tolist() == [1, 0]
    assert objectives.maximizes(objectives.accuracy)


def test_classification_of_sequences_and_labels():
    scores, labels = SCORES.expand(3, 2, 2), torch.tensor([[0, 1], [1, 1], [1, 0]])
    t = Trajectory(scores, scores, target=labels)
    assert objectives.error_rate(t).tolist() == [0, 0.5, 1]
    rows = [objectives.cross_entropy(Trajectory(SCORES, SCORES, target=row)).mean() for row in labels]
    torch.testing.assert_close(objectives.cross_entropy(t), torch.stack(rows), rtol=1e-12, atol=0)
    assert objectives.error_rate(Trajectory(labels, labels, target=labels.flip(0))).tolist() == [1, 0, 1]


def test_cost_is_averaged_over_time():
    t = Trajectory(S, S, cost=torch.tensor([[1.0, 3.0], [2.0, 2.5]]))
    assert objectives.cost(t).tolist() == [2.0, 2.25]
    assert objectives.cost(Trajectory(S, S, cost=torch.tensor([1.0, 2.0]))).tolist() == [1.0, 2.0]
    assert objectives.cost(Trajectory(S[:0], S[:0], cost=torch.zeros(0, 3))).shape == (0,)


def test_known_squared_error_ignores_what_is_not_known():
    target = torch.tensor([[1.0, torch.nan, 3.0], [torch.nan] * 3])
    s = torch.zeros(2, 3, requires_grad=True)
    values = objectives.known_squared_error(Trajectory(s, s, target=target))
    assert values.tolist() == [5.0, 0.0]
    values.sum().backward()
    assert s.grad.tolist() == [[-1.0, 0.0, -3.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", ["squared_error", "mean_squared_error", "absolute_error", "cross_entropy", "accuracy"])
def test_a_missing_target_is_named(name):
    with pytest.raises(MissingParameterError, match=r"compares decisions with targets.*Pairs\(x, s\)"):
        getattr(objectives, name)(Trajectory(S, S))


def test_bad_input():
    with pytest.raises(MissingParameterError, match=r"needs trajectory\.cost"):
        objectives.cost(T)
    with pytest.raises(ShapeError, match=r"decisions have shape \(2, 2, 2\), targets \(2, 2, 1\)"):
        objectives.squared_error(Trajectory(S, S, target=TARGET[..., :1]))
    with pytest.raises(ShapeError, match="integer labels"):
        objectives.cross_entropy(T)
    with pytest.raises(OptionError, match=r"as in psnr\(1\.0\)"):
        objectives.psnr(T)
    with pytest.raises(ShapeError, match=r"objective '<lambda>' must return one number per sample, shape \(2,\)"):
        objectives.judge(lambda t: t.decision.sum(), T)


def test_a_lost_decision_is_no_unknown_target():
    s = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    target = torch.tensor([[0.0, 5.0], [0.0, float("nan")]])
    losses = objectives.known_squared_error(Trajectory(s, s, target=target))
    assert losses[0].isnan()
    assert losses[1] == 1.0


def test_scores_that_are_nan_have_no_error_rate():
    scores = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    rate = objectives.error_rate(Trajectory(scores, scores, target=torch.tensor([1, 1])))
    assert rate[0] == 0.0
    assert rate[1].isnan()


def test_complex_and_integer_decisions_are_numbers():
    z = torch.tensor([[3 + 4j, 0]])
    assert objectives.squared_error(Trajectory(z, z, target=torch.zeros_like(z))) == 25.0
    k = torch.tensor([[True, False]])
    assert objectives.mean_squared_error(Trajectory(k, k, target=~k)) == 1.0
