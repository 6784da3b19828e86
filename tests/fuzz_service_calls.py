"""Arguments of tuning, files, reports and the catalogue, for the tests that give them unsound ones."""

import tempfile
from pathlib import Path
from typing import Any

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
    number,
    path,
    seed,
    thing,
)
from fuzz_rule_calls import X, affine, lasso
from fuzz_simulator_calls import pairs
from torch import nn

import convexlearn as cl
from convexlearn import interop, reinforcement, report, simulate
from convexlearn.objectives import squared_error
from convexlearn.problems import catalogue
from convexlearn.simulate import plants


def folder() -> Path:
    """A new folder in the present one, which is a test's own."""
    return Path(tempfile.mkdtemp(dir="."))


def saved() -> Path:
    """A saved rule."""
    file = folder() / "rule.safetensors"
    cl.save(affine(), file)
    return file


class Halve:
    """An operator by deepinv's contract."""

    def A(self, x: Any, **options: Any) -> Any:
        """Every other column, halved."""
        return x[..., ::2] / 2


class Trained:
    """What AgentRule reads of an agent."""

    policy = nn.Identity()


def services() -> dict[str, Calling]:
    """Tuning, judging, files, reports and other ecosystems."""
    simulator = Argument(pairs(), (None, "x", 3, object(), X, nn.Linear), word="simulator")
    objective = Argument(
        squared_error,
        (None, "x", 3, object(), nn.Linear, lambda: 3, lambda t: None, lambda t: 3.0, lambda t: t.decision),
        word="objective",
    )
    rate = Argument(
        0.1,
        (
            None,
            "x",
            -1.0,
            float("nan"),
            float("inf"),
            object(),
            1j,
            True,
            {"misspelt": 0.1},
            {"W": "x"},
            lambda k: "x",
            lambda k: -1.0,
            lambda k: float("nan"),
        ),
        word="learning_rate",
    )
    trained = affine()
    history = cl.History([{"step": 0, "loss": 2.0}])
    record = report.Record("rule", {"mse": report.Estimate(1.0, 0.1)})
    records = Argument([record], (None, 3, "x", object(), [3], [None], record), word="records")
    axes = Argument(None, ("x", 3, object(), torch.ones(2)), word="ax")
    values = Argument(torch.ones(3), (None, "x", 3.0, object(), torch.ones(3, 2), torch.ones(3) * 1j), word="values")
    weight = nn.Parameter(torch.ones(2))
    controlled = simulate.ClosedLoop(
        plants.Pendulum(), 3, initial=plants.Pendulum().initial, stage_cost=plants.Pendulum().stage_cost
    )
    return {
        "tune": calling(
            lambda rule, **given: cl.tune(rule, progress=False, **given),
            rule=Argument(affine, (None, "x", 3, object(), torch.sin, nn.ReLU(), nn.Linear), fresh=True),
            simulator=simulator,
            objective=objective,
            steps=count(1, 0),
            learning_rate=rate,
            optimizer=Argument(
                torch.optim.SGD,
                ("x", 3, object(), torch.optim.SGD([weight], lr=0.1), lambda groups: None, torch.ones(2)),
            ),
            regularizer=Argument(
                None,
                (
                    "x",
                    3,
                    object(),
                    lambda rule: None,
                    lambda rule: "x",
                    lambda rule: torch.ones(2),
                    lambda rule: 1j * rule.W.sum(),
                ),
            ),
            batch_size=count(2, optional=True),
            validation=Argument(pairs(), ("x", 3, object(), X, nn.Linear, (pairs(), 3), (pairs(),), ())),
            patience=count(2, optional=True),
            clip=number(1.0, above=0.0, optional=True),
            seed=seed(),
            callback=function(None, optional=True),
            checkpoint=Argument(lambda: folder() / "run.pt", (3, object(), ["x"], "a\0b", ""), fresh=True),
        ),
        "tune progress": calling(
            lambda progress: cl.tune(affine(), pairs(), squared_error, steps=0, progress=progress), progress=flag(False)
        ),
        "evaluate": calling(
            cl.evaluate,
            rule=function(trained, nn.Linear),
            simulator=simulator,
            objective=objective,
            samples=count(2, optional=True),
            batch_size=count(2, optional=True),
            seed=seed(),
        ),
        "Evaluation": calling(
            lambda values, seconds_per_decision, failed: cl.Evaluation(values, seconds_per_decision, failed),
            values=values,
            seconds_per_decision=Argument(0.1, (None, "x", object(), 1j, -1.0), word="seconds_per_decision"),
            failed=Argument((1,), (None, "x", 3, object(), (7,), ("x",), (1.5,), (-1,))),
        ),
        "Evaluation difference": calling(
            lambda other: cl.Evaluation(torch.ones(3)) - other,
            other=Argument(
                cl.Evaluation(torch.ones(3)), (None, 3, "x", cl.Evaluation(torch.ones(2))), word="evaluations?"
            ),
        ),
        "History.column": calling(history.column, name=Argument("loss", (None, 3, object(), ["loss"]))),
        "History.from_dict": calling(
            cl.History.from_dict,
            content=Argument(
                history.to_dict(),
                (None, 3, "x", object(), {}, {"records": 3, "best": None, "start": None, "stopped": ""}, [1]),
            ),
        ),
        "History.plot": calling(history.plot, ax=axes),
        "ProximalGradient": calling(
            cl.ProximalGradient,
            params=Argument([weight], (None, 3, "x", [3], [], object()), word="params"),
            lr=number(1.0, above=0.0),
            terms=Argument(
                {weight: cl.ProximalTerm(torch.sum, lambda v, step: v)},
                (3, "x", object(), {nn.Parameter(torch.ones(2)): cl.ProximalTerm(torch.sum, torch.mul)}, {weight: 3}),
            ),
            grow=number(1.5, least=1.0),
            shrink=number(0.5, above=0.0, most=0.9),
        ),
        "ProximalGradient.step": calling(
            cl.ProximalGradient([weight], lr=1.0).step, closure=function(lambda: weight.sum(), word="closure")
        ),
        "save": calling(
            cl.save,
            rule=thing(affine(), nn.Linear(2, 2)),
            path=path(lambda: folder() / "rule.safetensors"),
            classes=Argument((), (3, object(), [3], ["x"], nn.Linear)),
        ),
        "load": calling(
            cl.load,
            path=Argument(saved, (None, 3, object(), ["x"], "a\0b", folder, Path("/nowhere/rule"), ""), fresh=True),
            device=Argument("cpu", (None, 3.5, object(), "misspelt", ["cpu"])),
            classes=Argument((), (3, object(), [3], ["x"], nn.Linear)),
        ),
        "export_c": Calling(
            cl.export_c,
            {
                "rule": thing(lasso(), affine(), torch.sin),
                "folder": path(folder),
                "solver": Argument("OSQP", ("misspelt", 3, object(), ["OSQP"], True, "")),
                "tolerance": number(1e-6, above=0.0, most=0.9),
                "max_iterations": count(100, optional=True),
            },
            runs=False,
        ),
        "table": calling(report.table, records=records, style=choice("markdown"), digits=count(4)),
        "format_table": calling(
            report.format_table,
            header=Argument(["a", "b"], (None, 3, object(), [1, 2])),
            rows=Argument([["x", "1"]], (None, 3, object(), [["x"]], [3], [[1, 2]])),
            left=count(1, 0),
            style=choice("plain"),
        ),
        "to_json": calling(report.to_json, records=records),
        "plot_records": calling(
            report.plot_records, records=records, measure=Argument("mse", (None, "misspelt", 3, object())), ax=axes
        ),
        "plot_history": calling(
            report.plot_history,
            history=Argument(history, (None, 3, "x", object(), [3])),
            keys=Argument(["loss"], (None, 3, object(), ["misspelt"], [3]), word="keys|history"),
            ax=axes,
            label=Argument("tuned", (None, 3, object())),
        ),
        "new_axes": calling(
            report.new_axes,
            rows=count(1),
            columns=count(2),
            size=Argument(
                (4.0, 3.0), (None, "x", 3, object(), (1.0,), (-1.0, 2.0), (0.0, 1.0), ("a", "b"), (float("nan"), 1.0))
            ),
        ),
        "report.save": calling(
            report.save,
            ax=Argument(lambda: report.new_axes(), (None, "x", 3, object()), fresh=True),
            file=Argument(lambda: folder() / "plot.png", (None, 3, object(), "a\0b", ""), fresh=True),
            dpi=number(50, above=0.0),
        ),
        "Estimate": calling(
            report.Estimate,
            mean=Argument(1.0, (None, "x", object(), [1.0], 1j)),
            standard_error=Argument(1.0, (None, "x", object(), 1j)),
        ),
        "Estimate.text": calling(report.Estimate(1.0, 0.1).text, digits=count(3)),
        "Record": calling(
            report.Record,
            name=Argument("rule", (None, 3, object())),
            measures=Argument(
                {"mse": report.Estimate(1.0)}, (None, 3, "x", object(), {"mse": 1.0}, {3: report.Estimate(1.0)})
            ),
            parameters=Argument({"hyper": 1}, (None, 3, "x", object(), {"hyper": "x"})),
            seconds_per_decision=Argument(None, ("x", object(), 1j, -1.0)),
        ),
        "Record.measure": calling(
            record.measure, name=Argument("mse", (None, 3, "misspelt", object()), word="measure")
        ),
        "physics_matrix": calling(
            interop.physics_matrix,
            physics=Argument(Halve(), (None, 3, "x", object(), torch.sin)),
            image=Argument((1, 1, 4), (None, 3, "x", object(), (-1, 2, 2), ("a",), (1.5,))),
            like=Argument(X, ("x", 3, object(), torch.ones(2).long())),
        ),
        "AgentRule": calling(reinforcement.AgentRule, agent=thing(Trained())),
        "learn_by_reinforcement": calling(
            reinforcement.learn_by_reinforcement,
            environment=thing(simulate.environment(controlled, torch.tensor([2.0]))),
            steps=count(2),
            algorithm=choice("A2C"),
            seed=seed(),
            n_steps=Argument(2, ()),
            misspelt=Argument(OMITTED, (3,)),
        ),
        "find": calling(
            catalogue.find, name=Argument("lqr", (None, "misspelt", "", 3, object(), ["lqr"]), word="problem|name")
        ),
        "ProblemEntry.configure": calling(
            lambda **options: catalogue.find("lqr").configure(**options),
            misspelt=Argument(OMITTED, (3, None), word="misspelt"),
        ),
        "ProblemEntry.tune": Calling(
            catalogue.find("lqr").tune,
            {
                "seed": seed(),
                "steps": count(1, optional=True),
                "progress": flag(False),
                "announce": function(print),
            },
            runs=False,
        ),
        "ProblemEntry.evaluate": Calling(
            catalogue.find("lqr").evaluate,
            {"seed": seed(), "state": Argument(OMITTED, (3, "x", object(), {}, {"misspelt": {}}, [1]))},
            runs=False,
        ),
    }
