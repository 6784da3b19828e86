"""Every argument of public constructors, functions and methods given what it cannot take; `pytest -s` prints counts.

Each is an error of convexlearn that names the argument: never one of a library below, never a silent answer.
"""

import inspect
import os
import re
import warnings
from collections.abc import Iterator
from types import ModuleType

import fuzz_rule_calls
import fuzz_rules
import fuzz_service_calls
import fuzz_simulator_calls
import pytest
from fuzz_arguments import OMITTED, Calling
from fuzz_numeric import functions
from fuzz_subjects import subjects

import convexlearn as cl
from convexlearn import flows, interop, networks, objectives, prox, reinforcement, report, simulate
from convexlearn.cli import main
from convexlearn.errors import ConvexLearnError
from convexlearn.simulate import plants

MAKERS = {
    "rules": fuzz_rule_calls.plain_rules,
    "convex": fuzz_rule_calls.convex_rules,
    "methods": fuzz_rule_calls.methods,
    "filters": fuzz_rule_calls.filters,
    "simulators": fuzz_simulator_calls.simulators,
    "services": fuzz_service_calls.services,
}
COUNTS: dict[str, int] = {}


def public(module: ModuleType) -> list[str]:
    """Functions and classes that a module defines, or lists as its own."""
    listed = getattr(module, "__all__", None)
    own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
    return [n for n in (own if listed is None else listed) if not n.startswith("_")]


@pytest.fixture(scope="module", params=list(MAKERS))
def callings(request, tmp_path_factory) -> Iterator[dict[str, Calling]]:
    """In a folder of its own, since a defect may write or remove files."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp(request.param))
    yield MAKERS[request.param]()
    os.chdir(before)


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    yield
    print("\narguments tried:", ", ".join(f"{kind} {count}" for kind, count in COUNTS.items()))


def call(calling: Calling, kind: str, **replaced) -> object:
    """The result with some arguments replaced, warnings of ours aside."""
    COUNTS[kind] = COUNTS.get(kind, 0) + 1
    arguments = {name: replaced[name] if name in replaced else a.sound() for name, a in calling.arguments.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return calling.call(**{name: value for name, value in arguments.items() if value is not OMITTED})


def outcome(calling: Calling, name: str, value: object) -> str:
    """What is wrong with how an unsound argument is received; empty where it is refused by name."""
    argument = calling.arguments[name]
    try:
        call(calling, "unsound", **{name: value})
    except ConvexLearnError as error:
        named = re.search(rf"(?<!\w)({argument.word or name})", str(error))
        return "" if named else f"the error does not name it: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_sound_arguments_are_accepted(callings):
    for calling in callings.values():
        if calling.runs:
            call(calling, "sound")
            for name, argument in calling.arguments.items():
                if argument.optional and argument.value is not None:
                    call(calling, "sound", **{name: None})


def test_unsound_arguments_are_refused_by_name(callings):
    wrong = [
        f"{where}: {name}={value!r}: {found}"
        for where, calling in callings.items()
        for name, argument in calling.arguments.items()
        for value in argument.junk
        if (found := outcome(calling, name, value))
    ]
    assert not wrong, "\n".join(text[:300] for text in wrong)


def test_no_argument_is_left_out(callings):
    for where, calling in callings.items():
        known = inspect.signature(calling.call).parameters.values()
        names = {p.name for p in known if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - UNCHECKED.get(where, set())
        assert names <= calling.arguments.keys(), where


UNCHECKED = {
    "Domain": {"sparse_idx"},  # what CVXPY gives
    "ChannelFactor": {"background"},  # of the other noise, see "ChannelFactor poisson"
    "environment.reset": {"options"},  # gymnasium's, ignored
}
"""Arguments without unsound values."""


def test_a_misspelt_option_is_refused_by_name(callings):
    for calling in callings.values():
        COUNTS["misspelt"] = COUNTS.get("misspelt", 0) + 1
        arguments = {name: a.sound() for name, a in calling.arguments.items() if a.sound() is not OMITTED}
        with pytest.raises((ConvexLearnError, TypeError), match="mispelt"):
            calling.call(**arguments, mispelt=3)


@pytest.mark.parametrize(
    "words",
    [
        ["show", "misspelt"],
        ["tune", "lqr", "--steps", "0"],
        ["tune", "lqr", "--steps", "x"],
        ["tune", "lqr", "--set", "misspelt=3"],
        ["tune", "lqr", "--set", "horizon"],
        ["tune", "lqr", "--seed", "x"],
        ["tune", "lqr", "--json", "."],
        ["evaluate", "lqr", "nowhere.pt"],
        ["evaluate", "lqr", "--load", "."],
        ["evaluate", "lqr", "a", "--load", "b"],
        ["evaluate", "lqr", "--plot", "file.txt"],
        ["misspelt"],
        [],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_misuse(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("")
    COUNTS["command line"] = COUNTS.get("command line", 0) + 1
    try:
        code = main(words)
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 2
    said = capsys.readouterr().err
    assert said.strip()
    assert "Traceback" not in said


DOCUMENTED = (simulate, plants, objectives, networks, flows, prox, report, interop, reinforcement)
"""Modules whose names are public beside those of the package itself, as in the documentation."""

EXCEPTED = {
    "Bijection": "a base class",
    "ChainFactors": "a named tuple, which log_marginals and best_path check",
    "Diagnosis": "what diagnose returns",
    "Episodes": "what EnvironmentRollouts returns",
    "FiniteSimulator": "a protocol",
    "GainSignals": "a named tuple, which RecurrentGain checks",
    "Holdings": "a named tuple, which Portfolio checks",
    "LayerSolution": "what ConvexLayer.solve returns",
    "Noise": "a named tuple, which LinearGaussian checks",
    "Proximal": "a record of a map and its value, each a subject",
    "ProximalTerm": "a named tuple, which ProximalGradient checks",
    "QuadraticInterface": "called by cvxpylayers, which checks the arguments: test_interop",
    "Role": "an enum",
    "Simulator": "a protocol",
    "Split": "what split returns",
    "Status": "an enum",
    "VehicleNoise": "a named tuple, which Vehicle checks",
    "errors": "the module of the exceptions",
    **dict.fromkeys(
        ("blame", "check_objective", "judge", "maximizes", "objective_name"), "called by tune and evaluate"
    ),
    **dict.fromkeys(("initialise", "mlp", "real_nvp"), "make networks; their options are among the refused calls"),
    **dict.fromkeys(("principal_component_pursuit", "robust_pca", "split"), "declare problems; see ISTA and others"),
    **dict.fromkeys(("flows", "networks", "objectives", "simulate", "plants"), "a module, whose names are listed here"),
}
"""Public names that are no subject, and why."""


def test_every_public_name_is_a_subject_or_excepted():
    keys = {*subjects(), *fuzz_rules.subjects(), *(key for make in MAKERS.values() for key in make()), *functions()}
    heads = {re.split(r"[ .(]", key)[0] for key in keys} | keys
    names = {name: name for name in cl.__all__}
    for module in DOCUMENTED:
        names |= {f"{module.__name__.rpartition('.')[2]}.{name}": name for name in public(module)}
    known = heads | EXCEPTED.keys()
    missing = {full for full, name in names.items() if not {full, name} & known}
    assert not missing
    assert not EXCEPTED.keys() - set(names.values()), "excepted, but not public"
