"""A compiled problem as one integer tensor, so that exported graphs carry it into other processes."""

import hashlib
import json
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convexlearn.domains import Domain
from convexlearn.errors import FileError
from convexlearn.program.compiler import Compiled, Feature, ParameterSpec, fixed_values
from convexlearn.program.program import Cones, Program, ProgramData, Sparsity

VERSION = 1
HEADER = 4  # digest (2), version, length of the description in bytes


class Output(NamedTuple):
    """Where a structure holds the map of one output: entries from `start`, then the offset."""

    start: int
    nnz: int
    size: int
    dual: bool
    exp: bool


class Layout(NamedTuple):
    """Sizes of a structure; all that a graph has to know besides the tensor itself.

    n, m, P, A: variables, rows, stored entries of P and A; map: entries of the map from parameters to
    data; features: (parameter, log) of each block of its columns; cones: (zero, nonneg, soc, rest), where
    rest counts the rows of the other cones; start: position of the first array.
    """

    n: int
    m: int
    P: int
    A: int
    map: int
    widths: tuple[int, ...]
    features: tuple[tuple[int, bool], ...]
    outputs: tuple[Output, ...]
    cones: tuple[int, int, tuple[int, ...], int]
    start: int

    @property
    def entries(self) -> tuple[int, int, int, int]:
        """Lengths of P, q, A, b."""
        return self.P, self.n, self.A, self.m

    def slices(self) -> dict[str, slice]:
        """Positions of the arrays in the structure."""
        sizes = {"P.rows": self.P, "P.cols": self.P, "A.rows": self.A, "A.cols": self.A}
        sizes |= {"map.rows": self.map, "map.cols": self.map, "map.values": self.map}
        ends = list(accumulate(sizes.values(), initial=self.start))
        return {name: slice(a, b) for name, a, b in zip(sizes, ends, ends[1:])}


@dataclass(frozen=True, eq=False)
class Structure:
    """tensor: int64, floats as their bits; layout: where what is in it; digest: names it within a process."""

    tensor: Tensor
    layout: Layout
    digest: bytes


def encode(compiled: Compiled, solver: str) -> Structure:
    """The structure of a compiled problem that `solver` solves."""
    program = compiled.program
    stacked = sp.csr_array(sp.vstack([compiled.maps[f] for f in ProgramData.FIELDS])).tocoo()
    arrays = [program.P.rows, program.P.cols, program.A.rows, program.A.cols, *stacked.coords, _bits(stacked.data)]
    text = json.dumps(_description(compiled, solver, stacked.nnz)).encode()
    text += b" " * (-len(text) % 8)
    start = HEADER + len(text) // 8
    position, outputs = start + sum(len(a) for a in arrays), []
    for recovery in compiled.outputs:
        matrix = recovery.matrix.tocoo()
        arrays += [*matrix.coords, _bits(matrix.data), _bits(recovery.offset)]
        size = recovery.matrix.shape[0]
        outputs.append(Output(position, matrix.nnz, size, recovery.dual, recovery.exp))
        position += 3 * matrix.nnz + size
    body = np.concatenate([np.frombuffer(text, np.int64), *(np.asarray(a).astype(np.int64) for a in arrays)])
    digest = hashlib.blake2b(body.tobytes(), digest_size=16).digest()
    head = np.concatenate([np.frombuffer(digest, np.int64), [VERSION, len(text)]])
    features = tuple((f.index, f.log) for f in compiled.features)
    widths = tuple(int(np.prod(p.shape)) for p in compiled.parameters)
    cones = program.cones
    rest = program.m - cones.zero - cones.nonneg - sum(cones.soc)
    layout = Layout(
        program.n, program.m, program.P.nnz, program.A.nnz, stacked.nnz, widths, features, tuple(outputs),
        (cones.zero, cones.nonneg, tuple(cones.soc), rest), start,
    )  # fmt: skip
    return Structure(torch.from_numpy(np.concatenate([head, body])), layout, digest)


def digest_of(structure: Tensor) -> bytes:
    """The digest that a structure begins with."""
    return structure[:2].cpu().numpy().tobytes()


def decode(structure: Tensor) -> tuple[Compiled, str]:
    """The compiled problem, without outputs and fixed values' identity, and the solver's name."""
    values = structure.cpu().numpy()
    version, length = int(values[2]), int(values[3])
    if version != VERSION:
        raise FileError(f"the structure has version {version}, this convexlearn reads {VERSION}; export it anew")
    description = json.loads(values[HEADER : HEADER + length // 8].tobytes())
    n, m, nnz_P, nnz_A, nnz = description["sizes"]
    ends = np.cumsum([HEADER + length // 8, nnz_P, nnz_P, nnz_A, nnz_A, nnz, nnz, nnz])
    P_rows, P_cols, A_rows, A_cols, rows, cols, bits = (values[a:b] for a, b in pairwise(ends))
    P, A = (
        Sparsity(i.astype(np.int32), j.astype(np.int32), shape)
        for i, j, shape in ((P_rows, P_cols, (n, n)), (A_rows, A_cols, (m, n)))
    )
    features = tuple(Feature(*f) for f in description["features"])
    specs = tuple(_specification(p) for p in description["parameters"])
    width = 1 + sum(int(np.prod(specs[f.index].shape)) for f in features)
    heights = np.cumsum([0, nnz_P, n, nnz_A, m])
    matrix = sp.csr_array((bits.view(np.float64), (rows, cols)), shape=(heights[-1], width))
    maps = {f: sp.csr_array(matrix[a:b]) for f, a, b in zip(ProgramData.FIELDS, heights, heights[1:])}
    fixed = tuple(fixed_values(maps[f]) for f in ProgramData.FIELDS)
    cones = description["cones"]
    cones = Cones(**{**cones, **{k: tuple(cones[k]) for k in ("soc", "psd", "power")}})
    return Compiled(Program(n, m, cones, P, A, fixed), specs, features, maps, ()), description["solver"]


def _description(compiled: Compiled, solver: str, nnz: int) -> dict[str, Any]:
    program, cones = compiled.program, compiled.program.cones
    return {
        "solver": solver,
        "sizes": [program.n, program.m, program.P.nnz, program.A.nnz, nnz],
        "cones": {
            "zero": cones.zero,
            "nonneg": cones.nonneg,
            "soc": list(cones.soc),
            "psd": list(cones.psd),
            "exp": cones.exp,
            "power": list(cones.power),
        },
        "features": [[f.index, f.log] for f in compiled.features],
        "parameters": [_parameter(p) for p in compiled.parameters],
    }


def _parameter(spec: ParameterSpec) -> dict[str, Any]:
    domain, plain = spec.domain, lambda a: None if a is None else np.asarray(a).tolist()
    return {
        "name": spec.name,
        "shape": list(spec.shape),
        "structure": domain.structure,
        "lower": plain(domain.lower),
        "upper": plain(domain.upper),
        "entries": None if domain.entries is None else [plain(i) for i in domain.entries],
        "words": list(domain.words),
    }


def _specification(text: dict[str, Any]) -> ParameterSpec:
    shape = tuple(text["shape"])
    bounds = text["lower"], text["upper"]
    lower, upper = (None if b is None else np.array(b, dtype=float).reshape(shape) for b in bounds)
    entries = None if text["entries"] is None else tuple(np.array(i) for i in text["entries"])
    domain = Domain(shape, text["structure"], lower, upper, entries, tuple(text["words"]))
    return ParameterSpec(text["name"], shape, domain)


def _bits(values: np.ndarray) -> np.ndarray:
    """float64 values as int64 with the same bits."""
    return np.ascontiguousarray(values, dtype=np.float64).view(np.int64)
