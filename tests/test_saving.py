"""Saved rules decide as before, keep what is learned and where; damaged and hostile files are refused."""

import copy
import json
import pickle
import random
import re
import sys

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import nn

import convexlearn as cl
from convexlearn.errors import DomainError, FileError, OptionError
from convexlearn.networks import mlp
from convexlearn.problems import find
from convexlearn.rules.base import as_tuple
from convexlearn.rules.parameters import LearnedParameters, trainable
from convexlearn.saving import _checksum
from convexlearn.simulate.base import FiniteSimulator

safetensors = pytest.importorskip("safetensors")
codec = pytest.importorskip("safetensors.torch")

CATALOGUE = ["admm-recovery", "box-lqr", "kalman-smoother", "lqg", "lqr", "mpc-weights", "sparse-recovery"]


def perturbed(rule):
    """Other values of the trainable parameters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(rule).values():
            parameter.add_(0.05 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return rule


def through_file(rule, folder, **options):
    cl.save(rule, folder / "rule.safetensors")
    return cl.load(folder / "rule.safetensors", **options)


def assert_same_rule(old, new):
    """Same classes, parameters, domains, roles, dtypes, choice of learned ones, and modes."""
    assert [type(m) for m in new.modules()] == [type(m) for m in old.modules()]
    assert [m.training for m in new.modules()] == [m.training for m in old.modules()]
    assert {n: p.requires_grad for n, p in new.named_parameters()} == {
        n: p.requires_grad for n, p in old.named_parameters()
    }
    for a, b in zip(old.modules(), new.modules()):
        if isinstance(a, LearnedParameters):
            assert set(a.learned) == set(b.learned)
            domains = [{n: (d.role, d.domain.describe()) for n, d in m._declared.items()} for m in (a, b)]
            assert domains[0] == domains[1]
            for name in a._declared:
                assert a.value(name).dtype == b.value(name).dtype
                assert torch.equal(a.value(name), b.value(name)), name
    for key, value in old.state_dict().items():
        assert torch.equal(value, new.state_dict()[key])


def decide(rule, simulator):
    few = simulator.subset(torch.arange(3)) if isinstance(simulator, FiniteSimulator) else simulator
    with torch.no_grad():
        return few(rule, None if few is not simulator else 2, torch.Generator().manual_seed(0)).decision


@pytest.mark.parametrize("name", CATALOGUE)
def test_rules_of_the_catalogue_decide_as_before(name, tmp_path):
    entry = find(name)
    study = entry.build(0, entry.setting)
    tried = 0
    for contender in study.contenders.values():
        rule = contender.rule
        if not isinstance(rule, LearnedParameters):
            continue
        own = tuple({type(m) for m in rule.modules() if type(m).__module__.startswith("convexlearn.problems")})
        perturbed(rule.eval())
        cl.save(rule, tmp_path / "rule", classes=own)
        new = cl.load(tmp_path / "rule", classes=own)
        assert_same_rule(rule, new)
        for a, b in zip(as_tuple(decide(rule, study.test)), as_tuple(decide(new, study.test))):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
        tried += 1
    assert tried >= 2


def lasso():
    s, x = cp.Variable(6, name="s"), cp.Parameter(4, name="x")
    H = cp.Parameter((4, 6), name="H", value=np.random.default_rng(0).normal(size=(4, 6)))
    rho = cp.Parameter(nonneg=True, name="rho", value=0.1)
    return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - H @ s) + rho * cp.norm1(s))), x, s


def rules():
    problem, x, s = lasso()
    split = cl.split(problem, context=[x], decision=s)
    eye = torch.eye(2, dtype=torch.float64)
    yield cl.ConvexRule(problem, [x], s, learn=["rho"], solver="quadratic", on_failure="fallback", fallback=0.5)
    yield cl.ConvexRule(problem, [x], [s[0], s], learn=["H"]).float()
    yield cl.ConvexRule(problem, [x], s).learn("rho").freeze("H").eval()
    yield cl.Unfolded(cl.ISTA(split), 4, untie=["step", "threshold"], learn=["rho"])
    yield cl.Unfolded(cl.ISTA(split, step=0.01).free("W1", "W2"), 3, untie=["W1", "W2", "threshold"])
    yield cl.Unfolded(cl.FISTA(split, restart=False), 3, untie=["momentum"]).learn("step")
    yield cl.Unfolded(cl.ISTA(split).replace(prox="relative_norm1"), 3, learn=["threshold"])
    yield cl.Converged(cl.ADMM(split, penalty=0.3), learn=["rho"], tol=1e-8)
    yield cl.Converged(cl.PrimalDual(split), gradient="unroll")
    yield cl.Unfolded(cl.ISTA(split).replace(prox=nn.Sequential(nn.Linear(6, 6).double(), nn.Tanh())), 2)
    yield cl.AffineRule(torch.ones(3, 4), torch.zeros(3), shape=(3, 1))
    yield cl.TreeRule(torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 4, depth=2)
    yield cl.NeuralRule(mlp(4, 2, hidden=(3,), seed=1)).freeze("network.0")
    yield cl.KalmanFilter([[0.9, 0.1], [0.0, 0.9]], None, eye[:1], 0.1 * eye, [[1.0]])
    yield cl.KalmanFilter(eye, eye, eye, gain=0.5 * eye)
    yield cl.OutputFeedback(cl.KalmanFilter(eye, eye, eye, eye, eye), cl.AffineRule(-0.1 * eye))
    yield cl.LQG(eye, eye, eye, eye, eye, eye, eye, horizon=3)
    yield cl.SumProduct(cl.ChannelFactor(torch.tensor([1.0, 0.5], dtype=torch.float64), 0.3))
    yield cl.SumProduct(cl.LearnedFactor(mlp(1, 4, hidden=(5,)), cl.Trellis(2, 2)), labels=[0, 1, 0, 1])


RULES = list(rules())


def context(rule):
    draw = torch.Generator().manual_seed(2)
    shape = {"SumProduct": (3, 7), "KalmanFilter": (3, 5), "LQG": (3, 3, 2), "OutputFeedback": (3, 5, 2)}
    size = shape.get(type(rule).__name__, (3, 4))
    size = (*size, len(rule.C)) if isinstance(rule, cl.KalmanFilter) else size
    return torch.randn(*size, dtype=torch.float64, generator=draw)


@pytest.mark.parametrize("number", range(len(RULES)))
def test_every_kind_of_rule_comes_back(number, tmp_path):
    rule = perturbed(copy.deepcopy(RULES[number]))
    x = context(rule)
    new = through_file(rule, tmp_path)
    assert_same_rule(rule, new)
    for a, b in zip(as_tuple(rule(x)), as_tuple(new(x))):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    names = sorted(trainable(rule))
    if names:
        losses = (sum(s.sum() for s in as_tuple(r(x))) for r in (rule, new))
        weights = ([trainable(r)[name] for name in names] for r in (rule, new))
        gradients = [torch.autograd.grad(loss, w, allow_unused=True) for loss, w in zip(losses, weights)]
        for a, b in zip(*gradients):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
    again = through_file(new, tmp_path)  # a loaded rule is saved like any other
    assert_same_rule(new, again)


def test_robust_pca_comes_back_with_complex_kernels(tmp_path):
    iteration = cl.RobustPCA(cl.robust_pca((12, 5), 0.5, 0.1, is_complex=True))
    kernels = [f"W{k}" for k in range(1, 7)]
    rule = cl.Unfolded(iteration.convolve(*kernels, image=(4, 3)), 2, untie=["threshold", *kernels])
    x = torch.randn(2, 12, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    new = through_file(perturbed(rule), tmp_path)
    assert_same_rule(rule, new)
    for a, b in zip(rule(x), new(x)):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_a_loaded_rule_is_tuned_like_the_saved_one(tmp_path):
    problem, x, s = lasso()
    rule = cl.ConvexRule(problem, [x], s, learn=["rho"])
    new = through_file(rule, tmp_path)
    draw = torch.Generator().manual_seed(0)
    pairs = cl.simulate.Pairs(
        torch.randn(8, 4, dtype=torch.float64, generator=draw), torch.zeros(8, 6, dtype=torch.float64)
    )
    a, b = (cl.tune(r, pairs, cl.objectives.squared_error, steps=3, progress=False) for r in (rule, new))
    assert a == b
    assert new.rho > 0.1


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(4, width)

    def forward(self, v):
        return v + self.layer(v.to(self.layer.weight.dtype)).to(v.dtype)


def test_code_of_networks_is_asked_for_by_name(tmp_path):
    rule = cl.NeuralRule(Net())
    cl.save(rule, tmp_path / "a")
    x = torch.ones(2, 4)
    assert torch.equal(cl.load(tmp_path / "a", network=Net)(x), rule(x))
    assert torch.equal(cl.load(tmp_path / "a", network=Net())(x), rule(x))
    with pytest.raises(FileError, match=r"'network' is a network or function \(Net\) .* network=lambda: network"):
        cl.load(tmp_path / "a")
    with pytest.raises(FileError, match="size mismatch"):
        cl.load(tmp_path / "a", network=lambda: Net(5))
    with pytest.raises(OptionError, match="did you mean 'network'"):
        cl.load(tmp_path / "a", netwrok=Net)


def test_plain_functions_are_asked_for_too(tmp_path):
    problem, x, s = lasso()
    rule = cl.ConvexRule(problem, [x], s, features=lambda z: 2 * z)
    new = through_file(rule, tmp_path, features=lambda: lambda z: 2 * z)
    z = torch.ones(1, 4, dtype=torch.float64)
    torch.testing.assert_close(new(z), rule(z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()])  # rebuilt by load, or asked for
def test_what_the_messages_say_to_write_works(activation, tmp_path):
    network, file, names = nn.Sequential(nn.Linear(2, 3), activation, nn.Linear(3, 1)), tmp_path / "my rule", {"cl": cl}
    with pytest.raises(FileError, match="save takes a rule, got Sequential") as refused:
        cl.save(network, file)
    saving, *loading = re.findall(r"cl\.(?:save|load)\(.*?\'\)|cl\.load\(.*?\)", str(refused.value))
    eval(saving, {**names, "network": network})
    if not loading:
        rule = cl.load(file)
    else:
        with pytest.raises(FileError, match=re.escape(loading[0])):
            cl.load(file)
        fresh = nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 1))
        rule = eval(loading[0], {**names, "network": fresh})
    x = torch.ones(2, 2)
    assert torch.equal(rule(x), network(x))


def test_a_function_is_no_rule(tmp_path):
    with pytest.raises(FileError, match=r"derived from cl\.DecisionRule.*classes="):
        cl.save(lambda x: x, tmp_path / "a")


def test_without_safetensors_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: cl.save(cl.AffineRule(torch.eye(1)), tmp_path / "a"), lambda: cl.load(tmp_path / "a")):
        with pytest.raises(ModuleNotFoundError, match=r"needs safetensors; .*pip install 'convexlearn\[files\]'"):
            call()


class Doubled(cl.DecisionRule):
    def __init__(self, gain):
        super().__init__()
        self.declare("gain", gain)

    def forward(self, *x):
        return 2 * self.gain * x[0]


def test_own_classes_are_named_at_both_ends(tmp_path):
    rule = Doubled(torch.tensor(3.0))
    cl.save(rule, tmp_path / "a", classes=[Doubled])
    assert cl.load(tmp_path / "a", classes=[Doubled]).gain == 3
    with pytest.raises(FileError, match="unknown rule 'Doubled'"):
        cl.load(tmp_path / "a")


class OwnExp(cp.exp):
    """An atom that the table does not know."""


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(FileError, match=r"cl.NeuralRule\(network\)"):
        cl.save(nn.Linear(1, 1), tmp_path / "a")
    v, x = cp.Variable(1), cp.Parameter(1, name="x")
    own = cp.Problem(cp.Minimize(cp.sum_squares(v - x) + cp.sum(OwnExp(v))))
    rule = cl.AffineRule(torch.eye(1))
    rule._arguments = ((own,), {})
    with pytest.raises(FileError, match="OwnExp"):
        cl.save(rule, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    rule = cl.AffineRule(torch.eye(2))
    cl.save(rule, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cl.save(rule, tmp_path / "a")
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == before


@pytest.fixture
def saved(tmp_path):
    problem, x, s = lasso()
    cl.save(cl.Unfolded(cl.ISTA(cl.split(problem, [x], s)), 2, untie=["step"]), tmp_path / "rule")
    return tmp_path / "rule"


def refusals(path, variants):
    """How many of the files that `variants` give are refused with FileError; any other error gets out."""
    count = 0
    for content in variants:
        path.write_bytes(content)
        try:
            cl.load(path)
        except FileError:
            count += 1
    return count


def test_truncated_files_are_refused(saved):
    whole = saved.read_bytes()
    cuts = range(0, len(whole), max(1, len(whole) // 150))
    assert refusals(saved, (whole[:k] for k in cuts)) == len(cuts)


def test_files_with_a_changed_byte_are_refused(saved):
    whole, draw = saved.read_bytes(), random.Random(0)

    def flipped():
        for _ in range(200):
            k = draw.randrange(len(whole))
            yield whole[:k] + bytes([whole[k] ^ (1 << draw.randrange(8))]) + whole[k + 1 :]

    assert refusals(saved, flipped()) == 200


def test_foreign_files_are_refused(saved):
    class Evil:
        def __reduce__(self):
            return pytest.fail, ("code of the file was run",)

    huge = (2**62).to_bytes(8, "little") + b"{}"
    other = codec.save({"a": torch.ones(1)})
    foreign = [b"", b"\0" * 100, pickle.dumps(Evil()), huge, b"{" * 10**5, other, (10**7).to_bytes(8, "little") + b"["]
    assert refusals(saved, foreign) == len(foreign)
    torch.save({"rule": torch.ones(1)}, saved)
    with pytest.raises(FileError):
        cl.load(saved)
    with pytest.raises(FileError, match="no file"):
        cl.load(saved.parent / "absent")


def rewritten(path, change):
    """The file with another declaration and a right checksum, as who means harm would write it."""
    tensors = codec.load(path.read_bytes())
    with safetensors.safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["convexlearn"])
    text = change(content, tensors)
    text = json.dumps(content) if text is None else text
    path.write_bytes(codec.save(tensors, {"convexlearn": text, "sha256": _checksum(text, tensors)}))


HOSTILE = {
    "no JSON": lambda c, t: "{",
    "deep JSON": lambda c, t: "[" * 10**6,
    "another format": lambda c, t: c.update(format="convexlearn 99"),
    "no nodes": lambda c, t: c.pop("nodes") and None,
    "unknown rule": lambda c, t: c["rule"].update(rule=["os.system", ["true"], {}]),
    "a class of Python": lambda c, t: c["rule"].update(rule=["eval", ["1"], {}]),
    "a dunder argument": lambda c, t: c["rule"]["rule"][2].update(__class__=1),
    "a billion layers": lambda c, t: c["rule"]["rule"][2].update(layers=10**9),
    "unknown iteration": lambda c, t: c["rule"]["rule"][2]["iteration"]["iteration"].__setitem__(0, "Iteration"),
    "unknown slot": lambda c, t: c["rule"]["rule"][2]["iteration"]["iteration"][2].update(nothing=1.0),
    "a value too many": lambda c, t: c["changes"]["dict"]["state"]["dict"].update(more={"tensor": "0"}),
    "no state": lambda c, t: c["changes"]["dict"].pop("state") and None,
    "not a number": lambda c, t: [v.fill_(torch.nan) for v in t.values() if v.is_floating_point()] and None,
    "no rule": lambda c, t: c.update(rule=3),
    "a module": lambda c, t: c.update(rule={"module": ["Linear", [10**7, 10**7]]}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_declarations_are_refused(name, saved):
    rewritten(saved, HOSTILE[name])
    with pytest.raises(FileError):
        cl.load(saved)


def places(node, path=()):
    """Paths of all values of a JSON."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def test_random_changes_of_the_declaration_are_refused_or_harmless(saved):
    whole, draw, refused, tried = saved.read_bytes(), random.Random(0), 0, 250
    junk = [None, -1, 10**30, "x", 0.5, [], {}, {"tensor": "0"}, {"tuple": [1]}, {"built": "x"}, True, "sum", [[0]]]

    def change(content, tensors):
        *path, last = draw.choice([p for p in places(content) if p])
        node = content
        for key in path:
            node = node[key]
        node[last] = draw.choice(junk)

    for _ in range(tried):
        saved.write_bytes(whole)
        rewritten(saved, change)
        try:
            assert isinstance(cl.load(saved), cl.Unfolded)
        except FileError:
            refused += 1
    assert refused > tried / 2  # the others changed a text, or a value to a sound one


def test_a_value_outside_its_domain_is_refused(tmp_path):
    problem, x, s = lasso()
    cl.save(cl.ConvexRule(problem, [x], s, learn=["H"]), tmp_path / "a")

    def change(content, tensors):
        node = content["changes"]["dict"]["fixed"]["dict"][""]["dict"]["rho"]
        tensors[node["tensor"]].fill_(-1.0)

    rewritten(tmp_path / "a", change)
    with pytest.raises(FileError, match="rho"):
        cl.load(tmp_path / "a")
    with pytest.raises(DomainError):
        cl.ConvexRule(problem, [x], s, learn=["H"]).rho = -1.0


def test_loading_draws_no_random_numbers(tmp_path):
    cl.save(cl.NeuralRule(mlp(2, 2)), tmp_path / "a")
    before = torch.get_rng_state()
    cl.load(tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())
