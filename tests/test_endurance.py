"""Layers over time and side by side: many solves, threads, DataLoader workers, killed runs."""

import gc
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz_subjects import box, cone, controller, entropy, lasso, normal
from torch.utils.data import DataLoader, Dataset

LAYERS: dict[str, tuple[Callable, tuple]] = {
    "quadratic": (box, (normal(64, 4), normal(64, 4, seed=1).abs() + 0.1)),
    "shared matrices": (lasso, (normal(64, 4),)),
    "controller": (controller, (normal(64, 2),)),
    "socp": (cone, (normal(64, 4),)),
    "conic": (entropy, (normal(8, 4),)),
}


def solve(layer, inputs):
    """Decision and the gradient of its squares to the first input."""
    leaf = inputs[0].clone().requires_grad_()
    out = layer(leaf, *inputs[1:])
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    return out.detach(), leaf.grad


def assert_same(found, expected):
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_in_many_threads(name):
    build, inputs = LAYERS[name]
    layer, errors = build(), []
    expected = [solve(layer, tuple(x + 0.1 * k for x in inputs)) for k in range(6)]

    def work(k):
        try:
            for _ in range(5):
                assert_same(solve(layer, tuple(x + 0.1 * k for x in inputs)), expected[k])
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive()
    assert not errors


class Solved(Dataset):
    """Decisions computed where the item is asked for, that is in the workers of a DataLoader."""

    def __init__(self, name):
        self.name, (build, self.inputs) = name, LAYERS[name]
        self.layer = build()

    def __len__(self):
        return 4

    def __getitem__(self, k):
        return solve(self.layer, tuple(x + 0.1 * k for x in self.inputs))


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("name", ["quadratic", "socp"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_layers_in_the_workers_of_a_data_loader(name, context):
    """The parent has solved before, so that its threads exist when the workers are forked."""
    data = Solved(name)
    expected = [data[k] for k in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120)
    for found, wanted in zip(loader, expected):
        assert_same(found, wanted)


def resident() -> float:
    """Megabytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def growth(build, inputs, count):
    """Megabytes by which `count` forward and backward passes let the process grow, after as many as a tenth."""
    layer = build()
    for _ in range(count // 10):
        solve(layer, inputs)
    gc.collect()
    before = resident()
    for _ in range(count):
        solve(layer, inputs)
    gc.collect()
    return resident() - before


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize("name", ["quadratic", "shared matrices", "socp"])
def test_two_thousand_solves_do_not_grow(name):
    build, inputs = LAYERS[name]
    assert growth(build, tuple(x[:4] for x in inputs), 2000) < 4  # 2 kB a solve would be seen


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_hundred_thousand_solves_do_not_grow(name):
    build, inputs = LAYERS[name]
    grown = growth(build, tuple(x[:4] for x in inputs), 100_000)
    print(f"\n{name}: {grown:.1f} MB after 100000 solves")
    assert grown < 10


RUN = """
import sys, torch, cvxpy as cp, convexlearn as cl
sys.path.insert(0, {tests!r})
from fuzz_subjects import lasso, normal
rule = lasso().learn("rho")
train = cl.simulate.Pairs(normal(40, 4), normal(40, 6, seed=9))
cl.tune(rule, train, cl.objectives.squared_error, steps=60, batch_size=5, learning_rate=0.05, seed=3, progress=False,
        checkpoint={path!r}, callback=lambda record: print("step", record["step"], flush=True))
torch.save(rule.state_dict(), {path!r} + ".final")
"""


def launch(path: Path) -> subprocess.Popen:
    script = RUN.format(tests=str(Path(__file__).parent), path=str(path))
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def killed_and_resumed(folder: Path, kills: list[int]) -> tuple[dict, int]:
    """The weights at the end of a run that is killed after so many steps each time, and the step it last began at."""
    path = folder / "run.pt"
    for lines in kills:
        with launch(path) as process:
            for _ in range(lines):
                process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    with launch(path) as process:
        printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    return torch.load(f"{path}.final", weights_only=True), int(printed.split()[1])


def check_kills(tmp_path, kills):
    """Weights must agree bit for bit with those of a run that nobody killed."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected, _ = killed_and_resumed(tmp_path / "whole", [])
    found, begun = killed_and_resumed(tmp_path / "killed", kills)
    assert begun > 1  # it did resume
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    check_kills(tmp_path, [23])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_run_killed_ten_times_resumes_bit_for_bit(tmp_path):
    chosen = random.Random(0)
    check_kills(tmp_path, [chosen.randint(1, 12) for _ in range(10)])
