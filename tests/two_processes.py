"""What tests/test_distributed.py runs in one process and in two: `python two_processes.py FOLDER RANK SIZE`."""

import contextlib
import sys
import warnings
from pathlib import Path

import cvxpy as cp
import torch
import torch.distributed as dist

import convexlearn as cl
from convexlearn import distributed
from convexlearn.errors import WorkerError
from convexlearn.objectives import cost, squared_error
from convexlearn.simulate.channel import Channel
from convexlearn.simulate.closed_loop import ClosedLoop


def pairs(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, dtype=torch.float64, generator=draw)
    return cl.simulate.Pairs(x, x @ torch.randn(3, 2, dtype=torch.float64, generator=draw))


class Affine(cl.AffineRule):
    """Fails where x_1 is above a bound."""

    bound = float("inf")

    def forward(self, *x):
        s = super().forward(*x)
        return torch.where(x[0][:, :1] > self.bound, torch.nan, s)


def affine(bound=float("inf")):
    rule = Affine(torch.full((2, 3), 0.1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    rule.bound = bound
    return rule


def loop():
    def noise(batch, t, generator):
        return 0.1 * torch.randn(batch, 2, dtype=torch.float64, generator=generator)

    def initial(batch, generator):
        return torch.randn(batch, 2, dtype=torch.float64, generator=generator)

    return ClosedLoop(lambda z, u, w: 0.9 * z + u + w, 4, initial=initial, noise=noise, stage_cost=stage)


def stage(z, u):
    return (z.square() + u.square()).sum(1)


def gain(trajectory):
    return -squared_error(trajectory)


gain.maximize = True


class Unsharded:
    """A simulator without `part`: everybody simulates everything."""

    def __call__(self, rule, batch_size=None, generator=None):
        x = torch.randn(batch_size, 3, dtype=torch.float64, generator=generator)
        return cl.simulate.Pairs(x, x[:, :2])(rule)


def feedback():
    return cl.AffineRule(torch.full((2, 2), -0.1, dtype=torch.float64))


def lista(dtype):
    """Three layers with free matrices."""
    A = pairs(4).x.numpy()
    s, x = cp.Variable(3), cp.Parameter(4, name="x")
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - A @ s) + 0.1 * cp.norm1(s)))
    return cl.Unfolded(cl.ISTA(cl.split(problem, [x], s)).free("W1", "W2"), 3, untie=["threshold"]).to(dtype)


def sparse(dtype):
    draw = torch.Generator().manual_seed(2)
    s = torch.randn(40, 3, dtype=torch.float64, generator=draw) * (torch.rand(40, 3, generator=draw) < 0.4)
    return cl.simulate.Pairs((s @ pairs(4).x.mT).to(dtype), s.to(dtype))


def quiet(rule, simulator, objective, **options):
    """A tuned rule's parameters and history."""
    given = {"steps": 5, "learning_rate": 0.1, "progress": False, **options}
    history = cl.tune(rule, simulator, objective, **given)
    return {"weights": [p.detach() for p in rule.parameters()], "history": history.to_dict()}


def step(rule, simulator, objective, **options):
    """One step of plain gradient descent: the change of the parameters is the gradient."""
    sgd = lambda groups: torch.optim.SGD(groups)  # noqa: E731
    return quiet(rule, simulator, objective, steps=1, learning_rate=1.0, clip=None, optimizer=sgd, **options)


def penalty(rule):
    return 0.3 * rule.W.square().sum()


def lbfgs(groups):
    return torch.optim.LBFGS(groups, max_iter=4, line_search_fn="strong_wolfe")


def momentum(groups):
    return torch.optim.SGD(groups, momentum=0.9)


def outcomes():
    """By name, what must not depend on the number of processes."""
    data, valid = pairs(11), pairs(9, 1)
    yield "whole", step(affine(), data, squared_error)
    yield "batch", step(affine(), data, squared_error, batch_size=7)
    yield "one sample", step(affine(), data, squared_error, batch_size=1)
    yield "regularizer", step(affine(), data, squared_error, regularizer=penalty)
    yield "maximize", step(affine(), data, gain)
    yield "failed samples", step(affine(0.8), data, squared_error)
    yield "closed loop", step(feedback(), loop(), cost, batch_size=5)
    yield "no part", step(affine(), Unsharded(), squared_error, batch_size=5)
    yield "momentum", quiet(affine(), data, squared_error, optimizer=momentum, batch_size=3)
    yield "lbfgs", quiet(affine(), data, squared_error, optimizer=lbfgs, steps=2)
    yield "unfolded", quiet(lista(torch.float64), sparse(torch.float64), squared_error, batch_size=9, steps=40)
    yield "single precision", step(lista(torch.float32), sparse(torch.float32), squared_error, batch_size=9)
    yield "proximal", quiet(affine(), data, squared_error, optimizer=cl.ProximalGradient, clip=None)
    yield "patience", quiet(affine(), data, squared_error, validation=valid, patience=2, learning_rate=1.0, steps=40)
    with warnings.catch_warnings(action="ignore"):
        s = cl.evaluate(affine(0.8), valid, {"a": squared_error, "b": gain}, batch_size=4)
    yield "evaluate", {k: [e.values, e.mean, e.standard_error, e.failed] for k, e in s.items()}
    yield "evaluate loop", [cl.evaluate(feedback(), loop(), cost, samples=7, batch_size=3).values]
    channel = Channel(taps=torch.tensor([1.0, 0.5], dtype=torch.float64), length=4, deviation=0.1, estimate=0.1)
    blocks = cl.evaluate(lambda x, taps: x, channel, lambda t: t.decision.square().sum(1), samples=3)
    yield "evaluate channel", [blocks.values, blocks.mean]


def broken(rank, folder):
    """A run in which the last process fails at step 4, and the same run resumed and uninterrupted."""
    calls = []

    def objective(trajectory):
        calls.append(None)
        if objective.fails and rank == 1 and len(calls) == 5:
            raise ZeroDivisionError("worker's own")
        return squared_error(trajectory)

    def run(path=None, fails=False):
        objective.fails = fails
        calls.clear()
        rule = affine()
        result = quiet(rule, pairs(11), objective, steps=8, batch_size=4, checkpoint=path)
        return [result["history"], result["weights"]]

    whole, error = run(), None
    try:
        run(folder / "run.pt", fails=True)
    except (ZeroDivisionError, WorkerError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    dist.barrier()  # the first process has written
    at = torch.load(folder / "run.pt", weights_only=True)["step"]
    dist.barrier()
    return {"whole": whole, "error": error, "step": at, "resumed": run(folder / "run.pt")}


def main(folder, rank, size):
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = dict(outcomes())
    found["warnings"] = [str(w.message) for w in caught if issubclass(w.category, cl.errors.FailureWarning)]
    if size > 1:
        found["broken"] = broken(rank, folder)
        found["first"] = distributed.first()
    torch.save(found, folder / f"{size}-{rank}.pt")
    if size > 1:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
