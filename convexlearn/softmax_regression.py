"""Softmax regression: the linear classifier of maximum likelihood, for many data sets side by side."""

import torch
from torch import Tensor

from convexlearn.checks import checked, count, number
from convexlearn.errors import OptionError, ShapeError, SolverError, listed
from convexlearn.inputs import as_floating, as_tensor
from convexlearn.newton import minimize


@checked(classes=count(), penalty=number(above=0))
def softmax_regression(x: Tensor, labels: Tensor, classes: int, *, penalty: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Weights `(C, d, K)` and biases `(C, 1, K)` of scores x @ weights + biases, in the dtype of x.

    For C data sets x `(C, N, d)` with labels `(C, N)` in 0, ..., classes - 1 = K - 1 they minimize the mean
    cross-entropy + penalty / 2 (|weights|^2 + |biases|^2). The penalty makes the minimizer unique (shifts common to all
    scores change no probability) and finite where classes can be separated. Convex; Newton's method in float64 with the
    Hessian (diag(p) - p p^T) x x^T averaged over the data (Böhning, Multinomial logistic regression algorithm, 1992).
    A data set without a minimizer is a SolverError.

    >>> x, labels = torch.tensor([[[-2.0], [-1.0], [1.0], [2.0]]]), torch.tensor([[0, 1, 0, 1]])
    >>> weights, biases = softmax_regression(x, labels, 2)
    >>> (x @ weights + biases).softmax(-1)[0, :, 1]
    tensor([0.3017, 0.3966, 0.6034, 0.6983])
    """
    x, labels = _checked(x, labels, classes)
    features = torch.cat([x, x.new_ones(*labels.shape, 1)], -1).double()
    sent = torch.nn.functional.one_hot(labels.long(), classes).double()

    def loss(z: Tensor, features: Tensor, sent: Tensor) -> Tensor:
        scores = features @ z.unflatten(1, (-1, classes))
        entropy = torch.logsumexp(scores, -1) - (scores * sent).sum(-1)
        return entropy.mean(1) + penalty / 2 * z.square().sum(1)

    def derivatives(z: Tensor, features: Tensor, sent: Tensor) -> tuple[Tensor, Tensor]:
        said = torch.softmax(features @ z.unflatten(1, (-1, classes)), -1)
        first = (features.mT @ (said - sent) / features.shape[1]).flatten(1) + penalty * z
        weighted = (features[..., None] * said[..., None, :]).flatten(2)  # (C, N, (d + 1) K)
        own = torch.diag_embed((features.mT @ weighted).unflatten(2, (-1, classes))).transpose(2, 3)
        second = (own.flatten(3).flatten(1, 2) - weighted.mT @ weighted) / features.shape[1]
        return first, second + penalty * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)

    start = features.new_zeros(len(x), features.shape[2] * classes)
    found = minimize(loss, start, (features, sent), closed_form=derivatives)
    if not bool(found.converged.all()):
        failed = listed((~found.converged).nonzero().flatten().tolist())
        raise SolverError(f"softmax_regression: no minimum found for data sets {failed}; raise penalty, or scale x")
    fitted = found.point.unflatten(1, (-1, classes)).to(x.dtype)
    return fitted[:, :-1], fitted[:, -1:]


def _checked(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    kind = "softmax_regression: input"
    x, labels = as_floating("x", x, kind), as_tensor("labels", labels, kind)
    if x.ndim != 3 or labels.shape != x.shape[:2] or x.shape[1] == 0:
        shapes = f"{tuple(x.shape)} and {tuple(labels.shape)}"
        raise ShapeError(f"softmax_regression: x must be (C, N, d) and labels (C, N), N at least 1, got {shapes}")
    if labels.is_floating_point() or (labels.numel() and not 0 <= labels.min() <= labels.max() < classes):
        raise OptionError(
            f"softmax_regression: labels must be integers in 0, ..., {classes - 1}, got {labels.unique().tolist()}"
        )
    return x, labels
