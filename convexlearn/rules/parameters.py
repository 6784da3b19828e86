"""Learned parameters of a module: in their domain as attributes, free coordinates inside."""

import copy
import keyword
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from convexlearn.checks import FLAG, checked, instance
from convexlearn.domains import Domain
from convexlearn.errors import DomainError, MissingParameterError, OptionError, ShapeError, suggest
from convexlearn.inputs import as_floating, as_tensor


class Role(Enum):
    """What a trainable tensor is in the paper: objective parameter, hyperparameter, or network weight."""

    OBJECTIVE = "objective"
    HYPER = "hyper"
    NETWORK = "network"


@dataclass(frozen=True, eq=False)
class Declaration:
    """Domain and role of a declared parameter."""

    domain: Domain
    role: Role


class LearnedParameters(nn.Module):
    """A module whose parameters are declared by name, each in its domain, and may be learned or fixed.

    A learned parameter's free coordinates live in `free`, a fixed one is a non-persistent buffer; the
    attribute under its name is the value in its domain either way. Copies and pickles keep values,
    choice of learned names, dtype and training flags; a pickle is rebuilt from the arguments of the
    constructor, kept in `_arguments`, which a subclass may replace.

    >>> module = LearnedParameters()
    >>> module.declare("rho", 0.1, Domain.from_attributes((), {"nonneg": True}), Role.HYPER)
    >>> module.rho
    tensor(0.1000, dtype=torch.float64, grad_fn=<WhereBackward0>)
    >>> module.freeze("rho").rho
    tensor(0.1000, dtype=torch.float64)
    """

    free: nn.ParameterDict
    _declared: dict[str, Declaration]
    _arguments: tuple[tuple, dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Remember the constructor's arguments, from which a pickle is rebuilt."""
        module = super().__new__(cls)
        module.__dict__["_arguments"] = (args, kwargs)
        return module

    def __init__(self) -> None:
        super().__init__()
        self._declared = {}
        self.free = nn.ParameterDict()

    @checked(domain=instance(Domain, "a Domain"), role=instance(Role, "a Role"), learned=FLAG)
    def declare(
        self,
        name: str,
        value: Any,
        domain: Domain | None = None,
        role: Role = Role.OBJECTIVE,
        *,
        learned: bool = True,
    ) -> None:
        """Declare a parameter; `value` has the domain's shape, or `(*batch, *shape)` for a stack of them.

        Numbers and numpy arrays become float64 tensors, floating tensors keep their dtype.
        """
        self._check_name(name)
        if value is None:
            raise MissingParameterError(f"parameter '{name}' has no value; set one before building the rule")
        tensor = _tensor(name, value)
        domain = Domain(tuple(tensor.shape)) if domain is None else domain
        check_value(name, tensor, domain)
        self._declared[name] = Declaration(domain, role)
        self.register_buffer(name, tensor, persistent=False)
        if learned:
            self._free_up(name)

    def declare_psd(self, name: str, value: Any, size: int, *, learned: bool = True) -> None:
        """Declare a positive semidefinite matrix `(size, size)`, one for the whole batch."""
        self.declare(name, value, Domain.from_attributes((size, size), {"PSD": True}), learned=learned)
        self.check_dimensions(name, 2)

    def check_dimensions(self, name: str, dimensions: int) -> None:
        """Refuse a stack of values where one serves the whole batch."""
        got = tuple(self.value(name).shape)
        if len(got) != dimensions:
            raise ShapeError(f"{type(self).__name__}: parameter '{name}' must have {dimensions} dimensions, got {got}")

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the declared parameters that are learned, in the order of their declaration."""
        return tuple(name for name in self._declared if name in self.free)

    def value(self, name: str) -> Tensor:
        """The declared parameter `name` in its domain, differentiable when learned."""
        if self._known(name) in self.free:
            return self._declared[name].domain.from_free(self.free[name])
        return self._buffers[name]  # pyright: ignore[reportReturnType]

    def assign(self, name: str, value: Any) -> None:
        """Give the declared parameter `name` a new value in its domain; also written `rule.name = value`."""
        old, domain = self.value(name), self._declared[name].domain
        tensor = _tensor(name, value).to(old)
        if tensor.shape != old.shape:
            raise ShapeError(f"parameter '{name}' has shape {tuple(old.shape)}, got {tuple(tensor.shape)}")
        check_value(name, tensor, domain)
        with torch.no_grad():
            if name in self.free:
                self.free[name].copy_(_free(domain, tensor))
            else:
                self._buffers[name] = tensor

    def learn(self, *names: str) -> Any:
        """Let `tune` train these parameters (default: all); returns self.

        A name is a declared parameter, another parameter of the module, or a submodule, which stands
        for all of its parameters; those of submodules are written `ista.step`.
        """
        return self._choose(names, True)

    def freeze(self, *names: str) -> Any:
        """Keep these parameters (default: all) at their present values; returns self.

        Names as in `learn`. Fixed values are left out of `state_dict`.
        """
        return self._choose(names, False)

    def _choose(self, names: tuple[str, ...], learned: bool) -> "LearnedParameters":
        parts = {f"{p}." if p else "": m for p, m in self.named_modules() if isinstance(m, LearnedParameters)}
        declared = {path + name: (part, name) for path, part in parts.items() for name in part._declared}
        own = [_typed(name) for name, _ in self.named_parameters()]
        valid = {*declared, *own, *(p for p, _ in self.named_modules() if p and not p.endswith("free"))}
        for name in names:
            if not isinstance(name, str) or name not in valid:
                near = suggest(str(name), valid)
                raise OptionError(f"{type(self).__name__} has no parameter {name!r}; {near}")

        def chosen(key: str) -> bool:
            return not names or any(key == name or key.startswith(name + ".") for name in names)

        for key, (part, name) in declared.items():
            if chosen(key):
                (part._free_up if learned else part._fix)(name)
        for key, parameter in self.named_parameters():
            if chosen(_typed(key)):
                parameter.requires_grad_(learned)
        return self

    def _free_up(self, name: str) -> None:
        if name not in self.free:
            coordinates = _free(self._declared[name].domain, self.value(name))
            delattr(self, name)
            self.free[name] = nn.Parameter(coordinates)

    def _fix(self, name: str) -> None:
        if name in self.free:
            value = self.value(name).detach().clone()
            del self.free[name]
            self.register_buffer(name, value, persistent=False)

    def _known(self, name: str) -> str:
        if not isinstance(name, str) or name not in self._declared:
            raise OptionError(f"no declared parameter {name!r}; {suggest(str(name), self._declared)}")
        return name

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise OptionError(f"parameter name {name!r} is no Python identifier; rename it, for instance to 'rho'")
        if name in self._declared:
            raise OptionError(f"two parameters are named '{name}'; give each its own name")
        if hasattr(self, name) or hasattr(self.free, name):
            raise OptionError(f"parameter name '{name}' is taken by {type(self).__name__}; rename it, as in '{name}_'")

    def __getattr__(self, name: str) -> Any:
        """A learned parameter in its domain."""
        if name in self.__dict__.get("_declared", ()) and name in self.free:
            return self.value(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign a declared parameter in its domain."""
        if name in self.__dict__.get("_declared", ()):
            self.assign(name, value)
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """One line per declared parameter: name, shape, domain, role, learned or fixed."""
        lines = []
        for name, declaration in self._declared.items():
            what = f"learned {declaration.role.value} parameter" if name in self.free else "fixed"
            lines.append(f"{name}: {tuple(self.value(name).shape)} {declaration.domain.describe()}, {what}")
        return "\n".join(lines)

    def __deepcopy__(self, memo: dict) -> "LearnedParameters":
        module = type(self).__new__(type(self))
        memo[id(self)] = module
        for key, item in self.__dict__.items():
            module.__dict__[key] = item if key == "_arguments" else copy.deepcopy(item, memo)
        return module

    def __reduce__(self) -> tuple:
        """Rebuild from the constructor's arguments, then restore what has changed since."""
        return _rebuild, (type(self), *self._arguments, changes_of(self))


def count_parameters(module: nn.Module) -> dict[Role, int]:
    """Number of trainable entries of any module by role."""
    counts, role = dict.fromkeys(Role, 0), role_of(module)
    for parameter in module.parameters():
        if parameter.requires_grad:
            counts[role(parameter)] += parameter.numel()
    return counts


def role_of(module: nn.Module) -> Callable[[nn.Parameter], Role]:
    """The function from a parameter of any module to its role; what nobody declared is a network weight."""
    roles = {
        id(parameter): part._declared[name].role
        for part in module.modules()
        if isinstance(part, LearnedParameters)
        for name, parameter in part.free.items()
    }
    return lambda parameter: roles.get(id(parameter), Role.NETWORK)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by the name a person would type, such as `rho` for `free.rho`."""
    named = {_typed(name): parameter for name, parameter in module.named_parameters()}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def _typed(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "free")


def _tensor(name: str, value: Any) -> Tensor:
    """The value as a real tensor of its own memory; sparse matrices become dense, numbers and lists float64."""
    if isinstance(value, Tensor):
        return as_floating(name, value).detach().clone()
    return as_tensor(name, value.toarray() if hasattr(value, "toarray") else value).to(torch.float64, copy=True)


def check_value(name: str, value: Tensor, domain: Domain) -> None:
    """Raise ShapeError or DomainError unless `value` `(*batch, *shape)` is finite and in its domain."""
    if tuple(value.shape[value.ndim - len(domain.shape) :]) != domain.shape or value.ndim < len(domain.shape):
        raise ShapeError(f"parameter '{name}' must have shape {domain.shape}, got {tuple(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise DomainError(f"parameter '{name}' must be finite, but its value has NaN or infinite entries")
    domain.check(name, value)


def _free(domain: Domain, value: Tensor) -> Tensor:
    """Free coordinates, computed in float64, as a leaf of the value's dtype."""
    return domain.to_free(value.detach().double()).to(value.dtype).contiguous().clone()


def changes_of(module: LearnedParameters) -> dict[str, Any]:
    """What may differ from a module just built with the same arguments; `restore` puts it back."""
    parts = {path: m for path, m in module.named_modules() if isinstance(m, LearnedParameters)}
    return {
        "learned": {path: list(part.learned) for path, part in parts.items()},
        "fixed": {p: {n: m.value(n) for n in m._declared if n not in m.free} for p, m in parts.items()},
        "state": module.state_dict(),
        "frozen": [name for name, p in module.named_parameters() if not p.requires_grad],
        "training": {path: m.training for path, m in module.named_modules()},
    }


def _rebuild(cls: type, args: tuple, kwargs: dict[str, Any], changes: dict[str, Any]) -> LearnedParameters:
    with torch.random.fork_rng(devices=[]):  # networks built inside draw their first weights
        module = cls(*args, **kwargs)
    return restore(module, changes)


def restore(module: Any, changes: dict[str, Any]) -> Any:
    """`module`, in place, with what `changes_of` found."""
    for path, learned in changes["learned"].items():
        part = module.get_submodule(path)
        for name in part._declared:
            (part._free_up if name in learned else part._fix)(name)
        part._buffers.update(changes["fixed"][path])
    module.load_state_dict(changes["state"], assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in changes["frozen"])
    for path, training in changes["training"].items():
        module.get_submodule(path).training = training
    return module
