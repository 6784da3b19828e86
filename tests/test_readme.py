"""Every Python block of the README runs as printed, in order; its commands are those of the CI."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(capsys: pytest.CaptureFixture) -> None:
    namespace: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "sample 1 is INFEASIBLE" in printed
    assert namespace["solution"].shape == (5, 2)


def test_two_self_contained_commands() -> None:
    commands = blocks("bash")
    assert len(commands) == 2
    for command in commands:
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && ")
        assert command.count("\n") == 1
    assert "convexlearn tune super-resolution" in commands[0]
    assert "pytest" in commands[1]
