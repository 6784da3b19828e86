"""Recorded prices that ship with matplotlib (mpl-data/sample_data/Stocks.csv); nothing is downloaded."""

import csv
from typing import NamedTuple

import torch
from torch import Tensor

from convexlearn.extras import require

ASSETS = ("IBM", "AAPL", "MSFT", "XRX", "ADBE", "^GSPC", "^IXIC")
"""Those of the file's columns that are recorded in every month: five shares, S&P 500 and Nasdaq Composite."""


class Record(NamedTuple):
    """months: first days of N months, as text; prices: `(N, n)` in USD (index points), adjusted for dividends."""

    months: tuple[str, ...]
    prices: Tensor


def monthly() -> Record:
    """Prices of ASSETS from January 1990 to June 2022, float64.

    The shares were picked by matplotlib's authors in 2022, among companies that had survived: their average
    return is no estimate of what a share earns.
    """
    file = require("matplotlib.cbook", "plot").get_sample_data("Stocks.csv", asfileobj=False)
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    # blank rows mark dividends; the last row repeats the last month
    kept = [row for row in rows if all(row[name] for name in ASSETS) and row["Date"].endswith("-01")]
    prices = [[float(row[name]) for name in ASSETS] for row in kept]
    return Record(tuple(row["Date"] for row in kept), torch.tensor(prices, dtype=torch.float64))
