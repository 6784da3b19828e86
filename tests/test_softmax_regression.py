"""Softmax regression against scikit-learn, its optimality conditions and closed forms."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from convexlearn.errors import OptionError, ShapeError, SolverError
from convexlearn.softmax_regression import softmax_regression

DOUBLE = torch.float64


def draw(sets=3, count=200, features=2, classes=4):
    """Gaussian clusters that overlap: x `(C, N, d)`, labels `(C, N)`."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (sets, count), generator=generator)
    means = torch.randn(sets, classes, features, generator=generator, dtype=DOUBLE)
    noise = torch.randn(sets, count, features, generator=generator, dtype=DOUBLE)
    return means.gather(1, labels[..., None].expand(-1, -1, features)) + 0.7 * noise, labels


def test_probabilities_equal_those_of_scikit_learn():
    x, labels = draw()
    weights, biases = softmax_regression(x, labels, 4)
    assert weights.shape == (3, 2, 4)
    assert biases.shape == (3, 1, 4)
    for c in range(3):
        other = LogisticRegression(C=1e9, tol=1e-10, max_iter=10_000).fit(x[c].numpy(), labels[c].numpy())
        expected = torch.tensor(other.predict_proba(x[c].numpy()))
        torch.testing.assert_close((x[c] @ weights[c] + biases[c]).softmax(-1), expected, rtol=0, atol=2e-4)


def test_the_gradient_vanishes_at_the_minimum():
    x, labels = draw()
    found = [part.requires_grad_() for part in softmax_regression(x, labels, 4, penalty=0.01)]
    scores = x @ found[0] + found[1]
    entropy = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none")
    total = 0.005 * sum(part.square().sum() for part in found) + entropy.view(labels.shape).mean(1).sum()
    for slope in torch.autograd.grad(total, found):
        assert slope.abs().max() < 1e-8


def test_each_data_set_is_fitted_by_itself():
    x, labels = draw()
    weights, biases = softmax_regression(x, labels, 4)
    for c in range(3):
        alone = softmax_regression(x[c : c + 1], labels[c : c + 1], 4)
        torch.testing.assert_close((weights[c], biases[c]), (alone[0][0], alone[1][0]), rtol=1e-6, atol=1e-6)


def test_without_features_the_biases_are_log_frequencies():
    labels = torch.tensor([[0, 0, 0, 1, 1, 2]])
    _, biases = softmax_regression(torch.zeros(1, 6, 0, dtype=DOUBLE), labels, 3)
    expected = torch.tensor([1 / 2, 1 / 3, 1 / 6], dtype=DOUBLE)
    torch.testing.assert_close(biases[0, 0].softmax(-1), expected, rtol=0, atol=1e-5)


def test_separable_classes_end_at_finite_weights():
    x = torch.tensor([[[-1.0], [-0.5], [0.5], [1.0]]])
    labels = torch.tensor([[0, 0, 1, 1]])
    weights, biases = softmax_regression(x, labels, 2)
    assert weights.dtype == torch.float32
    assert weights.isfinite().all()
    assert torch.equal((x @ weights + biases).argmax(-1), labels)


def test_an_absent_class_becomes_improbable():
    x, labels = draw()
    weights, biases = softmax_regression(x, labels, 5)
    assert (x @ weights + biases).softmax(-1)[..., 4].max() < 1e-3


def test_wrong_arguments_are_refused():
    x, labels = draw()
    with pytest.raises(ShapeError, match=r"got \(3, 200, 2\) and \(200,\)"):
        softmax_regression(x, labels[0], 4)
    with pytest.raises(OptionError, match=r"labels must be integers in 0, ..., 2, got \[0, 1, 2, 3\]"):
        softmax_regression(x, labels, 3)
    with pytest.raises(OptionError, match="penalty must be a number above 0"):
        softmax_regression(x, labels, 4, penalty=0.0)
    with pytest.raises(OptionError, match="labels must be integers"):
        softmax_regression(x, labels / 2, 4)
    x[1, 0, 0] = torch.nan
    with pytest.raises(SolverError, match="data sets 1; raise penalty"):
        softmax_regression(x, labels, 4)
