"""Inequalities that never bind: rows a'x <= inf, as users write them for bounds that only some entries have."""

from dataclasses import replace

import numpy as np
import scipy.sparse as sp

from convexlearn.errors import CompileError
from convexlearn.program.compiler import Compiled
from convexlearn.program.program import Program, Sparsity


def without_absent_rows(compiled: Compiled) -> Compiled:
    """The same problem without inequalities whose fixed right-hand side is +inf; their dual variables are zero.

    CompileError for other infinite constants: a row -inf, an equality, or the objective.
    """
    program, maps = compiled.program, compiled.maps
    assert program.fixed is not None
    P, q, A, b = program.fixed
    cones = program.cones
    absent = np.zeros(program.m, dtype=bool)
    linear = slice(cones.zero, cones.zero + cones.nonneg)
    absent[linear] = b[linear] == np.inf
    if any(np.isinf(v).any() for v in (P, q, A, b[~absent])):
        raise CompileError(
            "the problem has an infinite constant other than the bound of an inequality that always holds; "
            "replace it by a finite number, or leave the term or constraint out"
        )
    if not absent.any():
        return compiled
    number = np.cumsum(~absent) - 1
    kept = ~absent[program.A.rows]
    rows = number[program.A.rows[kept]].astype(np.int32)
    pattern = Sparsity(rows, program.A.cols[kept], (int((~absent).sum()), program.n))
    cones = replace(cones, nonneg=cones.nonneg - int(absent.sum()))
    fixed = P, q, A[kept], b[~absent]
    found = Program(program.n, pattern.shape[0], cones, program.P, pattern, fixed)
    maps = {**maps, "A": sp.csr_array(maps["A"][kept]), "b": sp.csr_array(maps["b"][~absent])}
    outputs = tuple(replace(r, matrix=sp.csr_array(r.matrix[:, ~absent])) if r.dual else r for r in compiled.outputs)
    return replace(compiled, program=found, maps=maps, outputs=outputs)
