"""Compiled products with the parameter maps: program data from features, and gradients back.

A map is a stack of the rows of P, q, A and b in CSR form (pointer, column, value). `rows` (3, k) lists those
with entries: their number, field and position in it. Import this module only when something is to be
solved: it imports numba.
"""

import numpy as np

from convexlearn.program.compiled import entry


@entry
def evaluate(pointer, column, value, starts, theta, varying, rows, features, fields, first, last):
    """Fields of samples first:last: map @ theta, and for batched ones `varying` (in CSR form) @ features.

    `rows` lists those of `varying` with entries; fields without any are filled by the first block.
    """
    batched = np.zeros(len(fields), np.bool_)
    for r in range(rows.shape[1]):
        batched[rows[1, r]] = True
    for f in range(len(fields)):
        out = fields[f]
        if last > first if batched[f] else first == 0:
            own = out[first if batched[f] else 0]
            for i in range(len(own)):
                total = 0.0
                for e in range(pointer[starts[f] + i], pointer[starts[f] + i + 1]):
                    total += value[e] * theta[column[e]]
                own[i] = total
        if batched[f]:
            for k in range(first + 1, last):
                out[k] = out[first]
    own_pointer, own_column, own_value = varying
    for r in range(rows.shape[1]):
        row, out, i = rows[0, r], fields[rows[1, r]], rows[2, r]
        for k in range(first, last):
            total = 0.0
            for e in range(own_pointer[row], own_pointer[row + 1]):
                total += own_value[e] * features[k, own_column[e]]
            out[k, i] += total


@entry
def shared_gradient(pointer, column, value, rows, fields, out):
    """out (columns,) = map' @ (gradients `fields` summed over their samples)."""
    out[:] = 0.0
    for r in range(rows.shape[1]):
        row, source, i = rows[0, r], fields[rows[1, r]], rows[2, r]
        total = 0.0
        for k in range(len(source)):
            total += source[k, i]
        for e in range(pointer[row], pointer[row + 1]):
            out[column[e]] += value[e] * total


@entry
def batched_gradient(pointer, column, value, rows, fields, out, first, last):
    """out[first:last] = gradients `fields` @ map for samples first:last."""
    out[first:last] = 0.0
    for r in range(rows.shape[1]):
        row, source, i = rows[0, r], fields[rows[1, r]], rows[2, r]
        for k in range(first, last):
            g = source[k, i]
            for e in range(pointer[row], pointer[row + 1]):
                out[k, column[e]] += value[e] * g
