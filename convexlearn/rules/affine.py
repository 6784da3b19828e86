"""T1: the affine rule s = Wx + b."""

from typing import Any

import torch
from torch import Tensor

from convexlearn.checks import FLAG, SIZES, checked, number
from convexlearn.errors import DomainError, ShapeError
from convexlearn.inputs import as_floating, flattened
from convexlearn.rules.base import Context, DecisionRule, as_tuple
from convexlearn.rules.parameters import Role


class AffineRule(DecisionRule):
    """s = Wx + b (type T1 of the paper): x `(B, *in)` -> s `(B, *out)`, W `(m, n)`, b `(m,)` or None.

    Contexts and decisions with several dimensions, such as images, are flattened inside to n and m
    entries; `shape` is the decision's shape, by default `(m,)`. W and b are objective parameters.

    >>> rule = AffineRule(torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]))
    >>> rule(torch.tensor([[1.0, 1.0]]))
    tensor([[3.5000]], grad_fn=<ViewBackward0>)
    """

    W: Tensor
    b: Tensor

    @checked(shape=SIZES)
    def __init__(self, W: Any, b: Any = None, *, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.declare("W", W, role=Role.OBJECTIVE)
        if self.W.ndim != 2:
            raise ShapeError(f"W must have shape (m, n), got {tuple(self.W.shape)}")
        m = self.W.shape[0]
        self.bias = b is not None
        if self.bias:
            self.declare("b", b, role=Role.OBJECTIVE)
            if tuple(self.b.shape) != (m,):
                raise ShapeError(f"b must have shape ({m},) to match W, got {tuple(self.b.shape)}")
        self.shape: tuple[int, ...] = (m,) if shape is None else tuple(shape)
        if torch.Size(self.shape).numel() != m:
            raise ShapeError(f"shape {self.shape} has not the {m} entries that W gives")

    @classmethod
    @checked(ridge=number(least=0), intercept=FLAG)
    def fit(cls, x: Context, s: Tensor, *, ridge: float = 0.0, intercept: bool = True) -> "AffineRule":
        """The least-squares fit, in closed form: the model-based start of this rule.

        Minimizes |S - X W' - 1 b'|_F^2 / N + ridge |W|_F^2 over W (and b) for N pairs x `(N, *in)` and
        s `(N, *out)`; b is not penalised, and of several minimizers W is the one of smallest norm.

        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> AffineRule.fit(x, 2 * x + 1).W.round(decimals=4).item()
        2.0
        """
        s = as_floating("s", s, "AffineRule.fit: decisions")
        X, S = (flattened("AffineRule.fit", as_tuple(t)).detach().double() for t in (x, s))
        if len(X) != len(S) or len(X) == 0:
            raise ShapeError(f"fit needs as many contexts x as decisions s, one at least; got {len(X)}, {len(S)}")
        for name, flat in (("x", X), ("s", S)):
            if not bool(torch.isfinite(flat).all()):
                row = int(torch.nonzero(~torch.isfinite(flat))[0, 0])
                raise DomainError(f"AffineRule.fit: {name} is NaN or infinite in sample {row}; leave such samples out")
        mean_x, mean_s = (t.mean(0) if intercept else torch.zeros_like(t[0]) for t in (X, S))
        X, S = X - mean_x, S - mean_s
        if ridge > 0:
            scale = (ridge * len(X)) ** 0.5
            X = torch.cat([X, scale * torch.eye(X.shape[1], dtype=X.dtype, device=X.device)])
            S = torch.cat([S, S.new_zeros(X.shape[1], S.shape[1])])
        W = (torch.linalg.pinv(X) @ S).mT
        b = (mean_s - W @ mean_x).to(s.dtype) if intercept else None
        return cls(W.to(s.dtype), b, shape=tuple(s.shape[1:]))

    def forward(self, *x: Tensor) -> Tensor:
        """s `(B, *out)` for x `(B, *in)`, or several contexts, which are flattened and joined."""
        flat = flattened(type(self).__name__, x)
        W = self.W.to(flat.dtype)
        if flat.shape[1] != W.shape[1]:
            raise ShapeError(f"x has {flat.shape[1]} entries per sample, but W {tuple(W.shape)} takes {W.shape[1]}")
        s = flat @ W.mT
        if self.bias:
            s = s + self.b.to(flat.dtype)
        return s.reshape(len(flat), *self.shape)
