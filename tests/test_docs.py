"""Every Python block of docs/ runs as printed, page by page; its commands parse, and what it names exists."""

import re
import shlex
from pathlib import Path

import pytest

import convexlearn as cl
from convexlearn.cli import parser
from convexlearn.problems.catalogue import entries

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = {"gallery.md"}
PAGES = sorted(page for page in [*DOCS.glob("*.md"), *(DOCS / "howto").glob("*.md")] if page.name not in GENERATED)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of PyTorch's own forward mode
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of cvxpylayers
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In order and in one namespace, which is that of a module, so that classes can be pickled."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands(page: Path) -> None:
    """`convexlearn ...` has the options and the entry that it names; `pytest tests/...` and folders are there."""
    text = page.read_text()
    for command in re.findall(r"convexlearn ((?:list|show|tune|evaluate)[^`\n|]*)", text):
        words = shlex.split(command)
        if words == ["list"]:
            continue
        arguments = parser().parse_args(words[:2] if "FILE" in command else words)
        assert arguments.name == "NAME" or arguments.name in entries(), command
    for file in re.findall(r"\b(?:tests|problems|convexlearn|benchmarks|docs)/[\w/]+\.py\b", text):
        assert (ROOT / file).exists(), file


def test_every_test_that_the_comparison_names_exists() -> None:
    tests = (ROOT / "tests" / "test_comparison.py").read_text()
    named = re.findall(r"`(test_\w+)`", (DOCS / "comparison.md").read_text())
    assert len(named) > 15
    for name in named:
        assert f"def {name}(" in tests, name


def test_api_pages_hold_every_public_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    import generated_pages

    pages = "\n".join(generated_pages.api_pages().values())
    for name in cl.__all__:
        assert f"convexlearn.{name}" in pages, name


def test_figures_are_small() -> None:
    for picture in (DOCS / "gallery").glob("*.png"):
        assert picture.stat().st_size < 60_000, picture.name
