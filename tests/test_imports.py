"""The order of the house: who may import whom, how long a file may be, and what importing the package costs."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "convexlearn"
LONGEST = 400

# A file imports only from files above it in this list; files on one line may import each other, without circles.
ORDER = """
errors checks extras failures randomness parallel checkpoint history optimizers distributed
inputs plain_data
domains
program.program
program.declaration
program.problem_file
program.compiler
program.structure
program.absent_rows program.self_check program.compiled program.elimination
program.substitution
program.classify
program.lane_kernels
program.reduction_kernels program.map_kernels
program.data_map
program.reduce
solvers.base
solvers.quadratic.*
solvers.second_order.*
solvers.cone_kernels solvers.conic_kernels
solvers.cones solvers.curvature
solvers.conic_system
solvers.conic_newton
solvers.conic
solvers.diffcp
solvers
layer_arguments
operators
layer_transforms
layer_node
layer
diagnose
prox_arguments expression_text taut_string
spectral
prox convex_prox
shrinkage
affine_maps
terms
term_groups
split_instance
splitting
riccati_arguments
riccati block_tridiagonal newton
softmax_regression
chain_kernels
chain
networks stacked_networks gain_networks convolution
flows
denoisers
iterations.slots
iterations.base
iterations.circulant iterations.blocks
iterations.*
adjoints
rules.parameters
rules.base
rules.state_filter
rules.*
saving
simulate.base simulate.linear_gaussian
simulate.*
simulate
objectives
report
evaluate
descent
tune
reinforcement
export
interop
convexlearn
cli
__main__
"""

# What a file never imports, wherever in it.
FORBIDDEN = {
    "program.compiler": ("convexlearn.solvers*", "convexlearn.layer*"),
    "program.*": ("convexlearn.solvers*", "convexlearn.layer*", "convexlearn.rules*"),
    "solvers*": ("cvxpy*", "convexlearn.layer*", "convexlearn.rules*", "convexlearn.program.compiler"),
    "layer": (
        "cvxpy*",
        "convexlearn.solvers.quadratic*",
        "convexlearn.solvers.second_order*",
        "convexlearn.solvers.diffcp",
        "diffcp*",
    ),
    "rules.*": ("convexlearn.simulate*", "convexlearn.evaluate", "convexlearn.tune", "convexlearn.descent"),
    "simulate.*": ("convexlearn.tune", "convexlearn.descent", "convexlearn.layer*", "convexlearn.solvers*"),
    "evaluate": ("convexlearn.tune", "convexlearn.descent", "convexlearn.layer*", "convexlearn.solvers*"),
    "tune": ("convexlearn.program*", "convexlearn.solvers*", "convexlearn.layer*"),
    "descent": ("convexlearn.program*", "convexlearn.solvers*", "convexlearn.layer*"),
    "*": ("convexlearn.problems*", "problems*"),
}

HEAVY = ("matplotlib", "gymnasium", "stable_baselines3")  # never at import of the package
COMPILED = (
    *("program.compiled", "*_kernels"),
    *("solvers.quadratic.*", "solvers.second_order.*"),
)  # the only ones that use numba


def module_of(path: Path) -> str:
    """Name below the package: "solvers" for its __init__.py, "convexlearn" for the outermost."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "convexlearn"


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """Full names of the modules that a file imports; not `everywhere`: only while it is itself imported."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                found.add(full if is_module(full := f"{node.module}.{alias.name}") else str(node.module))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if everywhere or not inside:
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(path.read_text()))
    return found


def is_module(name: str) -> bool:
    return name.startswith("convexlearn.") and name.removeprefix("convexlearn.") in FILES


def own(path: Path, everywhere: bool = True) -> set[str]:
    """Modules of the package that a file imports, named as in ORDER."""
    names = {n for n in imported(path, everywhere) if n.split(".")[0] == "convexlearn"}
    return {n.removeprefix("convexlearn.") for n in names} - empty_packages()


def empty_packages() -> set[str]:
    """Packages whose __init__.py imports nothing: a mere folder."""
    return {name for name, path in FILES.items() if path.name == "__init__.py" and not imported(path)}


def place(module: str) -> int:
    """The line of ORDER with the most specific pattern that the module matches."""
    lines = ORDER.split("\n")
    matches = [(len(p), k) for k, line in enumerate(lines) for p in line.split() if fnmatch(module, p)]
    assert matches, f"{module}: give the new file a place in the order of tests/test_imports.py"
    return max(matches)[1]


@pytest.mark.parametrize("module", sorted(FILES.keys() - empty_packages()))
def test_files_import_from_above_only(module):
    for other in own(FILES[module]):
        assert other in FILES, f"{module} imports convexlearn.{other}, which does not exist"
        assert place(other) <= place(module), f"{module} imports {other}, which comes after it"


def test_no_circles():
    TopologicalSorter({name: own(path) for name, path in FILES.items()}).prepare()


@pytest.mark.parametrize("module", sorted(FILES))
def test_forbidden_imports(module):
    for pattern, names in FORBIDDEN.items():
        if fnmatch(module, pattern):
            for name in imported(FILES[module]):
                assert not any(fnmatch(name, n) for n in names), f"{module} must not import {name}"


def test_the_command_line_finds_the_catalogue_without_importing_it():
    assert not any("problems" in name for name in imported(FILES["cli"]))


@pytest.mark.parametrize(
    "path", sorted([*PACKAGE.rglob("*.py"), *(ROOT / "problems").glob("*.py")]), ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("module", sorted(FILES))
def test_heavy_packages_are_not_imported_with_a_file(module):
    names = {name.split(".")[0] for name in imported(FILES[module], everywhere=False)}
    assert not names & set(HEAVY)
    if not any(fnmatch(module, pattern) for pattern in COMPILED):
        assert not {name.split(".")[0] for name in imported(FILES[module])} & {"numba", "llvmlite"}


def test_compiled_files_are_imported_when_needed():
    """Nothing that `import convexlearn` reaches at module level imports numba."""
    seen, queue = set(), ["convexlearn"]
    while queue:
        module = queue.pop()
        if module in seen or module not in FILES:
            continue
        seen.add(module)
        outside = {name.split(".")[0] for name in imported(FILES[module], everywhere=False)}
        assert not outside & {"numba", "llvmlite"}, module
        parents = {module.rsplit(".", k)[0] for k in range(1, module.count(".") + 1)}
        queue += own(FILES[module], everywhere=False) | parents
    assert {"layer", "solvers", "rules.convex"} <= seen


def test_importing_the_package_is_light():
    check = f"import sys, convexlearn; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_public_names_exist():
    import convexlearn

    assert all(hasattr(convexlearn, name) for name in convexlearn.__all__)


def test_nothing_prints():
    for module, path in FILES.items():
        if module in ("cli", "__main__"):
            continue
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), module
