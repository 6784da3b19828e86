"""Two processes tune and judge like one; a process that fails ends the run with a checkpoint."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import convexlearn as cl
from convexlearn import distributed
from convexlearn.objectives import squared_error
from convexlearn.simulate.base import simulate

HERE = Path(__file__).parent
SAME = [
    *("whole", "batch", "one sample", "regularizer", "maximize", "failed samples", "closed loop", "no part"),
    *("momentum", "lbfgs", "proximal", "unfolded", "patience", "evaluate", "evaluate loop", "evaluate channel"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process, and each of two, came to."""
    folder = tmp_path_factory.mktemp("processes")
    runs = [(0, 1), (0, 2), (1, 2)]
    command = [sys.executable, str(HERE / "two_processes.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*command, str(r), str(n)], env=environment, stderr=subprocess.PIPE, text=True)
        for r, n in runs
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], "\n".join(errors)
    return [torch.load(folder / f"{n}-{r}.pt", weights_only=True) for r, n in runs]


def leaves(value):
    """Numbers and tensors of a nest of containers, in order."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in leaves(value[key])]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def largest_difference(a, b):
    """Over all numbers, relative to max(1, |number|); infinite where structure, text or NaN differ."""
    worst = 0.0
    for x, y in zip(leaves(a), leaves(b), strict=True):
        if isinstance(x, str) or x is None:
            worst = max(worst, 0.0 if x == y else math.inf)
            continue
        x, y = (torch.as_tensor(v, dtype=torch.float64) for v in (x, y))
        if x.shape != y.shape or not torch.equal(x.isnan(), y.isnan()):
            return math.inf
        gap = (x - y).nan_to_num().abs() / x.nan_to_num().abs().clamp(min=1)
        worst = max(worst, float(gap.max()) if gap.numel() else 0.0)
    return worst


@pytest.mark.parametrize("name", SAME)
def test_two_processes_give_what_one_gives(name, found):
    one, two, other = (f[name] for f in found)
    assert largest_difference(one, two) < 1e-10
    assert largest_difference(two, other) == 0


def test_single_precision_differs_by_a_rounding(found):
    one, two, other = (f["single precision"] for f in found)
    assert largest_difference(one, two) < 1e-6
    assert largest_difference(two, other) == 0


def test_nothing_was_left_out(found):
    assert {*SAME, "single precision", "warnings"} == found[0].keys()
    assert found[0]["failed samples"]["history"]["records"][0]["failures"] > 0
    assert found[0]["patience"]["history"]["stopped"]
    assert len(found[0]["evaluate"]["a"][3]) > 0


def test_only_the_first_process_warns(found):
    assert [f["first"] for f in found[1:]] == [True, False]
    assert found[1]["warnings"] == found[0]["warnings"] != []
    assert found[2]["warnings"] == []


def test_a_failed_process_ends_all_and_the_run_resumes_to_the_bit(found):
    first, second = (f["broken"] for f in found[1:])
    assert first["error"] == "WorkerError: worker 1 failed: ZeroDivisionError: worker's own"
    assert second["error"] == "ZeroDivisionError: worker's own"
    assert first["step"] == 4
    for run in (first, second):
        assert largest_difference(run["whole"], run["resumed"]) == 0
    assert largest_difference(first["whole"], second["whole"]) == 0


def test_one_process_shares_with_nobody():
    assert distributed.size() == 1
    assert distributed.first()
    assert distributed.share(3).tolist() == [0, 1, 2]
    assert distributed.gather(lambda: "x") == ["x"]
    with pytest.raises(KeyError):
        distributed.gather(lambda: {}["y"])


def test_parts_of_a_simulation_are_those_of_the_whole():
    pairs = cl.simulate.Pairs(torch.arange(5.0)[:, None], torch.ones(5, 1))
    rows = torch.tensor([1, 4])
    part = simulate(pairs, torch.nn.Identity(), rows, None, torch.Generator())
    assert part.context.flatten().tolist() == [1.0, 4.0]
    assert squared_error(part).tolist() == [0.0, 9.0]


def torchrun(folder, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["-m", "convexlearn", "tune", "lqr", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def children(pid):
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in tasks.read_text().split()] if tasks.exists() else []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_a_killed_worker_of_torchrun_leaves_a_run_that_resumes(tmp_path):
    options = ["--steps", "40", "--checkpoint", "run"]
    process = torchrun(tmp_path, *options, "--json", "broken.json")
    deadline = time.monotonic() + 300
    while not (workers := children(process.pid)) or not list(tmp_path.glob("run/*.pt")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(workers[-1], signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert not (tmp_path / "broken.json").exists()
    broken = torch.load(next(tmp_path.glob("run/*.pt")), weights_only=True)
    assert broken["step"] < 40
    for name, extra in (("whole", options[:2]), ("resumed", options)):
        process = torchrun(tmp_path, *extra, "--json", f"{name}.json")
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert out.count("Reference") <= 1
        assert out.count("network  ms per decision") == 1
    assert json.loads((tmp_path / "whole.json").read_text()) == json.loads((tmp_path / "resumed.json").read_text())
