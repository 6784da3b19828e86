"""Other ecosystems: cvxpylayers both ways, Lightning, deepinv's operators."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from cvxpylayers.torch import CvxpyLayer
from quadratic_cases import FAMILIES

from convexlearn import ConvexLayer, ConvexRule, evaluate, tune
from convexlearn.errors import CompileError, OptionError, SolverError
from convexlearn.interop import QuadraticInterface, physics_matrix
from convexlearn.objectives import squared_error
from convexlearn.simulate.pairs import Pairs


def family(name, shared, batch=4):
    problem, parameters = FAMILIES[name]()
    rng = np.random.default_rng(0)
    values = []
    for p in parameters:
        shape = p.shape if p.name() in shared else (batch, *p.shape)
        value = rng.standard_normal(shape)
        values.append(torch.tensor(np.abs(value) + 0.1 if p.is_nonneg() else value))
    return problem, parameters, values


@pytest.mark.parametrize("shared", [(), ("A", "B", "Q", "H", "rho", "F")])
@pytest.mark.parametrize("name", FAMILIES)
def test_agrees_with_our_own_layer(name, shared):
    problem, parameters, values = family(name, shared)
    variables = problem.variables()
    layers = (
        CvxpyLayer(problem, parameters, variables, solver=QuadraticInterface()),
        ConvexLayer(problem, parameters, variables, solver="quadratic"),
    )
    found = []
    for layer in layers:
        leaves = [v.clone().requires_grad_() for v in values]
        outputs = layer(*leaves)
        loss = sum(torch.sin(torch.arange(o.numel()).double()).reshape(o.shape).mul(o).sum() for o in outputs)
        found.append((*outputs, *torch.autograd.grad(loss, leaves)))
    for ours, own in zip(*found):
        torch.testing.assert_close(ours, own, rtol=1e-8, atol=1e-8)


def test_equal_values_of_a_batched_parameter_keep_their_own_gradients():
    problem, parameters, values = family("norm_inf", ("A", "B", "Q"))
    A = values[0].expand(4, -1, -1).clone().requires_grad_()
    layer = CvxpyLayer(problem, parameters, problem.variables(), solver=QuadraticInterface())
    batched = torch.autograd.grad(layer(A, *values[1:])[0][:, 0].sum(), A)[0]
    for k in range(4):
        single = values[0].clone().requires_grad_()
        loss = layer(single, *values[1:3], values[3][k])[0][0].sum()
        torch.testing.assert_close(batched[k], torch.autograd.grad(loss, single)[0], rtol=1e-9, atol=1e-9)


def test_duals_and_float32():
    x, t = cp.Variable(3), cp.Parameter(3, name="t")
    constraint = x >= 0
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [constraint])
    layer = CvxpyLayer(problem, [t], [x, constraint.dual_variables[0]], solver=QuadraticInterface())
    value = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    x_, dual = layer(value)
    torch.testing.assert_close(x_.float(), torch.tensor([1.0, 0.0, 0.5]))  # cvxpylayers widens on the CPU
    torch.testing.assert_close(dual.float(), torch.tensor([0.0, 4.0, 0.0]))
    dual.sum().backward()
    torch.testing.assert_close(value.grad, torch.tensor([0.0, -2.0, 0.0]))


def test_options_are_the_solvers():
    problem, parameters, values = family("portfolio", ())
    layer = CvxpyLayer(problem, parameters, problem.variables(), solver=QuadraticInterface())
    layer(*values, solver_args={"path": "lanes", "threads": 1})
    with pytest.raises(OptionError, match="unknown option 'pth'; did you mean 'path'"):
        layer(*values, solver_args={"pth": "lanes"})


def test_failures_name_the_samples():
    x, low = cp.Variable(), cp.Parameter(name="low")
    problem = cp.Problem(cp.Minimize(cp.square(x)), [x >= low, x <= 1])
    layer = CvxpyLayer(problem, [low], [x], solver=QuadraticInterface())
    with pytest.raises(SolverError, match="1 of 3 samples have no solution: 1 INFEASIBLE"):
        layer(torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64))


def test_misuse_is_named():
    x, t = cp.Variable(3), cp.Parameter(3, name="t")
    interface = QuadraticInterface()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)))
    CvxpyLayer(problem, [t], [x], solver=interface)
    with pytest.raises(OptionError, match="belongs to another layer"):
        CvxpyLayer(problem, [t], [x], solver=interface)
    cone = cp.Problem(cp.Minimize(cp.norm(x - t)))
    with pytest.raises(CompileError, match="cones of kind soc"):
        CvxpyLayer(cone, [t], [x], solver=QuadraticInterface())


def policy():
    """A rule whose parameter rho is to be learned."""
    s, x = cp.Variable(3, name="s"), cp.Parameter(3, name="x")
    rho = cp.Parameter(nonneg=True, name="rho", value=0.2)
    return ConvexRule(cp.Problem(cp.Minimize(cp.sum_squares(s - x) + rho * cp.norm1(s))), [x], s)


def test_a_cvxpylayers_layer_is_a_rule_that_is_tuned_like_ours():
    """The layer, wrapped in a module that holds its parameter, in tune, evaluate, and as features of a ConvexRule."""
    u, x, rho = cp.Variable(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(u - x) + rho * cp.norm1(u)))
    layer = CvxpyLayer(problem, [x, rho], [u], solver=QuadraticInterface())

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rho = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

        def forward(self, x):
            return layer(x, self.rho)[0]

    x = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(x, torch.sign(x) * (x.abs() - 0.5).clamp(min=0))
    rules = [Wrapped(), policy()]
    given = {"steps": 1, "optimizer": torch.optim.SGD, "clip": None, "progress": False}
    histories = [tune(rule, pairs, squared_error, **given) for rule in rules]
    losses = [history[0]["loss"] for history in histories]
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert float(rules[0].rho.detach()) > 0.2
    assert float(rules[1].rho.detach()) > 0.2
    scores = [evaluate(rule, pairs, squared_error).mean for rule in rules]
    assert all(score < loss for score, loss in zip(scores, losses))

    s, y = cp.Variable(3), cp.Parameter(3, name="y")
    inside = ConvexRule(cp.Problem(cp.Minimize(cp.sum_squares(s - y)), [s >= 0]), [y], s, features=Wrapped())
    inside(x).sum().backward()
    assert inside.features.rho.grad is not None
    torch.testing.assert_close(inside(x), Wrapped()(x).clamp(min=0), atol=1e-8, rtol=0)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:The '.*dataloader:UserWarning")  # Lightning's
def test_a_rule_trains_unchanged_inside_lightning(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")
    x = torch.randn(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(x, torch.sign(x) * (x.abs() - 0.5).clamp(min=0))

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.rule = policy()

        def training_step(self, batch, number):
            return (self.rule(batch[0]) - batch[1]).square().sum(1).mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

    task = Task()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=150, accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=32))
    assert float(task.rule.rho.detach()) == pytest.approx(1.0, abs=0.02)  # 2 (s - x) + rho sign(s) = 0: 0.5 less for 1
    trainer.save_checkpoint(tmp_path / "task.ckpt", weights_only=True)
    again = Task()
    again.load_state_dict(torch.load(tmp_path / "task.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(again.rule.rho, task.rule.rho)


class Blur:
    """deepinv's contract of a linear operator: images (B, C, h, w), A and A_adjoint with keyword arguments."""

    kernel = torch.tensor([[0.0, 0.2, 0.1], [0.1, 0.4, 0.0], [0.0, 0.2, 0.0]], dtype=torch.float64)[None, None]

    def A(self, x, **kwargs):
        return torch.nn.functional.conv2d(x, self.kernel.to(x), padding=1)[..., ::2, :]

    def A_adjoint(self, y, **kwargs):
        wide = y.new_zeros(len(y), 1, 2 * y.shape[2], y.shape[3])
        wide[..., ::2, :] = y
        return torch.nn.functional.conv_transpose2d(wide, self.kernel.to(y), padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_matrix_of_an_operator_by_deepinv_s_contract(dtype):
    like = torch.empty(0, dtype=dtype)
    H = physics_matrix(Blur(), (1, 4, 5), like=like)
    x = torch.randn(3, 1, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    torch.testing.assert_close(x.flatten(1) @ H.mT, Blur().A(x).flatten(1))
    assert H.shape == (10, 20)


def test_a_rule_on_an_operator_by_deepinv_s_contract():
    H = physics_matrix(Blur(), (1, 4, 4))
    s, y = cp.Variable(16), cp.Parameter(8, name="y")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(y - H.numpy() @ s) + 0.1 * cp.sum_squares(s)))
    rule = ConvexRule(problem, context=[y], decision=s)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    measured = Blur().A(x).flatten(1)
    ridge = measured @ H @ torch.linalg.inv(H.mT @ H + 0.1 * torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(rule(measured), ridge)


def test_operators_without_a_matrix_are_refused():
    class Squares(Blur):
        def A(self, x, **kwargs):
            return super().A(x) ** 2

    class Wrong(Blur):
        def A_adjoint(self, y, **kwargs):
            return 2 * super().A_adjoint(y)

    with pytest.raises(OptionError, match=r"Squares\.A is not linear"):
        physics_matrix(Squares(), (1, 4, 4))
    with pytest.raises(OptionError, match=r"Wrong\.A_adjoint is not the adjoint"):
        physics_matrix(Wrong(), (1, 4, 4))
