"""Rules as files without code: tensors in safetensors, and a declaration from which the rule is built again."""

import contextlib
import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convexlearn.checks import PATH, Check, checked, instance
from convexlearn.convolution import Convolution
from convexlearn.errors import FileError, OptionError, suggest
from convexlearn.extras import require
from convexlearn.iterations.admm import ADMM
from convexlearn.iterations.amp import AMP
from convexlearn.iterations.base import Iteration
from convexlearn.iterations.primal_dual import PrimalDual
from convexlearn.iterations.proximal_gradient import FISTA, ISTA
from convexlearn.iterations.robust_pca import RobustPCA
from convexlearn.plain_data import Packer, Unpacker
from convexlearn.program.declaration import Declaration
from convexlearn.program.problem_file import ProblemPacker, ProblemUnpacker
from convexlearn.prox import PROXIMABLE
from convexlearn.rules.affine import AffineRule
from convexlearn.rules.base import ModuleRule
from convexlearn.rules.channel_factors import ChannelFactor, LearnedFactor, Trellis
from convexlearn.rules.convex import ConvexRule
from convexlearn.rules.extended_kalman import ExtendedKalmanFilter
from convexlearn.rules.iterative import Converged, Unfolded
from convexlearn.rules.kalman import KalmanFilter
from convexlearn.rules.lqg import LQG, LQR
from convexlearn.rules.neural import NeuralRule
from convexlearn.rules.output_feedback import OutputFeedback
from convexlearn.rules.parameters import LearnedParameters, changes_of, check_value, restore
from convexlearn.rules.smoother import KalmanSmoother
from convexlearn.rules.sum_product import SumProduct
from convexlearn.rules.tree import TreeRule
from convexlearn.shrinkage import SHRINKAGES
from convexlearn.splitting import Split, read_split

FORMAT = "convexlearn 1"

LARGEST = {"layers": 10_000, "depth": 20, "memory": 16}
"""Bounds on arguments that say how much is built: a file must not fill the memory of who loads it."""

RULES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *(AffineRule, TreeRule, ConvexRule, Converged, Unfolded, NeuralRule, ModuleRule),
        *(LQR, LQG, KalmanFilter, ExtendedKalmanFilter, KalmanSmoother, OutputFeedback, SumProduct, ChannelFactor),
    )
}
ITERATIONS: dict[str, type[Iteration]] = {cls.__name__: cls for cls in (ISTA, FISTA, ADMM, AMP, PrimalDual, RobustPCA)}
MODULES: dict[str, tuple[type, tuple[str, ...]]] = {
    "Convolution": (Convolution, ("kernel", "upsample", "boundary", "image")),
    "LearnedFactor": (LearnedFactor, ("network", "trellis")),
    "Trellis": (Trellis, ("symbols", "memory")),
    "Linear": (nn.Linear, ("in_features", "out_features")),
    **{cls.__name__: (cls, ()) for cls in (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Identity, nn.Flatten)},
}
"""By name: class, and the attributes that are its constructor's arguments; weights come with the state."""

FUNCTIONS = {**{name: entry.prox for name, entry in PROXIMABLE.items()}, **SHRINKAGES}


CLASSES = Check(
    "a list of subclasses of DecisionRule",
    lambda v: isinstance(v, list | tuple) and all(isinstance(c, type) and issubclass(c, LearnedParameters) for c in v),
)


@checked(path=PATH, classes=CLASSES)
def save(rule: nn.Module, path: str | Path, *, classes: Sequence[type[LearnedParameters]] = ()) -> None:
    """Write a rule to one file that holds no code: what was declared, and every value that was tuned since.

    The file is safetensors: tensors, and in its metadata a JSON text with the classes by name, the constructors'
    arguments and CVXPY problems as expression trees. Kept exactly: values, dtypes, domains, what is learned or frozen,
    train or eval mode. Of a network or function in a slot only the state is kept, except for linear layers, common
    activations, nn.Sequential and Convolution; `load` asks for the rest by the argument's name. classes: your own
    subclasses of DecisionRule in it. What cannot be saved is a FileError that names it. Needs `safetensors`.

    >>> import tempfile
    >>> rule, file = AffineRule(torch.eye(2), torch.ones(2)), tempfile.mkdtemp() + "/rule.safetensors"
    >>> save(rule, file)
    >>> bool((load(file).W == rule.W).all())
    True
    """
    if not isinstance(rule, LearnedParameters):
        raise FileError(f"save takes a rule, got {type(rule).__name__}; {_wrapped(rule, path)}")
    packer = _RulePacker(classes)
    root = packer.pack(rule, type(rule).__name__)
    changes = packer.pack(changes_of(rule), "state")
    content = {"format": FORMAT, "rule": root, "changes": changes, "nodes": packer.problems.nodes}
    content["modules"] = packer.modules
    packer.problems.verify(ProblemUnpacker(Unpacker(packer.tensors)))
    text = json.dumps(content, separators=(",", ":"))
    metadata = {"convexlearn": text, "sha256": _checksum(text, packer.tensors)}
    _write(Path(path), packer.tensors, metadata)


def _wrapped(value: Any, path: str | Path) -> str:
    """What to write instead of saving something that is no rule."""
    if not isinstance(value, nn.Module):
        return "write it as a class derived from cl.DecisionRule, and give that to save and load: classes=[...]"
    text = f"wrap a network: cl.save(cl.NeuralRule(network), {str(path)!r})"
    if _plain(value):
        return text
    return f"{text}. To load: {_asked(type(value).__name__, 'network', path)}"


def _asked(kind: str, name: str, path: str | Path) -> str:
    """How to load a file that lacks the code of a module or function."""
    return (
        f"'{name}' is a network or function ({kind}) whose code is not in the file; give one of the same sizes, which "
        f"gets its weights from the file: cl.load({str(path)!r}, {name}={name}), or a function without arguments that "
        f"returns it: {name}=lambda: {name}"
    )


@checked(path=PATH, classes=CLASSES, device=instance((str, torch.device), "a torch device"))
def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    classes: Sequence[type[LearnedParameters]] = (),
    **builders: Callable[..., Any],
) -> Any:
    """The rule that `save` wrote: same decisions, parameters, domains and choice of what is learned.

    builders: by name, for each network or function whose code the file does not hold, a module, or a function that
    takes no argument and returns it: `load(path, network=lambda: MyNet(8))`. A file that is truncated, changed or not
    of this kind is a FileError. Nothing of a file is executed: it names classes of a fixed table, every
    expression is checked, and values must lie in their domains.
    """
    target = _device(device)
    tensors, content = _read(Path(path))
    unpacker = _RuleUnpacker(tensors, classes, builders)
    try:
        unpacker.modules, unpacker.path = content["modules"], path
        unknown = builders.keys() - content["modules"].keys()
        for name in unknown:
            raise OptionError(f"load: {path} has no module '{name}'; {suggest(name, content['modules'])}")
        unpacker.problems.rebuild(content["nodes"])
        with torch.random.fork_rng(devices=[]):  # networks built inside draw their first weights
            rule = unpacker.unpack(content["rule"])
        changes = unpacker.unpack(content["changes"])
        if not isinstance(rule, LearnedParameters):
            raise FileError(f"it holds a {type(rule).__name__}, no rule")
        restored = _restored(rule, changes)
    except OptionError:
        raise
    except FileError as error:
        raise FileError(f"{path} cannot be loaded: {error}") from error
    except Exception as error:  # constructors of rules and atoms refuse bad arguments with errors of many kinds
        raise FileError(f"{path} cannot be loaded: {type(error).__name__}: {str(error)[:500]}") from error
    return restored.to(target)


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"load: device must be a torch device such as 'cpu', got {device!r}") from error


class _RulePacker(Packer):
    """Rules, iterations, splits, problems and modules, beside plain values."""

    def __init__(self, classes: Sequence[type]) -> None:
        super().__init__(self._other)
        self.problems = ProblemPacker(self)
        self.rules = RULES | {cls.__name__: cls for cls in classes}
        self.modules: dict[str, str] = {}

    def _other(self, value: Any, where: str) -> Any:
        if isinstance(value, LearnedParameters) and self.rules.get(type(value).__name__) is type(value):
            return {"rule": [type(value).__name__, *self._arguments(value)]}
        if isinstance(value, Iteration):
            return {"iteration": self._iteration(value)}
        if isinstance(value, Split):
            return {"split": self._split(value)}
        if _plain(value):
            name = type(value).__name__
            parts = [*value] if isinstance(value, nn.Sequential) else [_attribute(value, k) for k in MODULES[name][1]]
            return {"module": [name, [self.pack(part, where) for part in parts]]}
        found = self.problems.pack(value)
        if found is None and callable(value) and not isinstance(value, torch.dtype | Tensor):
            return self._built(value, where)
        return found

    def _arguments(self, rule: LearnedParameters) -> tuple[list[Any], dict[str, Any]]:
        """Those of the constructor; positional ones beyond its named ones stay so."""
        args, kwargs = rule._arguments
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [p.name for p in inspect.signature(type(rule).__init__).parameters.values() if p.kind in kinds][1:]
        named = {**dict(zip(names, args)), **kwargs}
        return [self.pack(value) for value in args[len(names) :]], {n: self.pack(v, n) for n, v in named.items()}

    def _built(self, value: Any, where: str) -> dict[str, Any]:
        """A module or function whose code is left to `load`."""
        if isinstance(value, type) or not (isinstance(value, nn.Module) or callable(value)):
            raise FileError(f"{where} is {value!r}, which a file without code cannot hold")
        base = where if where.isidentifier() else "network"
        name = next(n for n in (base, *(f"{base}_{k}" for k in range(2, 10**6))) if n not in self.modules)
        self.modules[name] = type(value).__name__
        return {"built": name}

    def _iteration(self, value: Iteration) -> list[Any]:
        name = type(value).__name__
        if ITERATIONS.get(name) is not type(value):
            raise FileError(f"iterations of type {name} cannot be saved, those of {', '.join(ITERATIONS)} can")
        options = {k: getattr(value, k) for k in ("base", "restart") if hasattr(value, k)}
        values = {}
        for slot, filling in value.values.items():
            known = [n for n, function in FUNCTIONS.items() if function is filling]
            values[slot] = known[0] if known else self.pack(filling, slot)
        parts = [self.pack(value.split, "split"), values, sorted(value.freed), self.pack(options)]
        return [name, *parts]

    def _split(self, value: Split) -> list[Any]:
        declaration = value.declaration
        problem = self.pack(declaration.problem)
        parameters = [self.pack(p) for p in declaration.parameters]
        outputs = [self.pack(o) for o in declaration.outputs]
        values = self.pack({name: slot.value for name, slot in value.parameters.items()})
        learned = [name for name, slot in value.parameters.items() if slot.learned]
        features = self.pack(value.features, "features")
        return [problem, parameters, outputs, list(value.context), not value.single, features, values, learned]


def _plain(value: Any) -> bool:
    """True for what MODULES can rebuild."""
    if type(value) is nn.Sequential:
        return list(value._modules) == [str(k) for k in range(len(value))] and all(map(_plain, value))
    cls = MODULES.get(type(value).__name__, (None, ()))[0]
    return cls is type(value) and not (cls is nn.Linear and value.bias is None)


def _attribute(module: Any, name: str) -> Any:
    if name == "kernel":  # the weight of a complex kernel is its real and imaginary part
        return torch.view_as_complex(module.weight.detach()) if module.weight.ndim == 3 else module.weight.detach()
    return getattr(module, name)


class _RuleUnpacker(Unpacker):
    """The inverse of `_RulePacker`."""

    def __init__(
        self, tensors: Mapping[str, Tensor], classes: Sequence[type], builders: Mapping[str, Callable[..., Any]]
    ) -> None:
        own = {"rule": self._rule, "iteration": self._iteration, "split": self._split, "module": self._module}
        super().__init__(tensors, {**own, "built": self._built})
        self.problems = ProblemUnpacker(self)
        self.rules = RULES | {cls.__name__: cls for cls in classes}
        self.builders = builders
        self.modules: Mapping[str, str] = {}  # types of what is built, by name
        self.path: str | Path = ""

    def _rule(self, payload: Any) -> Any:
        name, args, kwargs = payload
        if name not in self.rules:
            raise FileError(f"unknown rule '{str(name)[:80]}'; pass your own classes: load(path, classes=[...])")
        return self.rules[name](*map(self.unpack, args), **{k: self._argument(k, v) for k, v in kwargs.items()})

    def _argument(self, name: str, node: Any) -> Any:
        if name in LARGEST and isinstance(node, int) and node > LARGEST[name]:
            raise FileError(f"{name} = {str(node)[:80]} is too large")
        return self.unpack(node)

    def _built(self, name: str) -> Any:
        if name not in self.builders:
            raise FileError(_asked(str(self.modules.get(name, "module"))[:80], str(name)[:80], self.path))
        given = self.builders[name]
        return given if isinstance(given, nn.Module) else given()

    def _module(self, payload: Any) -> Any:
        name, arguments = payload
        if name == "Sequential":
            return nn.Sequential(*map(self.unpack, arguments))
        if name not in MODULES:
            raise FileError(f"unknown module '{str(name)[:80]}'")
        cls, names = MODULES[name]
        return cls(**{k: self._argument(k, v) for k, v in zip(names, arguments, strict=True)})

    def _iteration(self, payload: Any) -> Iteration:
        name, split, values, freed, options = payload
        if name not in ITERATIONS:
            raise FileError(f"unknown iteration '{str(name)[:80]}'")
        options, split = self.unpack(options), self.unpack(split)
        base, allowed = options.pop("base", None), {"restart"} if name == "FISTA" else set()
        if not isinstance(split, Split) or options.keys() - allowed:
            raise FileError(f"{name} takes a split, and no options {sorted(options)}")
        made: Any = ITERATIONS[name](split, **options)
        made = made.replace(**{slot: self.unpack(v) for slot, v in values.items()})
        made.freed = frozenset(made.slot(slot).name for slot in freed)
        if base is not None:
            made.base = base if isinstance(base, Tensor) else torch.tensor(float(base))
        return made

    def _split(self, payload: Any) -> Split:
        problem, parameters, outputs, context, many, features, values, learned = payload
        declared = self.unpack(problem), [self.unpack(p) for p in parameters], [self.unpack(o) for o in outputs]
        values, features = self.unpack(values), self.unpack(features)
        return read_split(Declaration.of(*declared), tuple(context), bool(many), features, values, learned)


def _restored(rule: LearnedParameters, changes: Any) -> Any:
    """The rule at the values of the file, which must be of the right names and shapes and in their domains."""
    if not isinstance(changes, dict) or changes.keys() != {"learned", "fixed", "state", "frozen", "training"}:
        raise FileError("the state of the rule is incomplete")
    for path, fixed in changes["fixed"].items():
        part = rule.get_submodule(path)
        if fixed.keys() | set(changes["learned"][path]) != set(part._declared):  # type: ignore[arg-type]
            raise FileError(f"the parameters of {type(part).__name__} are not those of the file")
        for name, value in fixed.items():
            if value.shape != part.value(name).shape:  # type: ignore[operator]
                raise FileError(f"parameter '{name}' has shape {tuple(value.shape)} in the file")
            check_value(name, value, part._declared[name].domain)  # type: ignore[index]
    restored = restore(rule, changes)
    for part in restored.modules():
        if isinstance(part, LearnedParameters):
            for name in part.learned:
                check_value(name, part.value(name).detach(), part._declared[name].domain)
    return restored


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Over the declaration and every tensor: name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _safetensors() -> Any:
    return tuple(require(module, "files", "a file of a rule") for module in ("safetensors", "safetensors.torch"))


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write beside the path and rename, so that an interrupted save leaves no half file."""
    _, codec = _safetensors()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(codec.save(tensors, metadata))
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and declaration of a file that is whole."""
    library, codec = _safetensors()
    if not path.is_file():
        raise FileError(f"no file {path}; write one with cl.save(rule, path)")
    try:
        tensors = codec.load(path.read_bytes())  # copies: the file may change afterwards
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (library.SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FileError(f"{path} is no file of cl.save, or damaged: {error}") from error
    text = metadata.get("convexlearn")
    if text is None:
        raise FileError(f"{path} holds tensors, but no rule of convexlearn")
    if metadata.get("sha256") != _checksum(text, tensors):
        raise FileError(f"{path} is damaged: its checksum is wrong; copy it again, or save the rule again")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} holds a declaration that is no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise FileError(f"{path} has format {str(found)[:80]!r}, expected {FORMAT!r}; load it with the version of then")
    return tensors, content
