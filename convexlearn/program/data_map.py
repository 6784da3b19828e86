"""The affine map from parameter values to ProgramData, and from solutions to outputs, with transposes."""

from dataclasses import dataclass

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
        self._device: dict[tuple[torch.device, bool], Tensor] = {}

    def __call__(self, v: Tensor) -> Tensor:
        """matrix @ v for every row v of (B, cols): (B, rows)."""
        return self._multiply(v, False)

    def transposed(self, w: Tensor) -> Tensor:
        """matrix' @ w for every row w of (B, rows): (B, cols)."""
        return self._multiply(w, True)

    def _multiply(self, v: Tensor, transposed: bool) -> Tensor:
        matrix = self._transposed if transposed else self._forward
        if v.device.type != "cpu":
            return torch.sparse.mm(self._on(v.device, transposed), v.T).T
        if len(v) == 1:
            return torch.from_numpy(matrix @ v.numpy()[0])[None]
        return torch.from_numpy(np.ascontiguousarray((matrix @ v.numpy().T).T))

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
        apply = SparseMap.differentiable if differentiable else SparseMap.__call__
        base = apply(self.shared, shared)
        varying = apply(self.batched, batched) if self.batched is not None else None
        values = []
        for f in self.fields:
            v = base[:, f.rows]
            values.append(v + varying[:, f.varying] if f.varying is not None and varying is not None else v)
        return ProgramData(*values, batch=batch)

    def __deepcopy__(self, memo: dict) -> "DataMap":
        return self

    def gradient(self, data: ProgramData) -> tuple[Tensor, Tensor | None]:
        """Gradients of the shared features (1, k + 1), summed over the batch, and of the batched ones (B, l)."""
        shared = torch.cat([g if len(g) == 1 else g.sum(0, keepdim=True) for g in data.fields()], 1)
        varying = None
        if self.batched is not None:
            parts = [g for g, f in zip(data.fields(), self.fields) if f.varying is not None]
            varying = self.batched.transposed(torch.cat(parts, 1))
        return self.shared.transposed(shared), varying
