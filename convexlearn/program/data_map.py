"""The affine map from parameter values to ProgramData, and from solutions to outputs, with transposes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convexlearn.program.compiler import Compiled
from convexlearn.program.program import ProgramData


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
                return v.take(self._picked, axis=1)
            out = np.zeros((len(v), self.shape[1]))
            out[:, self._picked] = v
            return out
        matrix = self._transposed if transposed else self._forward
        return (matrix @ v[0])[None] if len(v) == 1 else np.ascontiguousarray((matrix @ v.T).T)

    def differentiable(self, v: Tensor) -> Tensor:
        """The same product in torch operations that autograd can differentiate any number of times."""
        return torch.sparse.mm(self._on(v.device, False), v.T).T

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


def _selected_columns(matrix: sp.csr_array) -> np.ndarray | None:
    """Column of each row's only entry, where all entries are 1 and no column is picked twice."""
    picks = bool((np.diff(matrix.indptr) == 1).all() and (matrix.data == 1).all())
    return matrix.indices if picks and len(np.unique(matrix.indices)) == matrix.nnz else None


@dataclass(frozen=True, eq=False)
class _Field:
    rows: slice
    varying: slice | None


class DataMap:
    """ProgramData from the parameters, for one choice of which features are batched.

    A field (P, q, A or b) is batched only if one of its entries depends on a batched feature;
    the entries' shared parts are computed once, never expanded to the batch.
    """

    def __init__(self, compiled: Compiled, widths: tuple[int, ...], batched: tuple[bool, ...]) -> None:
        flags = np.repeat(batched, widths).astype(bool)
        shared_columns = np.append(np.flatnonzero(~flags), len(flags))
        batched_columns = np.flatnonzero(flags)
        self.fields: list[_Field] = []
        shared, varying, start, height = [], [], 0, 0
        for name in ProgramData.FIELDS:
            matrix = compiled.maps[name]
            part = sp.csr_array(matrix[:, batched_columns])
            shared.append(matrix[:, shared_columns])
            rows = slice(start, start + matrix.shape[0])
            start = rows.stop
            if part.nnz == 0:
                self.fields.append(_Field(rows, None))
                continue
            varying.append(part)
            self.fields.append(_Field(rows, slice(height, height + matrix.shape[0])))
            height += matrix.shape[0]
        self.shared = SparseMap(sp.csr_array(sp.vstack(shared)))
        self.batched = SparseMap(sp.csr_array(sp.vstack(varying))) if varying else None

    def __call__(self, shared: Tensor, batched: Tensor, batch: int, differentiable: bool = False) -> ProgramData:
        """Data from the shared features and a final 1 (1, k + 1), and the batched ones (B, l)."""
        if differentiable or shared.device.type != "cpu":
            apply = SparseMap.differentiable if differentiable else SparseMap.__call__
            base = apply(self.shared, shared)
            varying = apply(self.batched, batched) if self.batched is not None else None
            return ProgramData(*self._fields(base, varying), batch=batch)
        base = self.shared.on_host(shared.numpy())
        varying = self.batched.on_host(batched.numpy()) if self.batched is not None else None
        return ProgramData(*(torch.from_numpy(v) for v in self._fields(base, varying)), batch=batch)

    def _fields(self, base: Any, varying: Any) -> list[Any]:
        """P, q, A, b from the stacked shared and batched parts, tensors or arrays alike."""
        return [base[:, f.rows] if f.varying is None else base[:, f.rows] + varying[:, f.varying] for f in self.fields]

    def __deepcopy__(self, memo: dict) -> "DataMap":
        return self

    def gradient(self, data: ProgramData) -> tuple[Tensor, Tensor | None]:
        """Gradients of the shared features (1, k + 1), summed over the batch, and of the batched ones (B, l)."""
        if data.q.device.type != "cpu":
            shared = torch.cat([g if len(g) == 1 else g.sum(0, keepdim=True) for g in data.fields()], 1)
            parts = [g for g, f in zip(data.fields(), self.fields) if f.varying is not None]
            varying = None if self.batched is None else self.batched.transposed(torch.cat(parts, 1))
            return self.shared.transposed(shared), varying
        host = [g.numpy() for g in data.fields()]
        total = np.concatenate([g if len(g) == 1 else g.sum(0, keepdims=True) for g in host], 1)
        varying = None
        if self.batched is not None:
            stacked = np.concatenate([g for g, f in zip(host, self.fields) if f.varying is not None], 1)
            varying = torch.from_numpy(self.batched.on_host(stacked, True))
        return torch.from_numpy(self.shared.on_host(total, True)), varying
