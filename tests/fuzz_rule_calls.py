"""Arguments of rules and layers, for the tests that give them unsound ones."""

from dataclasses import replace
from typing import Any

import cvxpy as cp
import torch
from fuzz_arguments import (
    OMITTED,
    Argument,
    Calling,
    calling,
    choice,
    count,
    flag,
    function,
    names,
    number,
    seed,
    shape,
    tensor,
    thing,
)
from fuzz_subjects import A, B, C, I, box, lasso, normal
from torch import Tensor, nn

import convexlearn as cl
from convexlearn import networks
from convexlearn.rules.iterative import iterate_loss

X = normal(4, 3, seed=11)
WEIGHTS = normal(2, 3, seed=12)
R = I[:1, :1]
ROW = torch.ones(2).double()


def affine() -> cl.AffineRule:
    """A small rule."""
    return cl.AffineRule(WEIGHTS, ROW)


def declared() -> dict[str, Any]:
    """Parts of a CVXPY problem: minimize |s - x|^2 / 2 + rho |s|_1, |s| <= 5."""
    s, x = cp.Variable(3, name="s"), cp.Parameter(3, name="x")
    rho = cp.Parameter(nonneg=True, name="rho", value=0.2)
    constraints = [cp.abs(s) <= 5]
    cost = 0.5 * cp.sum_squares(s - x) + rho * cp.norm1(s)
    problem = cp.Problem(cp.Minimize(cost), constraints)
    return {"s": s, "x": x, "rho": rho, "problem": problem, "constraints": constraints}


def plain_rules() -> dict[str, Calling]:
    """Rules of types T1, T2 and T5."""
    return {
        "AffineRule": calling(
            cl.AffineRule,
            W=tensor(WEIGHTS),
            b=tensor(ROW, torch.ones(3), optional=True),
            shape=shape((2, 1), (7, 11), optional=True),
        ),
        "AffineRule.fit": calling(
            cl.AffineRule.fit,
            x=tensor(X, X[:0], X[:2], word="x|contexts"),
            s=tensor(X[:, :2], X[:0], X[:2], word="s|decisions"),
            ridge=number(0.1, least=0.0),
            intercept=flag(True),
        ),
        "TreeRule": calling(
            cl.TreeRule,
            decisions=Argument(X, (None, "x", object(), {"x": 1}, [["a"], [1]], X * 1j, X[:0], X * torch.nan, 3.0)),
            inputs=count(4),
            depth=count(2, word="depth"),
            splits=choice("axis"),
            temperature=number(1.0, least=0.0),
            learn_decisions=flag(True),
            seed=seed(),
        ),
        "TreeRule.anneal": calling(
            lambda factor, least: cl.TreeRule(X, 3).anneal(factor, least),
            factor=number(0.9, least=0.0),
            least=number(0.1, least=0.0),
        ),
        "NeuralRule": calling(cl.NeuralRule, network=thing(networks.mlp(3, 2)), shape=shape((2,), optional=True)),
        "as_rule": calling(cl.as_rule, rule=function(torch.sin, nn.Linear)),
        "learn": calling(
            lambda name: affine().learn(name),
            name=Argument("W", ("misspelt", None, 3, object(), ["W"]), word="parameter"),
        ),
        "freeze": calling(
            lambda name: affine().freeze(name),
            name=Argument("W", ("misspelt", None, 3, object(), ["W"]), word="parameter"),
        ),
        "value": calling(
            lambda name: affine().value(name),
            name=Argument("W", ("misspelt", None, 3, object(), ["W"]), word="parameter"),
        ),
        "assign": calling(
            lambda name, value: affine().assign(name, value),
            name=Argument("W", ("misspelt", None, 3, object(), ["W"]), word="parameter"),
            value=tensor(WEIGHTS, X, word="parameter 'W'"),
        ),
    }


def convex_rules() -> dict[str, Calling]:
    """Rules and layers that declare a CVXPY problem."""
    parts = declared()
    s, x, rho, problem = (parts[k] for k in ("s", "x", "rho", "problem"))
    other = cp.Parameter(3, name="other", value=[1.0, 2.0, 3.0])
    options: dict[str, Argument] = {
        "solver": Argument("quadratic", ("misspelt", 3, object(), ["quadratic"], nn.Linear)),
        "on_failure": choice("nan"),
    }
    layer_only = {
        "gp": flag(False),
        "verbose": flag(False),
        "canon_backend": choice("SCIPY", optional=True),
        "fallback": Argument(None, ("x", object(), {"x": 1}, [["a"], [1]], torch.ones(7))),
        "solver_args": Argument(
            {}, (3, "x", object(), {"misspelt": 1}, {"tolerance": "x"}, {"max_iterations": -1}, [1]), word="solver"
        ),
        "check": flag(False),
    }
    split = cl.split(lasso())
    return {
        "ConvexLayer": calling(
            cl.ConvexLayer,
            problem=thing(problem, cp.Problem(cp.Minimize(cp.sqrt(s[0]))), word="problem|DCP"),
            parameters=thing([x, rho], [x], [x, rho, other], [x, x], [x, 3], word="parameters?"),
            variables=thing([s], [other], [3], [None], [cp.Variable(2)], word="variables?"),
            **options,
            **layer_only,
        ),
        "ConvexRule": calling(
            cl.ConvexRule,
            problem=thing(problem, cp.Problem(cp.Minimize(cp.sqrt(s[0]))), word="problem|DCP|context"),
            context=thing([x], other, [3], [x, x], [None]),
            decision=thing(s, [other], [3], [], cp.Variable(2), word="decision|[Vv]ariables?"),
            learn=names(["rho"], optional=True),
            features=function(None, optional=True),
            gp=flag(False),
            check=flag(False),
            fallback=Argument(None, ("x", object(), {"x": 1}, [["a"], [1]], torch.ones(7))),
            **options,
        ),
        "ConvexRule options": calling(
            lambda **given: cl.ConvexRule(problem, [x], s, check=False, **given),
            tolerance=number(1e-9, above=0.0),
            max_iterations=count(50, optional=True),
        ),
        "FeasibleRule": calling(
            cl.FeasibleRule,
            network=function(networks.mlp(3, 3)),
            constraints=thing([cp.abs(s) <= x], [], [3], [True], [cp.abs(s) >= x], word="constraints?"),
            decision=thing(s, [other], [3], [], word="decision|[Vv]ariables?|affine"),
            context=thing([x], other, [3], [None], word="context"),
            free=thing(None, 3.0, cp.sum_squares(s), optional=True, word="free|affine"),
            weight=Argument(None, ("x", object(), -1.0, 0.0, float("nan"), torch.ones(7), 1j, [[1.0]])),
            features=function(None, optional=True),
            fallback=Argument(None, ("x", object(), {"x": 1}, [["a"], [1]], torch.ones(7))),
            **options,
        ),
        "Unfolded": calling(
            cl.Unfolded,
            iteration=thing(cl.ISTA(split), split),
            layers=count(3),
            untie=names(["step"], word="untie|slot"),
            learn=names(["threshold"], word="learn|slot"),
        ),
        "Unfolded.truncated": calling(lambda layers: cl.Unfolded(cl.ISTA(split), 3).truncated(layers), layers=count(2)),
        "Converged": calling(
            cl.Converged,
            iteration=thing(cl.ISTA(split), split),
            tol=number(1e-6, above=0.0),
            max_iterations=count(100),
            gradient=choice("unroll"),
            learn=names(["rho"], optional=True, word="learn|slot"),
        ),
        "diagnose": calling(
            lambda layer, x, u, step, seed: cl.diagnose(layer, x, u, step=step, seed=seed),
            layer=thing(box(), lasso(), torch.sin),
            x=Argument(X.new_ones(4), (None, "x", object(), torch.ones(3), torch.ones(4) * 1j), word="'t'|parameter 0"),
            u=Argument(X.new_ones(4), (None, "x", object(), torch.ones(3), -torch.ones(4)), word="'u'|parameter 1"),
            step=number(1e-5, above=0.0),
            seed=seed(),
        ),
        "Domain": calling(
            cl.Domain.from_attributes,
            shape=Argument((2, 2), (None, "x", 3.5, object(), (-1, -1), ("a",), (1.5,), 2)),
            attributes=Argument(
                {"PSD": True},
                (
                    3,
                    "x",
                    object(),
                    {"misspelt": True},
                    {"boolean": True},
                    {"bounds": 3},
                    {"bounds": [1, 0]},
                    {"bounds": "xy"},
                    {"PSD": True, "diag": True},
                ),
                word="attributes?|bounds|structure",
            ),
        ),
        "adp": calling(
            cl.adp,
            A=tensor(A, torch.ones(3, 3)),
            B=tensor(B, torch.ones(3, 1)),
            R=tensor(R, -R, torch.ones(3, 3)),
            S=tensor(I, torch.ones(2, 3)),
            q=tensor(ROW, torch.ones(3), optional=True),
            limit=Argument(0.5, ("x", object(), -1.0, float("nan"), torch.ones(5), (1.0, -1.0), 1j, (1.0, 2.0, 3.0))),
            constraints=function(lambda u, y: [u <= 1], lambda u, y: 3, lambda u, y: [3], optional=True),
            learn=names(["S"]),
        ),
        "mpc": calling(
            cl.mpc,
            A=tensor(A, torch.ones(3, 3)),
            B=tensor(B, torch.ones(3, 1)),
            Q=tensor(I, -I, torch.ones(3, 3)),
            R=tensor(R, -R, torch.ones(3, 3)),
            horizon=count(2),
            terminal=tensor(I, -I, torch.ones(3, 3), optional=True),
            input_limit=Argument(0.5, ("x", object(), -1.0, float("nan"), torch.ones(5), (1.0, -1.0), 1j)),
            state_limit=Argument(9.0, ("x", object(), -1.0, float("nan"), torch.ones(5), (1.0, -1.0), 1j)),
            soft=number(10.0, above=0.0, optional=True),
            forecast=tensor(torch.ones(2, 1).double(), torch.ones(3, 1), optional=True),
            learn=names(["Q"]),
        ),
    }


def filters() -> dict[str, Calling]:
    """Rules of state-space models and of chains."""
    three, wrong = torch.eye(3).double(), torch.ones(3, 3).double()
    model = {"A": tensor(A, wrong), "C": tensor(C, wrong)}
    noise = {"V": tensor(I, -I, three), "W": tensor(I, -I, three)}
    weights = {"Q": tensor(I, -I, three), "R": tensor(R, -R, three)}
    inputs = {"B": tensor(B, wrong)}
    horizon = {
        "horizon": replace(count(3, optional=True), optional=False),
        "terminal": tensor(I, -I, three, optional=True),
    }
    slots = {"features": function(None, optional=True), "correction": function(None, optional=True)}
    gain = Argument(None, ("x", object(), {"x": 1}, 1j * I, three, torch.sin))
    kalman = cl.KalmanFilter(A, B, C, I, I)
    sequence, state = normal(3, 5, 2), normal(3, 2)
    run = {
        "x": tensor(sequence, sequence[:, :0], sequence[..., :1], sequence[0], sequence / 0, finite=False),
        "inputs": tensor(normal(3, 5, 1), normal(2, 5, 1), normal(3, 2, 1), optional=True),
        "state": tensor(state, normal(2, 2), normal(3, 3), optional=True),
        "covariance": tensor(I, three, -I, optional=True),
    }
    step = tensor(state, normal(3, 3), normal(3), finite=False, word="x")
    belief = thing(None, optional=True)
    lqr, lqg = cl.LQR(A, B, I, R), cl.LQG(A, B, C, I, R, I, I)
    channel = torch.tensor([1.0, 0.5]).double()
    found = {
        "LQR": calling(cl.LQR, **{"A": model["A"]}, **inputs, **weights, **horizon),
        "LQR.average_cost": calling(lqr.average_cost, V=tensor(I, three, -I)),
        "LQR.start": calling(lqr.start, x=tensor(state, normal(3, 3), normal(2), finite=False, word="z")),
        "LQR.decide": calling(
            lqr.decide, x=tensor(state, normal(3, 3), normal(2), finite=False, word="z"), memory=belief
        ),
        "LQG": calling(
            cl.LQG, **model, **inputs, **weights, **noise, **horizon, covariance=tensor(I, -I, three, optional=True)
        ),
        "LQG.average_cost": calling(
            lqg.average_cost, V=tensor(I, three, -I, optional=True), W=tensor(I, three, -I, optional=True)
        ),
        "LQG.start": calling(lqg.start, x=step, state=tensor(state, normal(2, 2), normal(3, 3), optional=True)),
        "LQG.decide": calling(lqg.decide, x=step, memory=belief),
        "KalmanFilter": calling(
            cl.KalmanFilter, **model, B=tensor(B, wrong, optional=True), **noise, gain=gain, **slots
        ),
        "KalmanFilter()": calling(kalman, **run),
        "KalmanFilter.moments": calling(kalman.moments, **run),
        "KalmanFilter.start": calling(kalman.start, x=step, state=run["state"], covariance=run["covariance"]),
        "KalmanFilter.decide": calling(kalman.decide, x=step, memory=belief),
        "ExtendedKalmanFilter": calling(
            cl.ExtendedKalmanFilter,
            f=function(torch.sin),
            h=function(torch.clone),
            V=tensor(I, -I),
            W=tensor(I, -I),
            gain=Argument(None, ("x", object(), {"x": 1}, 1j * I, torch.sin)),
            **slots,
        ),
        "ExtendedKalmanFilter()": calling(
            cl.ExtendedKalmanFilter(lambda z, s=None: torch.sin(z), torch.clone, I, I), **run
        ),
        "KalmanSmoother": calling(
            cl.KalmanSmoother,
            **model,
            **noise,
            state=tensor(ROW, torch.ones(3), optional=True),
            covariance=replace(tensor(I, -I, three, optional=True), optional=False),
            decision=choice("observation"),
        ),
        "OutputFeedback": calling(
            cl.OutputFeedback,
            estimator=thing(kalman, lqr, cl.KalmanFilter(A, None, C, I, I), word="estimator|KalmanFilter"),
            policy=function(lqr, word="policy|rule"),
        ),
        "OutputFeedback.decide": calling(cl.OutputFeedback(kalman, lqr).decide, x=step, memory=belief),
        "OutputFeedback.start": calling(
            cl.OutputFeedback(kalman, lqr).start, x=step, state=run["state"], covariance=run["covariance"]
        ),
        "RecurrentGain": calling(
            cl.RecurrentGain,
            n=count(2),
            p=count(2),
            architecture=Argument(1, (None, "x", 3, 0, True, object(), [1], 1.5)),
            start=tensor(0.3 * I, three, optional=True),
            seed=seed(),
        ),
        "SumProduct": calling(
            cl.SumProduct,
            factor=function(cl.ChannelFactor(channel, 0.5)),
            labels=Argument([0, 1, 0, 1], ("x", 3, object(), [[0, 1]], [1, 2], [0.5, 0.0], ["a"], [-1, 0], [None])),
            initial=Argument(
                torch.zeros(4), ("x", object(), {"x": 1}, [["a"], [1]], 1j * torch.zeros(4), torch.zeros(2, 2))
            ),
            semiring=choice("max"),
        ),
        "SumProduct()": calling(
            lambda factor, labels, initial: cl.SumProduct(factor, labels=labels, initial=initial)(normal(3, 7)),
            factor=Argument(
                cl.ChannelFactor(channel, 0.5),
                (lambda x: None, lambda x: "x", lambda x: x, lambda x: x.sum(), lambda x: (x, x)),
                word="factor|potentials",
            ),
            labels=Argument([0, 1, 0, 1], ([0, 1, 0],)),
            initial=Argument(torch.zeros(4), (torch.zeros(3), torch.full((4,), torch.nan))),
        ),
        "ChannelFactor": calling(
            cl.ChannelFactor,
            taps=Argument(
                channel, (None, "x", object(), {"x": 1}, [["a"], [1]], 1j * channel, 1.0, channel[:0], channel / 0)
            ),
            deviation=Argument(0.5, (None, "x", object(), -1.0, 0.0, float("nan"), float("inf"), 1j, {"x": 1})),
            noise=choice("gaussian", word="noise|deviation"),
            constellation=Argument(
                (-1.0, 1.0), (None, "x", 3, object(), (), (1.0,), ("a", "b"), (1j, 2.0), (float("nan"), 1.0))
            ),
        ),
        "ChannelFactor poisson": calling(
            lambda background: cl.ChannelFactor(channel, noise="poisson", background=background),
            background=Argument(3.0, (None, "x", object(), -1.0, 0.0, float("nan"), 1j)),
        ),
        "LearnedFactor": calling(
            cl.LearnedFactor, network=thing(networks.mlp(1, 4), torch.sin), trellis=thing(cl.Trellis(2, 2), (2, 2))
        ),
        "Trellis": calling(cl.Trellis, symbols=count(2, 2), memory=count(2)),
        "Trellis.states": calling(
            cl.Trellis(2, 2).states,
            labels=Argument(
                torch.tensor([0, 1, 1]),
                (
                    None,
                    "x",
                    3,
                    object(),
                    torch.tensor([0, 1, 5]),
                    torch.tensor([-1, 0, 1]),
                    torch.ones(3),
                    torch.tensor([1]),
                ),
            ),
        ),
    }
    return found


class Average(cl.DecisionRule):
    """A recursive rule of a user's own."""

    def start(self, x: Any) -> Any:
        """No sum yet."""
        return 0

    def decide(self, x: Any, memory: Any = None) -> tuple[Any, Any]:
        """The sum so far."""
        return memory + x, memory + x


def methods() -> dict[str, Calling]:
    """Calls and methods of rules and layers."""
    parts = declared()
    rule = cl.ConvexRule(parts["problem"], [parts["x"]], parts["s"])
    wish = cl.FeasibleRule(networks.mlp(3, 3).double(), [cp.abs(parts["s"]) <= parts["x"]], parts["s"], [parts["x"]])
    layer, ones = box(), torch.ones(3, 4).double()
    memory = thing(None, 3.0, optional=True)
    context = tensor(X.abs(), finite=False, word="x|context|parameter|network")
    sample = replace(context, junk=(*(v for v in context.junk if not isinstance(v, Tensor)), 1j * X, X[:, :2]))
    net = cl.Unfolded(cl.ISTA(cl.split(lasso())), 3, untie=["step"])
    call = {
        "solver_args": Argument(None, (3, "x", object(), {"misspelt": 1}, {"tolerance": "x"}, [1]), word="solver"),
        "warm_start": Argument(False, (3, "x", object(), torch.ones(2), []), word="warm_start"),
    }
    name = Argument("theta", (None, "", "1x", "W", "for", 3, object(), "forward"), word="parameter")
    return {
        "ConvexLayer()": calling(lambda **given: layer(ones, ones, **given), **call),
        "ConvexLayer.solve": calling(lambda **given: layer.solve(ones, ones, **given), **call),
        "ConvexLayer by name": calling(
            lambda **given: layer(t=ones, u=ones, **given), misspelt=Argument(OMITTED, (3, ones), word="misspelt")
        ),
        "ConvexRule.decide": calling(rule.decide, x=sample, memory=memory),
        "FeasibleRule.decide": calling(wish.decide, x=context, memory=memory),
        "FeasibleRule.network_output": calling(lambda x: wish.network_output(x), x=context),
        "DecisionRule": calling(
            lambda x: Average()(x),
            x=Argument(normal(3, 4), (None, "x", object(), {"x": 1}, [["a"]], 1j * X, X[:, :0], normal(3))),
        ),
        "declare": calling(
            lambda **given: affine().declare(**given),
            name=name,
            value=Argument(
                ROW,
                (None, "x", object(), [["a"]], 1j * ROW, torch.ones(3), ROW / 0, torch.sin),
                word="parameter 'theta'",
            ),
            domain=thing(cl.Domain((2,)), optional=True),
            role=thing(cl.Role.HYPER),
            learned=flag(True),
        ),
        "Unfolded.learn": calling(
            lambda name: cl.Unfolded(cl.ISTA(cl.split(lasso())), 3).learn(name),
            name=Argument("step", (None, "misspelt", 3, object(), ["step"]), word="parameter|slot"),
        ),
        "iterate_loss": calling(
            iterate_loss,
            net=thing(net, affine()),
            x=tensor(normal(3, 4), normal(3, 5), finite=False, word="x|context"),
            s=tensor(normal(3, 6), normal(3, 5), finite=False, word="s|targets"),
            weights=tensor(torch.ones(3), torch.ones(2), optional=True),
        ),
        "KalmanFilter().tuple": calling(
            lambda x, s: cl.KalmanFilter(A, B, C, I, I).decide((x, s)),
            x=tensor(normal(3, 2), normal(3, 3), finite=False),
            s=tensor(normal(3, 1), normal(3, 3), normal(2, 1), optional=True, finite=False, word="s"),
        ),
        "LQG.gains": calling(
            lambda horizon: cl.LQG(A, B, C, I, R, I, I, horizon=horizon)(normal(3, 5, 2)), horizon=Argument(5, (4,))
        ),
    }
