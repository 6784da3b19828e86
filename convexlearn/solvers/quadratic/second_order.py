"""Solutions of a QP as differentiable functions of its data at a fixed active set, for second derivatives."""

import torch
from torch import Tensor

from convexlearn.program.program import Program

SHIFT = 1e-10


def active_set_solution(program: Program, fields: tuple[Tensor, ...], active: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, n) and z (B, m) as torch-differentiable functions of the data at a fixed active set (B, m).

    Exact to every order of differentiation wherever the active set is locally constant. The shift (refinement
    undoes it) keeps redundant rows and failed samples from making the system singular.
    """
    P, q, A, b = fields
    upper, dense = program.P.dense(P), program.A.dense(A)
    P, a = upper + upper.triu(1).mT, active.to(q.dtype)
    top = torch.cat([P.expand(len(a), -1, -1), dense.mT.expand(len(a), -1, -1)], 2)
    bottom = torch.cat([a[:, :, None] * dense, -torch.diag_embed(1 - a)], 2)
    K, rhs = torch.cat([top, bottom], 1), torch.cat([-q.expand(len(a), -1), a * b], 1)[:, :, None]
    sign = torch.cat([q.new_full((program.n,), SHIFT), q.new_full((program.m,), -SHIFT)])
    size = K.detach().abs().amax((1, 2), keepdim=True).clamp(min=1.0)
    factor = torch.linalg.lu_factor(K + size * sign.diag())
    v = torch.linalg.lu_solve(*factor, rhs)
    for _ in range(3):
        v = v + torch.linalg.lu_solve(*factor, rhs - K @ v)
    return v[:, : program.n, 0], v[:, program.n :, 0]
