"""The command line: commands, files, exit codes."""

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch

import convexlearn
from convexlearn import descent as descent_module
from convexlearn.cli import FIRST_STEPS, main, parser
from convexlearn.errors import FailureWarning
from convexlearn.problems import entries

SMALL = ["--set", "unknowns=12", "--set", "measurements=6", "--quiet"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder with what a short run has written: state.pt, deep/result.json."""
    folder = tmp_path_factory.mktemp("tuned")
    files = ["--save", str(folder / "state.pt"), "--json", str(folder / "deep" / "result.json")]
    assert main(["tune", "sparse_recovery", "--steps", "2", "--seed", "3", *SMALL, *files]) == 0
    return folder


def test_list_names_every_problem(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in entries())


@pytest.mark.parametrize("name", ["sparse-recovery", "sparse_recovery", "Sparse-Recovery"])
def test_show_takes_dashes_and_underscores(name, capsys):
    assert main(["show", name]) == 0
    out = capsys.readouterr().out
    for word in ("Example", "norm1(s)", "tuned rho: 1 objective parameter", "noise=0.05", "reference answer"):
        assert word in out


def test_an_unknown_problem_is_misuse_and_lists_the_valid_ones(capsys):
    assert main(["show", "sparse-recoverie"]) == 2
    err = capsys.readouterr().err
    assert "did you mean 'sparse-recovery'?" in err
    assert "super-resolution" in err
    assert main(["tune", "zzz"]) == 2
    err = capsys.readouterr().err
    assert {"sparse-recovery", "super-resolution"} <= set(err.rsplit("valid: ", 1)[1].strip().split(", "))


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["frobnicate"],
        ["tune"],
        ["tune", "sparse-recovery", "--steps", "0"],
        ["tune", "sparse-recovery", "--steps", "two"],
        ["tune", "sparse-recovery", "--stepz", "2"],
    ],
)
def test_misuse_of_the_parser_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    assert "usage: convexlearn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("noize=0.1", "did you mean 'noise'?"),
        ("noise", "--set takes OPTION=VALUE"),
        ("noise=loud", "option noise=loud is no float"),
        ("nonzeros=0", "need 0 < nonzeros"),
    ],
)
def test_a_wrong_option_of_a_problem_is_misuse(option, message, capsys):
    assert main(["tune", "sparse-recovery", "--steps", "2", "--set", option]) == 2
    assert message in capsys.readouterr().err


def test_help_of_every_command(capsys):
    for argv in (["--help"], *([command, "--help"] for command in ("list", "show", "tune", "evaluate"))):
        with pytest.raises(SystemExit) as error:
            main(argv)
        assert error.value.code == 0
        assert "usage: convexlearn" in capsys.readouterr().out


def test_without_a_command_the_help_is_shown(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "first steps:" in capsys.readouterr().err


def test_first_steps_are_commands_that_parse(capsys):
    lines = [re.split(r"\s{3,}", line.strip())[0] for line in FIRST_STEPS.splitlines() if line.startswith("  ")]
    commands = [line.partition("convexlearn ")[2].split() for line in lines]
    assert len(commands) == 7
    for argv in commands:
        if "--help" in argv:
            with pytest.raises(SystemExit, match="0"):
                parser().parse_args(argv)
        else:
            name = getattr(parser().parse_args(argv), "name", None)
            assert name is None or name in entries()


def test_tune_prints_a_table_and_writes_json(tuned, capsys):
    content = json.loads((tuned / "deep" / "result.json").read_text())
    assert content["problem"] == "sparse-recovery"
    assert content["seed"] == 3
    assert set(content["rules"]["tuned rho"]["squared_error"]) == {"mean", "standard_error"}


def test_saved_rules_load_with_weights_only(tuned):
    saved = torch.load(tuned / "state.pt", weights_only=True)
    assert saved["problem"] == "sparse-recovery"
    assert list(saved["rules"]["tuned rho"]) == ["free.rho"]


@pytest.mark.parametrize("way", [[], ["--load"]])
def test_evaluate_repeats_the_result_of_saved_rules(tuned, tmp_path, way):
    argv = ["evaluate", "sparse-recovery", *way, str(tuned / "state.pt"), "--json", str(tmp_path / "again.json")]
    assert main(argv) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == json.loads((tuned / "deep" / "result.json").read_text())


def test_evaluate_without_a_file_judges_the_start_values(capsys):
    assert main(["evaluate", "sparse-recovery", *SMALL[:-1]]) == 0
    assert "values at the start" in capsys.readouterr().out


def test_files_of_another_kind_are_misuse(tuned, tmp_path, capsys):
    state, broken, other = str(tuned / "state.pt"), tmp_path / "broken.pt", tmp_path / "other.pt"
    broken.write_text("no archive")
    torch.save({"weights": torch.zeros(1)}, other)
    for argv, message in (
        (["evaluate", "sparse-recovery", str(tmp_path / "none.pt")], "no file"),
        (["evaluate", "sparse-recovery", str(broken)], "is no file of"),
        (["evaluate", "sparse-recovery", str(other)], "is no file of"),
        (["evaluate", "super-resolution", state], "holds rules of 'sparse-recovery'"),
        (["evaluate", "sparse-recovery", state, "--load", state], "once"),
        (["evaluate", "sparse-recovery", state, "--set", "unknowns=13"], "does not fit"),
        (["tune", "sparse-recovery", "--save", str(tmp_path)], "is a folder"),
        (["tune", "sparse-recovery", "--plot", str(broken)], "is a file"),
    ):
        assert main(argv) == 2, argv
        assert message in capsys.readouterr().err


def test_markdown_table(tuned, capsys):
    assert main(["evaluate", "sparse-recovery", str(tuned / "state.pt"), "--markdown"]) == 0
    assert "| tuned rho" in capsys.readouterr().out


def test_a_missing_package_is_a_failure_that_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "skimage", None)
    sys.modules["convexlearn.problems.images"].photograph.cache_clear()
    assert main(["tune", "super-resolution", "--steps", "2"]) == 1
    assert "pip install 'convexlearn[imaging]'" in capsys.readouterr().err
    assert main(["show", "super-resolution"]) == 0
    assert "not built: this problem needs scikit-image" in capsys.readouterr().out


def test_a_missing_matplotlib_is_noticed_before_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["tune", "sparse-recovery", "--plot", str(tmp_path / "figures")]) == 1
    assert "pip install 'convexlearn[plot]'" in capsys.readouterr().err


def test_an_interrupt_ends_the_command(monkeypatch, capsys):
    def interrupt(descent):
        raise KeyboardInterrupt

    monkeypatch.setattr(descent_module.Descent, "advance", interrupt)
    assert main(["tune", "sparse-recovery", *SMALL[:-1]]) == 130
    err = capsys.readouterr().err
    assert err.rstrip().endswith("convexlearn: interrupted")
    assert "fitting: tuned rho" in err
    assert "fitting: oracle rho" not in err


def test_warnings_are_one_line(monkeypatch, capsys):
    def show(arguments):
        print(warnings.formatwarning("something to know", FailureWarning, "file.py", 1), end="")

    usual = warnings.formatwarning
    monkeypatch.setattr("convexlearn.cli.run_list", show)
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "convexlearn: FailureWarning: something to know\n"
    assert warnings.formatwarning is usual


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--version"])
    assert error.value.code == 0
    assert capsys.readouterr().out == f"convexlearn {convexlearn.__version__}\n"


def test_python_dash_m():
    command = [sys.executable, "-m", "convexlearn", "show", "zzz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no problem 'zzz'" in done.stderr
