"""Tables and plots of records and histories."""

import json
import math
import sys

import pytest

from convexlearn.errors import OptionError
from convexlearn.report import (
    Estimate,
    Record,
    format_table,
    new_axes,
    plot_history,
    plot_records,
    save,
    table,
    to_json,
)

RECORDS = [
    Record("bicubic", {"mse": Estimate(0.004, 0.001), "psnr": Estimate(24.9, 1.1)}, {"objective": 0}, 4e-5),
    Record("tuned", {"mse": Estimate(0.0035, 0.0009), "psnr": Estimate(25.6, 1.1)}, {"objective": 1}, 0.13),
]


def test_plain_table_is_aligned_and_complete():
    lines = table(RECORDS).split("\n")
    assert lines[0].split() == ["rule", "mse", "psnr", "objective", "ms", "per", "decision"]
    assert lines[2].split() == ["bicubic", "0.004000", "±", "0.001000", "24.90", "±", "1.10", "0", "0.040"]
    assert lines[3].startswith("tuned    0.003500 ± 0.000900  25.60 ± 1.10")
    assert lines[3].split()[-2:] == ["1", "130"]
    assert len({len(line) for line in lines}) == 1


def test_markdown_table_has_one_cell_per_column():
    lines = table(RECORDS, "markdown").split("\n")
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {6}
    assert set(lines[1]) <= set("|:-")


def test_a_column_of_parameters_appears_only_where_somebody_has_some():
    assert "network" not in table([Record("a", {}, {"network": 0, "hyper": 2})])
    assert "hyper" in table([Record("a", {}, {"network": 0, "hyper": 2})])


def test_a_measure_that_one_record_lacks_is_left_blank():
    rows = [Record("a", {"x": Estimate(1.0)}), Record("b", {"y": Estimate(2.0)})]
    assert table(rows).split("\n")[2].split() == ["a", "1.000", "±", "0.000"]


@pytest.mark.parametrize(
    ("mean", "error", "digits", "text"),
    [
        (1234.5, 20.0, 3, "1234 ± 20"),
        (0.0, 0.0, 3, "0.00 ± 0.00"),
        (-0.5, 0.25, 2, "-0.50 ± 0.25"),
        (1.0, math.nan, 3, "1.00 ± nan"),
        (9.9999, 0.1, 3, "10.00 ± 0.10"),
    ],
)
def test_estimates_show_significant_digits(mean, error, digits, text):
    assert Estimate(mean, error).text(digits) == text


def test_json_keeps_every_number():
    content = json.loads(json.dumps(to_json(RECORDS)))
    assert content["tuned"]["mse"] == {"mean": 0.0035, "standard_error": 0.0009}
    assert list(content) == ["bicubic", "tuned"]


def test_unknown_style_and_measure_are_errors_that_suggest():
    with pytest.raises(OptionError, match="did you mean 'markdown'"):
        format_table(["a"], [], style="markdwn")
    with pytest.raises(OptionError, match="did you mean 'psnr'"):
        RECORDS[0].measure("psnrr")


def test_plot_of_records_has_a_point_per_record():
    ax = plot_records(RECORDS, "psnr")
    line = ax.lines[0]
    assert list(line.get_xdata()) == [24.9, 25.6]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["bicubic", "tuned"]
    assert ax.get_xlabel() == "psnr"


def test_plot_of_a_history_leaves_out_steps_without_the_value():
    history = [{"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.0, "validation": 2.5}, {"step": 2, "loss": 1.0}]
    ax = plot_history(history, label="run")
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["run: loss", "run: validation"]
    assert list(lines["run: loss"].get_ydata()) == [3.0, 2.0, 1.0]
    assert list(lines["run: validation"].get_xdata()) == [1]


def test_plot_of_a_history_draws_into_given_axes_and_refuses_unknown_keys():
    axes = new_axes(1, 2)
    assert plot_history([{"step": 0, "loss": 1.0}], ["loss"], ax=axes[0, 1]) is axes[0, 1]
    with pytest.raises(OptionError, match="did you mean 'loss'"):
        plot_history([{"step": 0, "loss": 1.0}], ["los"])


def test_figures_belong_to_no_window(tmp_path):
    ax = plot_records(RECORDS, "mse")
    save(ax, tmp_path / "mse.png")
    assert (tmp_path / "mse.png").read_bytes().startswith(b"\x89PNG")
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'convexlearn\[plot\]'"):
        plot_records(RECORDS, "mse")
