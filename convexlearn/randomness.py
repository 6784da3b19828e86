"""Seeds and generators derived from numbers, and a guard around the global generator."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from convexlearn.errors import OptionError


def derive_seed(*parts: int | str) -> int:
    """A seed that depends on every part, such as (seed, "train", step); in [0, 2**63).

    >>> derive_seed(0, "train", 1) == derive_seed(0, "train", 1) != derive_seed(0, "train", 2)
    True
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded with `derive_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def as_generator(where: str, seed: int | torch.Generator) -> torch.Generator:
    """`seed` itself where it is a generator, else one seeded with it.

    >>> as_generator("mlp", 3).initial_seed()
    3
    """
    if isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not -(2**63) <= seed < 2**64:
        raise OptionError(f"{where}: seed must be an integer of 64 bits or a torch.Generator, got {seed!r}")
    return torch.Generator().manual_seed(int(seed))


@contextmanager
def isolated(*parts: int | str, devices: tuple[torch.device, ...] = ()) -> Iterator[None]:
    """Within it the global generator is seeded from `parts`; afterwards it is as before.

    For modules that draw from the global generator, such as dropout.
    """
    cuda = [d for d in devices if d.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(derive_seed(*parts))
        yield
