"""The affine map from parameter values to ProgramData, and from solutions to outputs, with transposes."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convexlearn.parallel import block_of, run
from convexlearn.program.compiler import Compiled
from convexlearn.program.program import CPU, ProgramData


class SparseMap:
    """A constant sparse matrix that multiplies batches of vectors on any device."""

    def __init__(self, matrix: sp.csr_array) -> None:
        self.shape = matrix.shape
        self._forward, self._transposed = sp.csr_array(matrix), sp.csr_array(matrix.T)
        self._picked = _selected_columns(self._forward)
        self._device: dict[tuple[torch.device, bool], Tensor] = {}

    def __call__(self, v: Tensor) -> Tensor:
        """matrix @ v for every row v of (B, cols): (B, rows)."""
        return self._multiply(v, False)

    def transposed(self, w: Tensor) -> Tensor:
        """matrix' @ w for every row w of (B, rows): (B, cols)."""
        return self._multiply(w, True)

    def _multiply(self, v: Tensor, transposed: bool) -> Tensor:
        if v.device.type != "cpu":
            return torch.sparse.mm(self._on(v.device, transposed), v.T).T
        return torch.from_numpy(self.on_host(v.numpy(), transposed))

    def on_host(self, v: np.ndarray, transposed: bool = False) -> np.ndarray:
        """The product for arrays; without torch's threads, which would spin beside those of the solvers."""
        if self._picked is not None:
            if not transposed:
                return v[:, self._picked].copy()  # a view would let the caller change the solution
            out = np.zeros((len(v), self.shape[1]))
            out[:, self._picked] = v
            return out
        matrix = self._transposed if transposed else self._forward
        return (matrix @ v[0])[None] if len(v) == 1 else np.ascontiguousarray((matrix @ v.T).T)

    def _on(self, device: torch.device, transposed: bool) -> Tensor:
        key = (device, transposed)
        if key not in self._device:
            matrix = (self._transposed if transposed else self._forward).tocoo()
            index = torch.as_tensor(np.stack(matrix.coords))
            values = torch.as_tensor(matrix.data)
            tensor = torch.sparse_coo_tensor(index, values, matrix.shape, check_invariants=False)
            self._device[key] = tensor.coalesce().to(device)
        return self._device[key]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_device": {}}

    def __deepcopy__(self, memo: dict) -> "SparseMap":
        return self


def _selected_columns(matrix: sp.csr_array) -> np.ndarray | slice | None:
    """Column of each row's only entry, where all entries are 1 and no column is picked twice; a slice if it can be."""
    picks = bool((np.diff(matrix.indptr) == 1).all() and (matrix.data == 1).all())
    columns = matrix.indices
    if not picks or len(np.unique(columns)) < matrix.nnz:
        return None
    neighbours = len(columns) > 0 and bool((np.diff(columns) == 1).all())
    return slice(int(columns[0]), int(columns[-1]) + 1) if neighbours else columns


@dataclass(frozen=True, eq=False)
class _Rows:
    """A stack of the rows of P, q, A and b as map_kernels takes it: (pointer, column, value), and rows with entries."""

    csr: tuple[np.ndarray, np.ndarray, np.ndarray]
    filled: np.ndarray

    @classmethod
    def of(cls, matrix: sp.csr_array, starts: np.ndarray) -> "_Rows":
        rows = np.flatnonzero(np.diff(matrix.indptr))
        field = np.searchsorted(starts, rows, side="right") - 1
        filled = np.stack([rows, field, rows - starts[field]]).astype(np.int32)
        csr = matrix.indptr.astype(np.int32), matrix.indices.astype(np.int32), matrix.data.astype(float)
        return cls(csr, filled)


class DataMap:
    """ProgramData from the parameters, for one choice of which features are batched.

    A field (P, q, A or b) is batched only if one of its entries depends on a batched feature;
    the entries' shared parts are computed once, never expanded to the batch.
    """

    def __init__(self, compiled: Compiled, widths: tuple[int, ...], batched: tuple[bool, ...]) -> None:
        flags = np.repeat(batched, widths).astype(bool)
        maps = [compiled.maps[name] for name in ProgramData.FIELDS]
        starts = np.cumsum([0, *(m.shape[0] for m in maps)])
        stacked = sp.csc_array(sp.vstack(maps))
        shared = sp.csr_array(stacked[:, np.append(np.flatnonzero(~flags), len(flags))])
        varying = sp.csr_array(stacked[:, np.flatnonzero(flags)])
        self._shared, self._batched = SparseMap(shared), SparseMap(varying)
        self._base, self._varying = _Rows.of(shared, starts), _Rows.of(varying, starts)
        self._own = _Rows.of(sp.csr_array(shared[:, :-1]), starts)  # the constant needs no gradient
        self._starts, self._heights = starts.astype(np.int32), [m.shape[0] for m in maps]
        self._slices = tuple(slice(int(i), int(j)) for i, j in pairwise(starts))
        self._varies = tuple(f in self._varying.filled[1] for f in range(len(maps)))
        self._constant = not any(self._varies)  # over the batch
        self._block = block_of(varying.nnz)

    def __call__(self, shared: Tensor, batched: Tensor, batch: int) -> ProgramData:
        """Data from the shared features and a final 1 (1, k + 1), and the batched ones (B, l)."""
        if shared.device.type == "cpu":
            return self.on_host(shared[0].numpy(), batched.numpy(), batch)
        base = self._shared(shared)
        varying = base if self._constant else self._batched(batched)
        fields = [base[:, s] + varying[:, s] if v else base[:, s] for s, v in zip(self._slices, self._varies)]
        return ProgramData(*fields, batch=batch)

    def on_host(self, theta: np.ndarray, features: np.ndarray, batch: int) -> ProgramData:
        """Data from arrays: shared features and a final 1 (k + 1,), batched features (B, l)."""
        from convexlearn.program.map_kernels import evaluate

        fields = tuple([np.empty((batch if varies else 1, n)) for varies, n in zip(self._varies, self._heights)])
        constants = (*self._base.csr, self._starts, theta, self._varying.csr, self._varying.filled, features, fields)
        if self._constant:
            evaluate(*constants, 0, 0)
        else:
            run(lambda first, last, _: evaluate(*constants, first, last), batch, block=self._block)
        return ProgramData(*fields, batch=batch)

    def gradient(self, data: ProgramData) -> tuple[Tensor, Tensor | None]:
        """Gradients of the shared features (1, k), summed over the batch, and of the batched ones (B, l)."""
        if data.device == CPU:
            own, varying = self.gradient_on_host(data)
            return torch.from_numpy(own)[None], None if varying is None else torch.from_numpy(varying)
        total = torch.cat([g if len(g) == 1 else g.sum(0, keepdim=True) for g in data.fields()], 1)
        own = self._shared.transposed(total)[:, :-1]
        if self._constant:
            return own, None
        full = [g if v else g.new_zeros(data.batch, g.shape[1]) for g, v in zip(data.fields(), self._varies)]
        return own, self._batched.transposed(torch.cat(full, 1))

    def gradient_on_host(self, data: ProgramData) -> tuple[np.ndarray, np.ndarray | None]:
        """As `gradient`: arrays (k,) and (B, l), the latter None where no batched feature enters the data."""
        from convexlearn.program.map_kernels import batched_gradient, shared_gradient

        map_, fields = self._own, data.arrays
        own = np.empty(self._shared.shape[1] - 1)
        shared_gradient(*map_.csr, map_.filled, fields, own)
        if self._constant:
            return own, None
        map_, varying = self._varying, np.empty((data.batch, self._batched.shape[1]))
        constants = (*map_.csr, map_.filled, fields, varying)
        run(lambda first, last, _: batched_gradient(*constants, first, last), data.batch, block=self._block)
        return own, varying

    def __deepcopy__(self, memo: dict) -> "DataMap":
        return self
