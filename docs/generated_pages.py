"""Pages that follow from the code: the API from `convexlearn.__all__`, the gallery from the catalogue."""

import inspect
import re
from pathlib import Path

import convexlearn as cl
from convexlearn.problems.catalogue import entries

GROUPS = {
    "layers": ("The layer", "ConvexLayer LayerSolution Status diagnose Diagnosis"),
    "rules": (
        "Decision rules",
        "DecisionRule as_rule Role Domain ConvexRule FeasibleRule DeepPrior AffineRule TreeRule NeuralRule",
    ),
    "iterations": (
        "Splitting, iterations, unfolding",
        "split Split ISTA FISTA ADMM PrimalDual AMP RobustPCA robust_pca principal_component_pursuit Converged "
        "Unfolded Convolution",
    ),
    "control": ("Control", "adp mpc LQR LQG OutputFeedback dare dlyap lqr_gain"),
    "filters": (
        "Filters and factor graphs",
        "KalmanFilter ExtendedKalmanFilter KalmanSmoother RecurrentGain GainSignals SumProduct ChainFactors "
        "ChannelFactor LearnedFactor Trellis",
    ),
    "tuning": (
        "Tuning, evaluation, files",
        "tune History evaluate Evaluation Simulator Trajectory ProximalGradient ProximalTerm save load",
    ),
}
"""Pages of the API: file name, title, names. What is public and in no group stands on the page "further"."""

MODULES = [
    "convexlearn.simulate",
    "convexlearn.simulate.plants",
    "convexlearn.objectives",
    "convexlearn.networks",
    "convexlearn.flows",
    "convexlearn.errors",
    "convexlearn.prox",
    "convexlearn.report",
    "convexlearn.interop",
    "convexlearn.reinforcement",
]


def write(folder: Path) -> None:
    """Write `api/*.md` and `gallery.md` into the documentation's folder."""
    (folder / "api").mkdir(exist_ok=True)
    pages = {f"{name}.md": text for name, text in api_pages().items()}
    for file in (folder / "api").glob("*.md"):
        if file.name not in pages:
            file.unlink()
    for name, text in pages.items():
        _write(folder / "api" / name, text)
    _write(folder / "gallery.md", gallery(folder / "gallery"))


def api_pages() -> dict[str, str]:
    """Markdown of the API by file name."""
    public = set(cl.__all__)
    grouped = {name for _, names in GROUPS.values() for name in names.split()}
    rest = [name for name in cl.__all__ if name not in grouped and not inspect.ismodule(getattr(cl, name))]
    groups = {**GROUPS, **({"further": ("Further", " ".join(rest))} if rest else {})}
    pages = {
        file: f"# {title}\n\n" + "\n".join(_directive(name) for name in names.split() if name in public)
        for file, (title, names) in groups.items()
    }
    pages["modules"] = "# Modules\n\n" + "\n".join(f"## {name}\n\n{_module(name)}" for name in MODULES)
    listed = "\n".join([*groups, "modules"])
    pages["index"] = f"# API\n\n```{{toctree}}\n:maxdepth: 2\n\n{listed}\n```\n"
    return pages


def gallery(figures: Path) -> str:
    """One section per entry of the catalogue, with the stored table and figure where there are some."""
    parts = [
        "# Gallery",
        "One section per declared problem: its source, the command, its figure, and what the command printed (one run, "
        "seed 0, two cores). `python docs/draw_gallery.py NAME` runs it again and replaces both.",
    ]
    for entry in entries().values():
        command = f"convexlearn tune {entry.name} --plot figures"
        parts.append(f"## {entry.name}\n\n{_sentence(entry.summary)} {_sentence(entry.source)}")
        parts.append(f"```bash\n{command}\n```")
        if (figures / f"{entry.name}.png").exists():
            parts.append(f"![{entry.name}](gallery/{entry.name}.png)")
        if (figures / f"{entry.name}.txt").exists():
            parts.append("```text\n" + (figures / f"{entry.name}.txt").read_text().strip() + "\n```")
    return "\n\n".join(parts) + "\n"


def to_restructured_text(app, what, name, thing, options, lines: list[str]) -> None:
    """A docstring as reStructuredText: `code` becomes literal, |, * and _ stand for themselves, examples stay."""
    example = False
    for k, line in enumerate(lines):
        example = line.strip().startswith(">>>") or (example and bool(line.strip()))
        if example:
            continue
        indent = line[: len(line) - len(line.lstrip())]
        bullet = "- " if line.lstrip().startswith("- ") else ""
        pieces = re.split(r"(`[^`]*`)", line.lstrip()[len(bullet) :])
        lines[k] = indent + bullet + "".join(f"`{p}`" if p.startswith("`") else _escape(p) for p in pieces)


def constructor_signature(app, what, name, thing, options, signature, returns):
    """The arguments of a rule's constructor, which `__new__` hides behind (*args, **kwargs)."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    parameters = list(inspect.signature(thing.__init__).parameters.values())[1:]
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(plain)), returns


def _escape(text: str) -> str:
    return re.sub(r"([\\|*_])", r"\\\1", text)


def _directive(name: str) -> str:
    thing = getattr(cl, name)
    kind = "autoclass" if inspect.isclass(thing) else "autofunction"
    members = "\n   :members:\n   :show-inheritance:" if inspect.isclass(thing) else ""
    return f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: convexlearn.{name}{members}\n```\n"


def _module(name: str) -> str:
    return f"```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n   :no-index:\n```\n"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".") + "."


def _write(file: Path, text: str) -> None:
    """Only if it differs, so that Sphinx reads nothing twice."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
