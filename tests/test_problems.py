"""Every entry of the catalogue keeps the contract; the entries' own mathematics is right."""

import json
import math
import re
import socket

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from convexlearn.cli import main
from convexlearn.errors import OptionError
from convexlearn.objectives import maximizes
from convexlearn.problems import entries, find, images, sparse_recovery, super_resolution
from convexlearn.problems.catalogue import Budget, load
from convexlearn.problems.fitting import grid
from convexlearn.simulate.pairs import Pairs

NAMES = sorted(entries())


@pytest.fixture(scope="module", params=NAMES)
def smoke(request, tmp_path_factory):
    """Entry, output folder and JSON of `convexlearn tune NAME --steps 2`."""
    folder = tmp_path_factory.mktemp(request.param)
    files = [
        "--json",
        str(folder / "a.json"),
        "--plot",
        str(folder / "new" / "figures"),
        "--save",
        str(folder / "a.pt"),
    ]
    assert main(["tune", request.param, "--steps", "2", "--quiet", *files]) == 0
    return find(request.param), folder, json.loads((folder / "a.json").read_text())


def test_an_entry_says_what_it_is():
    for name, entry in entries().items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
        assert entry.name == name
        assert re.search(r"Example|Eq\.|Table|Fig", entry.source)
        for text in (entry.summary, entry.shapes, entry.reference.text):
            assert text.strip()
        assert re.search(r"^x: .*\(B, ", entry.shapes, re.MULTILINE)
        assert re.search(r"^s: .*\(B, ", entry.shapes, re.MULTILINE)


def test_a_smoke_run_writes_json_by_the_scheme(smoke):
    entry, _, content = smoke
    assert set(content) == {"problem", "seed", "rules"}
    assert content["problem"] == entry.name
    assert content["seed"] == 0
    assert len(content["rules"]) >= 3
    for measures in content["rules"].values():
        for estimate in measures.values():
            assert set(estimate) == {"mean", "standard_error"}
            assert math.isfinite(estimate["mean"])
            assert estimate["standard_error"] >= 0


def test_a_smoke_run_draws_pictures(smoke):
    pictures = list((smoke[1] / "new" / "figures").glob("*.png"))
    assert len(pictures) >= 2
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_no_rule_beats_a_bound(smoke):
    entry, _, content = smoke
    study = entry.build(0, entry.setting)
    for measure, bound in study.bounds.items():
        sign = -1 if maximizes(study.measures[measure]) else 1
        for name, measures in content["rules"].items():
            e = measures[measure]
            assert sign * (e["mean"] - bound) > -3 * e["standard_error"], name


def test_saved_rules_give_the_same_result_again(smoke):
    entry, folder, content = smoke
    assert main(["evaluate", entry.name, str(folder / "a.pt"), "--json", str(folder / "b.json")]) == 0
    assert json.loads((folder / "b.json").read_text()) == content


def test_the_same_seed_gives_the_same_result(smoke):
    entry, _, content = smoke
    assert entry.tune(0, 2).json() == content


def test_an_untouched_rule_depends_on_the_seed_only_through_the_data(smoke):
    entry, _, content = smoke
    fixed = next(n for n, c in entry.build(0, entry.setting).contenders.items() if c.fit is None)
    other = entry.evaluate(1).json()
    assert other["rules"][fixed] != content["rules"][fixed]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_full_run_meets_the_reference_answer(name):
    entry = find(name)
    assert entry.reference.misses(entry.tune(0)) == []


def test_unknown_names_options_and_values_are_errors_that_suggest():
    with pytest.raises(OptionError, match="did you mean 'super-resolution'"):
        find("super-resolutoin")
    entry = find("super_resolution")
    with pytest.raises(OptionError, match="did you mean 'noise'"):
        entry.configure(niose=1)
    with pytest.raises(OptionError, match="no bool"):
        entry.configure(weights="maybe")
    with pytest.raises(OptionError, match="crop must be a multiple of 8"):
        entry.configure(crop=60)
    with pytest.raises(OptionError, match="stride must be 1, 2 or 4"):
        entry.configure(stride=3)
    with pytest.raises(OptionError, match="steps must be an integer of at least 1"):
        entry.tune(steps=0)
    assert entry.configure(weights="no", crop="64", noise="0.5") == super_resolution.Setting(
        weights=False, crop=64, noise=0.5
    )


def test_a_state_of_other_rules_is_refused():
    entry = find("sparse-recovery")
    study = entry.build(0, entry.configure(unknowns=8, measurements=4))
    state = {name: dict(c.rule.state_dict()) for name, c in study.contenders.items()}
    with pytest.raises(OptionError, match="no rule 'extra'"):
        load(study, {**state, "extra": {}})
    with pytest.raises(OptionError, match="lacks the rule 'affine'"):
        load(study, {n: v for n, v in state.items() if n != "affine"})


def test_grid_finds_the_minimum_and_sets_it():
    class Constant(torch.nn.Module):
        level = 0.0

        def forward(self, x):
            return torch.full_like(x, self.level)

    pairs, rule = Pairs(torch.zeros(4, 1), torch.full((4, 1), 2.0)), Constant()
    fit = grid(pairs, lambda t: (t.decision - t.target).square().sum(1), lambda r: r, "level", np.arange(5.0))
    found = fit(rule, Budget())
    assert found.best == rule.level == 2.0
    assert found.means.tolist() == [4.0, 1.0, 0.0, 1.0, 4.0]
    assert fit(rule, Budget(steps=2)).values.tolist() == [0.0, 4.0]


# super-resolution


def test_photographs_are_bundled_and_split_by_image(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(socket, "socket", refuse)
    images.photograph.cache_clear()
    names = [*images.TRAIN, *images.VALIDATION, *images.TEST]
    assert len(set(names)) == len(names)
    assert len(images.TEST) >= 4
    for name in names:
        photo = images.photograph(name)
        assert photo.min() >= 0
        assert photo.max() <= 1
        assert photo.std() > 0.03


def test_every_low_resolution_pixel_is_a_weighted_mean_centred_on_its_place():
    matrix = images.downsampling(5, 1.4)
    assert matrix.shape == (5, 14)
    torch.testing.assert_close(matrix.sum(1), torch.ones(5, dtype=torch.float64))
    centres = matrix @ torch.arange(14, dtype=torch.float64)
    torch.testing.assert_close(centres, 2.5 + 2 * torch.arange(5, dtype=torch.float64))


def test_the_model_of_a_patch_agrees_with_the_camera():
    side, generator = super_resolution.SIDE, torch.Generator().manual_seed(0)
    window = torch.rand(side, side, generator=generator, dtype=torch.float64)
    x, s = images.Camera(blur=1.4, noise=0.0, margin=0).shoot(window, (0, 0), side, generator)
    H_Psi, Psi = super_resolution.model(1.4)
    r = dctn(window.numpy(), norm="ortho").ravel()
    np.testing.assert_allclose(H_Psi @ r, x.numpy().ravel(), atol=1e-6)
    np.testing.assert_allclose(Psi @ r, s.numpy().ravel(), atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_mosaic_puts_every_pixel_in_its_place(stride):
    class Repeat(torch.nn.Module):
        def forward(self, x):
            squares = x.reshape(-1, super_resolution.PATCH, super_resolution.PATCH)
            return squares.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)

    x = torch.rand(3, 22, 14, generator=torch.Generator().manual_seed(0))
    m = super_resolution.MARGIN
    expected = x[:, m:-m, m:-m].repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(super_resolution.Mosaic(Repeat(), stride)(x), expected)


def test_bicubic_reproduces_a_plane():
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    s = super_resolution.interpolate((rows + 2 * columns)[None])
    fine = (torch.arange(28.0) - 0.5) / 2 + super_resolution.MARGIN
    torch.testing.assert_close(s[0], fine[:, None] + 2 * fine[None, :])


def test_a_flat_picture_stays_flat_because_the_mean_is_not_penalised():
    rule = super_resolution.declare(1.4, 0.01)
    with torch.no_grad():
        s = rule(torch.full((1, 36), 0.3, dtype=torch.float64))
    torch.testing.assert_close(s, torch.full((1, 144), 0.3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_without_the_option_no_weights_are_tuned():
    entry = find("super-resolution")
    assert "tuned weights" not in entry.build(0, entry.configure(weights=False, crop=32)).contenders


# sparse recovery


def test_the_bound_is_the_error_of_least_squares_on_the_true_support():
    setting = sparse_recovery.Setting(measurements=6, unknowns=8, nonzeros=2, noise=0.5)
    H = sparse_recovery.draw(0, setting).H
    s = torch.zeros(1, 8, dtype=torch.float64)
    s[0, [1, 5]] = torch.tensor([1.0, -2.0], dtype=torch.float64)
    noise = 0.5 * np.random.default_rng(0).standard_normal((200_000, 6))
    estimate = (s.numpy() @ H.numpy().T + noise) @ np.linalg.pinv(H.numpy()[:, [1, 5]]).T
    errors = ((estimate - [1.0, -2.0]) ** 2).sum(1)
    bound = sparse_recovery.known_support_error(H, s, 0.5)
    assert abs(errors.mean() - bound) < 4 * errors.std() / math.sqrt(len(errors))


def test_draws_are_sparse_and_follow_the_model():
    setting = sparse_recovery.Setting(noise=0.0)
    data = sparse_recovery.draw(1, setting)
    x, s = data.train
    assert ((s != 0).sum(1) == setting.nonzeros).all()
    torch.testing.assert_close(x, s @ data.H.mT)
    torch.testing.assert_close(data.H.norm(dim=0), torch.ones(64, dtype=torch.float64))
