"""Numbers, texts, tensors, arrays and containers of them as JSON and tensors, and back; nothing that runs code."""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convexlearn.errors import FileError

DEEPEST = 100
"""Containers within containers, at most."""

SPARSE = {"csr": sp.csr_array, "csc": sp.csc_array, "coo": sp.coo_array, "dia": sp.dia_array}


class Packer:
    """Turns values into JSON; tensors go into `tensors` by the name that the JSON says.

    A number, text, bool or None is itself; everything else is `{kind: payload}`. `others` packs what this class
    does not know and returns None where it does not either.

    >>> packer = Packer()
    >>> packer.pack((1, torch.ones(2)))
    {'tuple': [1, {'tensor': '0'}]}
    >>> Unpacker(packer.tensors).unpack(_)
    (1, tensor([1., 1.]))
    """

    def __init__(self, others: Callable[[Any, str], Any] = lambda value, where: None) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.others = others

    def pack(self, value: Any, where: str = "value") -> Any:
        """The JSON of a value; `where` names it in the error for what has none."""
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        own = self.others(value, where)
        if own is not None:
            return own
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, np.bool_ | np.integer | np.float64):
            return self.pack(value.item(), where)
        if isinstance(value, np.ndarray | np.generic):
            return self._array(np.asarray(value), where)
        if isinstance(value, Mapping) and all(type(key) is str for key in value):
            return {"dict": {key: self.pack(item, f"{where}[{key!r}]") for key, item in value.items()}}
        if isinstance(value, tuple | list):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self.pack(item, f"{where}[{k}]") for k, item in enumerate(value)]}
        return self._rare(value, where)

    def _tensor(self, value: Tensor) -> dict[str, Any]:
        if value.is_sparse:
            raise FileError("sparse tensors are not saved; give a dense one")
        name, held = str(len(self.tensors)), value.detach().cpu().clone().contiguous()
        # safetensors has no complex numbers of double precision
        self.tensors[name] = torch.view_as_real(held.resolve_conj()).contiguous() if held.is_complex() else held
        return {"complex" if held.is_complex() else "tensor": name}

    def _array(self, value: np.ndarray, where: str) -> dict[str, Any]:
        if value.dtype == object:
            raise FileError(f"{where} is an array of objects; give an array of numbers")
        return {"array": self._tensor(torch.from_numpy(np.array(value)))}

    def _rare(self, value: Any, where: str) -> dict[str, Any]:
        if isinstance(value, slice):
            return {"slice": [self.pack(part, where) for part in (value.start, value.stop, value.step)]}
        if value is Ellipsis:
            return {"ellipsis": True}
        if isinstance(value, complex):
            return {"number": [self.pack(value.real), self.pack(value.imag)]}
        if isinstance(value, Fraction):
            return {"fraction": [value.numerator, value.denominator]}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if sp.issparse(value):
            return self._sparse(value)
        raise FileError(f"{where} is a {type(value).__name__}, which a file without code cannot hold")

    def _sparse(self, value: Any) -> dict[str, Any]:
        form = value.format if value.format in SPARSE else "csc"
        value = value.asformat(form)
        if form == "coo":
            parts = [value.data, *value.coords]
        elif form == "dia":
            parts = [value.data, value.offsets]
        else:
            parts = [value.data, value.indices, value.indptr]
        packed = [self._array(np.asarray(part), "a sparse matrix") for part in parts]
        return {"sparse": [form, list(map(int, value.shape)), packed]}


class Unpacker:
    """The inverse of Packer; `others` holds further kinds, by name a function payload -> value.

    Whatever the JSON says, only values of these kinds are built; anything else is a FileError.
    """

    def __init__(self, tensors: Mapping[str, Tensor], others: Mapping[str, Callable[[Any], Any]] | None = None) -> None:
        self.tensors = tensors
        self.kinds: dict[str, Callable[[Any], Any]] = {
            "float": lambda payload: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[payload],
            "number": lambda payload: complex(*(self.unpack(part) for part in payload)),
            "tensor": lambda name: self.tensors[name],
            "complex": lambda name: torch.view_as_complex(self.tensors[name]),
            "array": self._array,
            "dict": lambda payload: {str(key): self.unpack(item) for key, item in payload.items()},
            "tuple": lambda payload: tuple(self.unpack(item) for item in payload),
            "list": lambda payload: [self.unpack(item) for item in payload],
            "slice": lambda payload: slice(*(self.unpack(part) for part in payload)),
            "ellipsis": lambda payload: Ellipsis,
            "fraction": lambda payload: Fraction(*payload),
            "dtype": self._dtype,
            "sparse": self._sparse,
            **(others or {}),
        }
        self.depth = 0

    def unpack(self, node: Any) -> Any:
        """The value of a JSON node."""
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if not isinstance(node, dict) or len(node) != 1:
            raise FileError(f"expected {{kind: value}}, got {str(node)[:80]}")
        ((kind, payload),) = node.items()
        if kind not in self.kinds:
            raise FileError(f"unknown kind of value '{kind[:80]}'")
        if self.depth >= DEEPEST:
            raise FileError(f"values are nested more than {DEEPEST} deep")
        self.depth += 1
        try:
            return self.kinds[kind](payload)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"'{kind}' cannot be rebuilt: {error}") from error
        finally:
            self.depth -= 1

    def _array(self, payload: Any) -> np.ndarray:
        return self.unpack(payload).numpy()

    def _dtype(self, payload: str) -> torch.dtype:
        found = getattr(torch, payload)
        if not isinstance(found, torch.dtype):
            raise FileError(f"'{payload}' is no dtype")
        return found

    def _sparse(self, payload: Any) -> Any:
        form, shape, packed = payload
        parts = [self.unpack(part) for part in packed]
        if form == "coo":
            return sp.coo_array((parts[0], tuple(parts[1:])), shape=tuple(shape))
        if form == "dia":
            return sp.dia_array((parts[0], parts[1]), shape=tuple(shape))
        made = SPARSE[form](tuple(parts), shape=tuple(shape))
        made.check_format(full_check=True)
        return made
