"""Time the layers side by side: python -m benchmarks.run [names] [--batch N ...]; or see --help."""

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import overhead, peers, scaling
from benchmarks.workloads import WORKLOADS, Layer, Workload

# A back end counts as accurate up to this norm-wise relative error of all gradients together. Lenient, since
# ratios are taken to the fastest accurate one; the columns show the worst sample, which is often far worse.
ACCURATE = 1e-2
LONG = 0.5  # seconds of a pass from which cold caches after another layer's don't matter
PERTURBATION = 1e-9  # repetitions see fresh values, so that nothing can be cached between them


@dataclass
class Row:
    """What one layer did on one workload; times in seconds, errors relative to the largest entry."""

    setup: float
    layer: Layer
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    solution_error: float = float("nan")
    gradient_error: float = float("nan")
    overall_error: float = float("nan")

    @property
    def latest(self) -> float:
        """Seconds of the last pass, 0 before the first."""
        return self.forward[-1] + self.backward[-1] if self.forward else 0.0

    @property
    def total(self) -> float:
        """Median of forward plus backward."""
        return statistics.median(f + b for f, b in zip(self.forward, self.backward))


def weights(shape: torch.Size) -> Tensor:
    """Fixed weights of the scalar loss, so that no gradient cancels."""
    count = int(torch.Size(shape).numel())
    return torch.sin(1.0 + torch.arange(count, dtype=torch.float64)).reshape(shape)


def pass_once(workload: Workload, layer: Layer, values: list[Tensor]) -> tuple[float, float, Tensor, list]:
    """Seconds forward and backward, the decisions, the gradients of all parameters."""
    start = time.perf_counter()
    decision = workload.run(layer, values)
    middle = time.perf_counter()
    gradients = torch.autograd.grad((decision * weights(decision.shape)).sum(), values)
    return middle - start, time.perf_counter() - middle, decision.detach(), list(gradients)


def perturbed(values: list[Tensor], repetition: int) -> list[Tensor]:
    """The parameters moved by a relative 1e-9."""
    generator = torch.Generator().manual_seed(repetition)
    noise = (torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values)
    return [(v.detach() * (1 + PERTURBATION * e)).requires_grad_() for v, e in zip(values, noise)]


def worst_sample(value: Tensor, reference: Tensor, shared: bool) -> float:
    """Largest error relative to the largest reference entry, per sample where there are samples."""
    if shared or value.dim() < 2:
        value, reference = value.reshape(1, -1), reference.reshape(1, -1)
    value, reference = value.flatten(1), reference.flatten(1)
    scale = reference.abs().amax(1).clamp(min=1e-3 * float(reference.abs().max()), max=None)
    return float(((value - reference).abs().amax(1) / scale.clamp(min=1e-300)).max())


def judge(row: Row, workload: Workload, values: list[Tensor], reference: tuple[Tensor, list[Tensor]]) -> None:
    """Fill in the errors of one layer."""
    _, _, decision, gradients = pass_once(workload, row.layer, values)
    shapes = [p.shape for p in workload.declare().parameters]
    row.solution_error = worst_sample(decision, reference[0], decision.dim() < 2)
    row.gradient_error = max(
        worst_sample(g, r, tuple(g.shape) == shape) for g, r, shape in zip(gradients, reference[1], shapes)
    )
    error = sum(float((g - r).square().sum()) for g, r in zip(gradients, reference[1]))
    row.overall_error = (error / sum(float(r.square().sum()) for r in reference[1])) ** 0.5


def compare(workload: Workload, batch: int, names: Sequence[str], repetitions: int) -> dict[str, Row]:
    """Time every layer on a workload, interleaved, after a warm-up that also judges the errors."""
    values = workload.values(batch)
    reference = pass_once(workload, peers.exact(workload), values)[2:]
    rows: dict[str, Row] = {}
    for name in names:
        start = time.perf_counter()
        try:
            layer = peers.PEERS[name](workload)
            if layer is None:
                continue
            row = Row(time.perf_counter() - start, layer)
            pass_once(workload, layer, perturbed(values, 0))
            judge(row, workload, values, reference)
            rows[name] = row
        except Exception as error:
            print(f"  {name}: left out, {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    for repetition in range(1, repetitions + 1):
        for row in rows.values():
            if row.latest < LONG:  # as in a training loop, the pass before a timed one is the layer's own
                pass_once(workload, row.layer, perturbed(values, -repetition))
            forward, backward, _, _ = pass_once(workload, row.layer, perturbed(values, repetition))
            row.forward.append(forward)
            row.backward.append(backward)
    return rows


def best(rows: dict[str, Row], limit: float) -> float | None:
    """Total time of the fastest cvxpylayers back end with an overall error up to `limit` (or unknown)."""
    kept = [row.total for name, row in rows.items() if name in peers.CVXPYLAYERS and not row.overall_error > limit]
    return min(kept, default=None)


def table(workload: Workload, batch: int, rows: dict[str, Row]) -> str:
    """One block of text: milliseconds, ratios to the best accurate and to the fastest cvxpylayers, errors."""
    lines = [
        f"{workload.name}: {workload.title}, batch {batch} (ms; cvxpylayers' best accurate and fastest over total)"
    ]
    head = f"  {'layer':<16}{'setup':>9}{'forward':>10}{'backward':>10}{'total':>10}{'accurate':>10}{'fastest':>9}"
    lines.append(f"{head}{'solution':>10}{'gradient':>10}")
    references = best(rows, ACCURATE), best(rows, float("inf"))
    for name, row in rows.items():
        ratios = (f"{reference / row.total:.1f}" if reference is not None else "-" for reference in references)
        times = (row.setup, statistics.median(row.forward), statistics.median(row.backward), row.total)
        numbers = "".join(f"{1e3 * t:>{w}.2f}" for t, w in zip(times, (9, 10, 10, 10)))
        errors = f"{row.solution_error:>10.0e}{row.gradient_error:>10.0e}"
        lines.append(f"  {name:<16}{numbers}{next(ratios):>10}{next(ratios):>9}{errors}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"workloads, from {', '.join(WORKLOADS)} (default: all)")
    parser.add_argument("--batch", type=int, nargs="*", help="batch sizes instead of each workload's own")
    parser.add_argument("--layers", nargs="*", choices=list(peers.PEERS), default=list(peers.PEERS))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--scaling", action="store_true", help="fit slopes over batch and horizon instead")
    parser.add_argument("--memory", action="store_true", help="peak memory of W1 at batch 1024 instead")
    parser.add_argument("--overhead", action="store_true", help="what a layer costs beside its solver instead")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # for all layers: idle torch threads spin, and would slow whoever runs next
    unknown = [n for n in options.names if n not in WORKLOADS]
    if unknown:
        parser.error(f"unknown workload {unknown[0]!r}; valid: {', '.join(WORKLOADS)}")
    if options.overhead:
        print(overhead.overhead_report())
        return
    if options.scaling or options.memory:
        print(scaling.memory_report() if options.memory else scaling.slopes_report())
        return
    warnings.simplefilter("ignore")
    for name in options.names or WORKLOADS:
        for batch in options.batch or WORKLOADS[name].batches:
            rows = compare(WORKLOADS[name], batch, options.layers, options.repetitions)
            print(table(WORKLOADS[name], batch, rows), flush=True)


if __name__ == "__main__":
    main()
