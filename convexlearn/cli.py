"""The command line: convexlearn list | show | tune | evaluate.

Exit codes: 0 success, 1 failure, 2 misuse. The catalogue is found through importlib, when it is needed.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

SUCCESS, FAILURE, MISUSE, INTERRUPTED = 0, 1, 2, 130


FIRST_STEPS = """\
first steps:
  convexlearn list                           the problems, each with the rules that it compares
  convexlearn show sparse-recovery           what one declares, and its options
  convexlearn tune sparse-recovery           fit its rules, and compare them on data that none has seen
  convexlearn tune lqr --set horizon=50 --plot figures --save rules.pt --json result.json
  convexlearn evaluate lqr rules.pt          judge saved rules again
  convexlearn tune --help                    all options of a command

`tune sparse-recovery` takes seconds, other problems minutes and more; `--steps 2` is a quick look, no result.
In several processes:
  torchrun --standalone --nproc-per-node 2 -m convexlearn tune lqr --checkpoint run

A problem of your own is Python: import convexlearn as cl; help(cl.ConvexRule), help(cl.tune), help(cl.evaluate)."""


class Misuse(Exception):
    """The command line asks for something that cannot be."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; `argv` defaults to the arguments of the process. Returns the exit code."""
    if not (sys.argv[1:] if argv is None else argv):
        parser().print_help(sys.stderr)
        raise SystemExit(MISUSE)
    arguments = parser().parse_args(argv)
    usual, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        _share_cores()
        with _workers():
            arguments.run(arguments)
    except Misuse as error:
        return _complain(error, MISUSE)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except (ModuleNotFoundError, OSError) as error:
        return _complain(error, FAILURE)
    except Exception as error:
        errors = importlib.import_module("convexlearn.errors")
        if not isinstance(error, errors.ConvexLearnError):
            raise
        return _complain(error, MISUSE if isinstance(error, errors.OptionError) else FAILURE)
    finally:
        warnings.formatwarning = usual
    return SUCCESS


def _share_cores() -> None:
    """Half of the cores for torch, unless OMP_NUM_THREADS says otherwise.

    The solvers have threads of their own; with both pools on every core, torch's spin while they wait
    (measured on two cores: five minutes instead of one).
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = importlib.import_module("convexlearn.parallel").cores()
        importlib.import_module("torch").set_num_threads(max(1, cores // 2))


@contextlib.contextmanager
def _workers() -> Iterator[None]:
    """Join the other processes that torchrun has started; only the first one prints and warns."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    dist = importlib.import_module("torch.distributed")
    dist.init_process_group("gloo")
    usual = signal.signal(signal.SIGTERM, _terminated)  # torchrun ends the others when one worker fails
    try:
        with contextlib.ExitStack() as stack:
            if dist.get_rank() > 0:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                stack.enter_context(warnings.catch_warnings(action="ignore"))
            yield
    finally:
        signal.signal(signal.SIGTERM, usual)
        dist.destroy_process_group()


def _terminated(*_: Any) -> None:
    """End as by an exception, so that a checkpoint is written."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(FAILURE)


def _first() -> bool:
    return importlib.import_module("convexlearn.distributed").first()


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    top = argparse.ArgumentParser(
        prog="convexlearn",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Decision rules (convex problems, filters, networks) tuned from data. The commands run the\n"
        "catalogue of declared problems: each holds data or a plant, several rules, and measures to compare them.",
        epilog=FIRST_STEPS,
    )
    top.add_argument("--version", action="version", version=f"convexlearn {_version()}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    text = "List the problems: name, what is decided by which rules, and where it is published."
    command = commands.add_parser("list", help="list the problems", description=text)
    command.set_defaults(run=run_list)

    text = "Describe a problem: source, shapes and units, declaration, rules, options, reference answer."
    command = commands.add_parser("show", help="describe a problem", description=text)
    command.add_argument("name", metavar="NAME", help="name of the problem, as in `convexlearn list`")
    command.set_defaults(run=run_show)

    text = (
        "Fit the rules of a problem and judge each in a simulation that it was not fitted to. The table has a row per "
        "rule: its measures, mean ± standard error; how many numbers were trained (in the objective, as "
        "hyperparameters, as network weights); and the time of a decision."
    )
    command = commands.add_parser("tune", help="fit the rules of a problem and compare them", description=text)
    _add_common(command)
    command.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="gradient steps of every rule (2: a quick look; default: as published)",
    )
    text = "store the fitted rules for `convexlearn evaluate NAME FILE`"
    command.add_argument("--save", type=Path, metavar="FILE", help=text)
    command.add_argument("--quiet", action="store_true", help="no progress, only the result")
    text = "write checkpoints into this folder, and resume from those that are there"
    command.add_argument("--checkpoint", type=Path, metavar="DIR", help=text)
    command.set_defaults(run=run_tune)

    text = "Judge the rules of a problem: saved ones, or with the values that they start from."
    command = commands.add_parser("evaluate", help="judge saved rules without fitting", description=text)
    _add_common(command)
    command.add_argument("file", type=Path, nargs="?", metavar="FILE", help="what `tune --save FILE` wrote")
    command.add_argument("--load", type=Path, metavar="FILE", help="the same, as an option")
    command.set_defaults(run=run_evaluate)
    return top


def _version() -> str:
    return importlib.import_module("convexlearn").__version__


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="name of the problem, as in `convexlearn list`")
    command.add_argument("--seed", type=int, metavar="N", help="all randomness derives from it (default: 0)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="an option of the problem, listed by `convexlearn show NAME`; may be repeated",
    )
    command.add_argument("--plot", type=Path, metavar="DIR", help="draw PNG files into this folder")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    command.add_argument("--markdown", action="store_true", help="print the table as markdown")


def run_list(arguments: argparse.Namespace) -> None:
    """Print name, source and summary of every problem."""
    rows = [[entry.name, entry.summary, entry.source] for entry in _catalogue().entries().values()]
    print(importlib.import_module("convexlearn.report").format_table(["problem", "summary", "source"], rows, 3))


def run_show(arguments: argparse.Namespace) -> None:
    """Print what a problem declares."""
    entry = _catalogue().find(arguments.name)
    _section(entry.name, entry.summary)
    _section("source", entry.source)
    _section("shapes and units", entry.shapes)
    try:
        study = entry.build(0, entry.setting)
    except ModuleNotFoundError as error:
        _section("declaration", f"(not built: {error})")
    else:
        _section("declaration", str(study.problem))
        _section("rules", "\n".join(_describe(name, c) for name, c in study.contenders.items()))
        _section("measures", ", ".join(study.measures))
    options = vars(entry.setting) if hasattr(entry.setting, "__dict__") else {}
    documentation = " ".join((type(entry.setting).__doc__ or "").split())
    _section("options (--set OPTION=VALUE)", "\n".join(f"{k}={v}" for k, v in options.items()), documentation)
    _section("reference answer", entry.reference.text)


def run_tune(arguments: argparse.Namespace) -> None:
    """Fit, judge, print, save."""
    entry, options = _catalogue().find(arguments.name), _options(arguments.set)
    _prepare(arguments.save, arguments.json, arguments.plot)
    configured = entry.configure(**options)
    quiet, folder = arguments.quiet or not _first(), arguments.checkpoint
    checkpoints = importlib.import_module("convexlearn.checkpoint").folder(folder) if folder else nullcontext()
    with checkpoints:
        result = entry.tune(
            seed=arguments.seed or 0,
            steps=arguments.steps,
            progress=not quiet,
            announce=(lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr)),
            **options,
        )
    _report(result, arguments)
    if arguments.steps is None and configured == entry.setting:
        missed = entry.reference.misses(result)
        print("\n".join(["", "Reference answer missed:", *missed] if missed else ["", "Reference answer met."]))
    print(f"({entry.reference.text})")
    if arguments.save and _first():
        content = {"problem": entry.name, "seed": result.seed, "options": options, "rules": result.state()}
        importlib.import_module("torch").save(content, arguments.save)
        print(f"saved: {arguments.save}")


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Load, judge, print."""
    entry, options, state, seed = _catalogue().find(arguments.name), _options(arguments.set), None, arguments.seed
    if arguments.file and arguments.load:
        raise Misuse("give the saved file once, as FILE or as --load FILE")
    _prepare(None, arguments.json, arguments.plot)
    file = arguments.file or arguments.load
    if file:
        saved = _load(file, entry.name)
        options, state = {**saved["options"], **options}, saved["rules"]
        seed = saved["seed"] if seed is None else seed
    entry.configure(**options)
    _report(entry.evaluate(seed=seed or 0, state=state, **options), arguments)
    if not file:
        print("\n(values at the start; tune and save first, then: convexlearn evaluate NAME FILE)")


def _report(result: Any, arguments: argparse.Namespace) -> None:
    report = importlib.import_module("convexlearn.report")
    print(report.table(result.records, "markdown" if arguments.markdown else "plain"))
    for measure, bound in result.study.bounds.items():
        print(f"no rule can beat {measure} {bound:.4g} on average")
    for title, text in result.entry.tables(result).items():
        print(f"\n{title}\n{text}")
    if arguments.json and _first():
        arguments.json.write_text(json.dumps(result.json(), indent=2) + "\n")
        print(f"wrote: {arguments.json}")
    if arguments.plot and _first():
        for name, axes in result.entry.figures(result).items():
            file = arguments.plot / f"{name}.png"
            report.save(axes, file)
            print(f"drew: {file}")


def _catalogue() -> Any:
    return importlib.import_module("convexlearn.problems")


def _options(pairs: Sequence[str]) -> dict[str, str]:
    """{"noise": "0.1"} for ["noise=0.1"]."""
    for pair in pairs:
        if "=" not in pair:
            raise Misuse(f"--set takes OPTION=VALUE, as in --set noise=0.05; got '{pair}'")
    return {name.strip().replace("-", "_"): value.strip() for name, value in (p.split("=", 1) for p in pairs)}


def _prepare(save: Path | None, json_file: Path | None, plot: Path | None) -> None:
    """Make the folders now, so that a run of minutes does not end without its result; check for matplotlib."""
    for file in (save, json_file):
        if file and file.is_dir():
            raise Misuse(f"{file} is a folder; give a file name")
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
    if plot and plot.exists() and not plot.is_dir():
        raise Misuse(f"{plot} is a file; --plot takes a folder")
    if plot:
        importlib.import_module("convexlearn.report").new_axes()
        plot.mkdir(parents=True, exist_ok=True)


def _load(file: Path, name: str) -> dict[str, Any]:
    """What `tune --save` wrote for this problem."""
    if not file.is_file():
        raise Misuse(f"no file {file}; write one with: convexlearn tune {name} --save {file}")
    torch = importlib.import_module("torch")
    try:
        saved = torch.load(file, weights_only=True)
    except Exception as error:  # torch.load raises whatever the unpickler or the archive reader stumbles on
        raise Misuse(f"{file} is no file of `convexlearn tune --save` ({type(error).__name__})") from error
    if not isinstance(saved, dict) or not {"problem", "seed", "options", "rules"} <= saved.keys():
        raise Misuse(f"{file} is no file of `convexlearn tune --save`")
    if saved["problem"] != name:
        raise Misuse(f"{file} holds rules of '{saved['problem']}', not of '{name}'")
    return saved


def _describe(name: str, contender: Any) -> str:
    count = importlib.import_module("convexlearn.rules.parameters").count_parameters(contender.rule)
    counts = [f"{n} {role.value} parameter{'s' if n > 1 else ''}" for role, n in count.items() if n]
    return f"{name}: {', '.join(counts) or 'nothing trained'}"


def _section(title: str, *paragraphs: str) -> None:
    print(title)
    for paragraph in filter(None, paragraphs):
        print("    " + paragraph.replace("\n", "\n    "))
    print()


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got '{text}'")
    return number


def _warning(message: Warning | str, category: type[Warning], *where: Any) -> str:
    """A warning in one line: the file that it comes from means nothing to who calls a command."""
    return f"convexlearn: {category.__name__}: {message}\n"


def _complain(error: Any, code: int) -> int:
    print(f"convexlearn: {error}", file=sys.stderr)
    return code
