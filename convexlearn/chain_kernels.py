"""Compiled messages along chains of discrete variables, one chain after the other. Importing this imports numba.

In step k state i goes to j at the log potential pairwise[k, i, j] + unary[k, i]; pairwise has batch B or 1 and
N or 1 steps. Minus infinity forbids; entries that are NaN or plus infinity are kept out by the caller.
"""

import numpy as np

from convexlearn.program.compiled import entry, helper

NONE = -np.inf


@helper
def arrive(pairwise, into, j, terms):
    """terms[i] = pairwise[i, j] + into[i], and the largest of them."""
    largest = NONE
    for i in range(len(terms)):
        terms[i] = pairwise[i, j] + into[i]
        largest = max(largest, terms[i])
    return largest


@entry
def messages(pairwise, unary, maximum, out, first, last):
    """out (B, N, S): messages of chains first:last, each less its largest entry."""
    steps, size = unary.shape[1:]
    into, terms = np.empty(size), np.empty(size)
    for b in range(first, last):
        own = pairwise[b if len(pairwise) > 1 else 0]
        for k in range(steps):
            matrix = own[k if len(own) > 1 else 0]
            for i in range(size):
                into[i] = unary[b, k, i] + (out[b, k - 1, i] if k else 0.0)
            top = NONE
            for j in range(size):
                largest = arrive(matrix, into, j, terms)
                if largest > NONE and not maximum:
                    total = 0.0
                    for i in range(size):
                        if terms[i] > NONE:
                            total += np.exp(terms[i] - largest)
                    largest += np.log(total)
                out[b, k, j] = largest
                top = max(top, largest)
            if top > NONE:
                for j in range(size):
                    out[b, k, j] -= top


@entry
def adjoint(pairwise, unary, maximum, out, gradient, to_pairwise, to_unary, first, last):
    """Gradients of chains first:last from `gradient` (B, N, S) of their messages `out`.

    to_unary (B, N, S) is filled; to_pairwise (B, N or 1, S, S), zero at first, is added to unless it is empty.
    """
    steps, size = unary.shape[1:]
    into, terms, total = np.empty(size), np.empty(size), np.empty(size)
    for b in range(first, last):
        own = pairwise[b if len(pairwise) > 1 else 0]
        for k in range(steps - 1, -1, -1):
            matrix = own[k if len(own) > 1 else 0]
            for i in range(size):
                total[i] = gradient[b, k, i] + (to_unary[b, k + 1, i] if k + 1 < steps else 0.0)
                into[i] = unary[b, k, i] + (out[b, k - 1, i] if k else 0.0)
                to_unary[b, k, i] = 0.0
            for j in range(size):
                if total[j] == 0.0:
                    continue
                largest = arrive(matrix, into, j, terms)
                if not largest > NONE:
                    continue
                share(terms, largest, maximum)
                for i in range(size):
                    if terms[i] != 0.0:
                        to_unary[b, k, i] += total[j] * terms[i]
                        if len(to_pairwise):
                            to_pairwise[b, k if to_pairwise.shape[1] > 1 else 0, i, j] += total[j] * terms[i]


@helper
def share(terms, largest, maximum):
    """Replace the terms by their shares in the message: softmax, or 1 for the first of the largest."""
    if maximum:
        found = False
        for i in range(len(terms)):
            first = terms[i] == largest and not found
            found = found or first
            terms[i] = 1.0 if first else 0.0
        return
    total = 0.0
    for i in range(len(terms)):
        terms[i] = np.exp(terms[i] - largest) if terms[i] > NONE else 0.0
        total += terms[i]
    for i in range(len(terms)):
        terms[i] /= total


@entry
def trace_back(pairwise, unary, out, path, first, last):
    """path (B, N): from its last state, given, back along the largest terms of the max-messages `out`."""
    steps, size = unary.shape[1:]
    into, terms = np.empty(size), np.empty(size)
    for b in range(first, last):
        own = pairwise[b if len(pairwise) > 1 else 0]
        for k in range(steps - 1, 0, -1):
            for i in range(size):
                into[i] = unary[b, k, i] + out[b, k - 1, i]
            largest = arrive(own[k if len(own) > 1 else 0], into, path[b, k], terms)
            i = 0
            while i < size - 1 and terms[i] != largest:
                i += 1
            path[b, k - 1] = i
