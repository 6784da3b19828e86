"""The taut string: the shortest path through a tube, whose slopes are a signal of least total variation."""

import numpy as np


def taut_string(v: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Number of the segment that each entry of v `(n,)` lies in, and the shift of each segment in units of t."""
    n = len(v)
    string = _string(np.concatenate([[0.0], np.cumsum(v)]), t)
    segment, shift = np.zeros(n, dtype=np.int64), np.zeros(n)
    for k, (start, stop, before, after) in enumerate(string):
        segment[start:stop], shift[k] = k, after - before
    return segment, shift


def _string(total: np.ndarray, t: float) -> list[tuple[int, int, int, int]]:
    """Straight pieces (start, stop, side at start, side at stop) of the shortest path in the tube of radius t.

    `total` `(n + 1,)` are the cumulative sums; a side is +1 where the path touches the upper wall, -1 the
    lower one and 0 at the two ends, which are fixed.
    """
    n, start, side, pieces = len(total) - 1, 0, 0, []
    while start < n:
        origin = total[start] + side * t
        low, high, low_at, high_at = -np.inf, np.inf, start, start
        stop, corner = n, 0
        for j in range(start + 1, n + 1):
            radius = t if j < n else 0.0
            lower, upper = (total[j] - radius - origin) / (j - start), (total[j] + radius - origin) / (j - start)
            if upper < low:  # the path must bend down at the lower wall's corner
                stop, corner = low_at, -1
                break
            if lower > high:
                stop, corner = high_at, 1
                break
            if lower >= low:
                low, low_at = lower, j
            if upper <= high:
                high, high_at = upper, j
        pieces.append((start, stop, side, corner))
        start, side = stop, corner
    return pieces
