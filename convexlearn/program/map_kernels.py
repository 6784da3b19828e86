"""Compiled products with the parameter maps: program data from features, and gradients back.

A map is a stack of the rows of P, q, A and b in CSR form (pointer, column, value). `rows` (3, k) lists those
with entries: their number, field and position in it. Import this module only when something is to be
solved: it imports numba.
"""

from convexlearn.program.compiled import entry


@entry
def constant_part(pointer, column, value, theta, out):
    """out (rows,) = map @ theta."""
    for i in range(len(out)):
        total = 0.0
        for e in range(pointer[i], pointer[i + 1]):
            total += value[e] * theta[column[e]]
        out[i] = total


@entry
def varying_part(pointer, column, value, rows, features, base, fields, varying, first, last):
    """Samples first:last of the batched fields (numbers `varying`): base (1, .) each, plus map @ features."""
    for f in varying:
        out, own = fields[f], base[f]
        for k in range(first, last):
            for i in range(out.shape[1]):
                out[k, i] = own[0, i]
    for r in range(rows.shape[1]):
        row, out, i = rows[0, r], fields[rows[1, r]], rows[2, r]
        for k in range(first, last):
            total = 0.0
            for e in range(pointer[row], pointer[row + 1]):
                total += value[e] * features[k, column[e]]
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
