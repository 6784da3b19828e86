"""Without the extras everything else works, and what needs one says which."""

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import cvxpy as cp
import pytest
import torch

import convexlearn as cl
from convexlearn.extras import NAMES, require
from convexlearn.reinforcement import learn_by_reinforcement

ROOT = Path(__file__).parent.parent
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")
EXTRAS = {
    extra: {re.split(r"[>=<]", line)[0] for line in SETUP["options.extras_require"].get(extra, raw=True).split()}
    for extra in SETUP["options.extras_require"]
}
MODULES = {package: module for module, package in NAMES.items()}
FEATURES = ("files", "deploy", "plot", "imaging", "control", "tracking")


def calls():
    """(file, module, extra) of every call of `require` with constants."""
    for path in sorted([*(ROOT / "convexlearn").rglob("*.py"), *(ROOT / "problems").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                module, extra = (part.value if isinstance(part, ast.Constant) else None for part in node.args[:2])
                if module is not None:
                    yield path.name, module, extra


def test_the_extra_that_a_message_names_brings_the_package():
    found = list(calls())
    assert len(found) > 10
    for file, module, extra in found:
        top = module.split(".")[0]
        assert NAMES.get(top, top).replace("_", "-") in EXTRAS[extra], f"{file}: {module} is not in [{extra}]"


def test_a_missing_package_goes_by_its_name_for_pip(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs scikit-learn; .*pip install 'convexlearn\[imaging\]'"):
        require("sklearn.datasets", "imaging")


def rule():
    s, x = cp.Variable(2), cp.Parameter(2, name="x")
    return cl.ConvexRule(cp.Problem(cp.Minimize(cp.sum_squares(s - x))), [x], s)


def environment():
    plant = cl.simulate.plants.LinearGaussian(torch.eye(1), torch.eye(1), torch.eye(1), Q=torch.eye(1), R=torch.eye(1))
    loop = {"initial": plant.initial, "noise": plant.noise, "stage_cost": plant.stage_cost}
    return cl.simulate.environment(cl.simulate.ClosedLoop(plant, 2, **loop), 1.0)


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("safetensors", "files", lambda folder: cl.save(rule(), folder / "rule")),
        ("safetensors", "files", lambda folder: cl.load(folder / "rule")),
        ("cvxpygen", "deploy", lambda folder: cl.export_c(rule(), folder)),
        ("matplotlib.figure", "plot", lambda folder: cl.History().plot()),
        ("gymnasium", "control", lambda folder: environment()),
        ("stable_baselines3", "control", lambda folder: learn_by_reinforcement(None, steps=1)),
    ],
    ids=["save", "load", "export_c", "plot", "environment", "reinforcement"],
)
def test_what_needs_an_extra_says_so(module, extra, use, monkeypatch, tmp_path):
    for name in (module, *(m for m in sys.modules if m.startswith(module + "."))):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs .*pip install 'convexlearn\[{extra}\]'"):
        use(tmp_path)


def test_the_package_and_the_catalogue_load_without_extras():
    packages = {p for extra in FEATURES for p in EXTRAS[extra]}
    blocked = sorted(MODULES.get(p, p.replace("-", "_")) for p in packages)
    assert {"matplotlib", "sklearn", "skimage", "safetensors", "cvxpygen", "gymnasium"} <= set(blocked)
    check = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "import convexlearn.cli; assert convexlearn.cli.main(['list']) == 0"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "generative-prior" in result.stdout
