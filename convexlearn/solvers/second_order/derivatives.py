"""Solutions as differentiable functions of the data at a fixed face of the cones, for second derivatives."""

import torch
from torch import Tensor

from convexlearn.program.program import Cones, Program

SHIFT = 1e-10
STEPS = 2  # Newton steps from a solution: derivatives up to order 2^STEPS - 1 are exact


def face_solution(program: Program, fields: tuple[Tensor, ...], x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, n) and z (B, m) as torch-differentiable functions of the data near the solution (x, z).

    Newton steps on Px + q + A'z = 0 and s = projection of s - z onto K, s = b - Ax; since the projection
    is homogeneous, a step solves a system that is linear in the new x and z. The shift (refinement undoes it)
    keeps redundant rows and failed samples from making the system singular.
    """
    P, q, A, b = fields
    upper, dense = program.P.dense(P), program.A.dense(A)
    P = (upper + upper.triu(1).mT).expand(len(x), -1, -1)
    dense, q, b = dense.expand(len(x), -1, -1), q.expand(len(x), -1), b.expand(len(x), -1)
    x, z = torch.nan_to_num(x.detach()), torch.nan_to_num(z.detach())
    sign = torch.cat([q.new_full((program.n,), SHIFT), q.new_full((program.m,), -SHIFT)])
    for _ in range(STEPS):
        M = projection_derivative(program.cones, b - (dense @ x[:, :, None])[:, :, 0] - z)
        N = torch.eye(program.m, dtype=q.dtype, device=q.device) - M
        K = torch.cat([torch.cat([P, dense.mT], 2), torch.cat([N @ dense, -M], 2)], 1)
        right = torch.cat([-q, (N @ b[:, :, None])[:, :, 0]], 1)[:, :, None]
        size = K.detach().abs().amax((1, 2), keepdim=True).clamp(min=1.0)
        factor = torch.linalg.lu_factor(K + size * sign.diag())
        v = torch.cat([x, z], 1)[:, :, None]  # what the system leaves open stays where it is
        for _ in range(4):
            v = v + torch.linalg.lu_solve(*factor, right - K @ v)
        x, z = v[:, : program.n, 0], v[:, program.n :, 0]
    return x, z


def projection_derivative(cones: Cones, v: Tensor) -> Tensor:
    """(B, m, m) derivative of the projection of v (B, m) onto {0} x R+ x second-order cones."""
    flat = torch.zeros_like(v[:, : cones.zero + cones.nonneg])
    flat[:, cones.zero :] = (v[:, cones.zero : cones.zero + cones.nonneg] > 0).to(v.dtype)
    out = v.new_zeros(len(v), cones.size, cones.size)
    first = cones.zero + cones.nonneg
    blocks = [(slice(0, first), torch.diag_embed(flat))]
    for d in cones.soc:
        blocks.append((slice(first, first + d), _cone_derivative(v[:, first : first + d])))
        first += d
    for where, block in blocks:
        out = out.clone()
        out[:, where, where] = block
    return out


def _cone_derivative(v: Tensor) -> Tensor:
    head, tail = v[:, :1, None], v[:, 1:, None]
    norm = tail.norm(dim=1, keepdim=True)
    # away from the boundary the formula is not used, but its derivative must stay finite
    face = (norm > head.abs()) & (norm > 0)
    safe = torch.where(face, norm, 1.0)
    w, slope = torch.where(face, tail, 0.0) / safe, head / safe
    eye = torch.eye(tail.shape[1], dtype=v.dtype, device=v.device)
    corner = torch.cat([torch.ones_like(head), w.mT], 2)
    block = torch.cat([corner, torch.cat([w, (1 + slope) * eye - slope * (w @ w.mT)], 2)], 1) / 2
    whole = torch.eye(v.shape[1], dtype=v.dtype, device=v.device) * (head > 0)
    return torch.where(face, block, whole)
