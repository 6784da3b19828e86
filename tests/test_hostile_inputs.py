"""Every public rule, layer and function of tensors under unusual and unsound inputs; `pytest -s` prints the counts.

Layout, dtype, grad mode and batch size must not matter. What is unsound is refused by an error of convexlearn that
names it, or harms its own sample alone; it is never a crash in a library below, and never a silent answer.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import fuzz_rules
import pytest
import torch
from fuzz_subjects import Subject, subjects
from torch import Tensor

import convexlearn as cl
from convexlearn.errors import ConvexLearnError, ConvexLearnWarning

SUBJECTS = subjects() | fuzz_rules.subjects()
COUNTS: dict[str, int] = {}
BAD = {"nan": float("nan"), "inf": float("inf"), "minus inf": float("-inf")}
MODES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(scope="module", params=list(SUBJECTS))
def subject(request) -> Subject:
    return SUBJECTS[request.param]()


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    yield
    print("\ninputs tried:", ", ".join(f"{kind} {count}" for kind, count in COUNTS.items()))


def run(subject: Subject, kind: str, inputs: Any, mode: Any = contextlib.nullcontext) -> tuple[Tensor, ...]:
    """The outputs, warnings of ours aside."""
    COUNTS[kind] = COUNTS.get(kind, 0) + 1
    with warnings.catch_warnings(), mode():
        warnings.simplefilter("ignore", ConvexLearnWarning)
        out = subject.call(*inputs)
    return out if isinstance(out, tuple) else (out,)


def replaced(inputs: tuple, index: int, value: Any) -> tuple:
    return tuple(value if k == index else x for k, x in enumerate(inputs))


def assert_same(outputs: tuple, expected: tuple, tolerance: float) -> None:
    assert len(outputs) == len(expected)
    for a, b in zip(outputs, expected):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def rows(outputs: tuple, which: Any) -> tuple:
    return tuple(x[which] for x in outputs)


def backward(outputs: tuple) -> None:
    """Differentiate the sum of all that has a gradient."""
    if live := [out for out in outputs if out.requires_grad]:
        sum(out.abs().sum() for out in live).backward()


def strided(x: Tensor) -> Tensor:
    """x with a NaN between any two entries in memory."""
    wide = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def test_memory_layout_does_not_matter(subject):
    plain = run(subject, "layout", subject.inputs)
    assert_same(run(subject, "layout", tuple(map(strided, subject.inputs))), plain, subject.tolerance)
    turned = tuple(x.transpose(0, -1).contiguous().transpose(0, -1) for x in subject.inputs)
    assert_same(run(subject, "layout", turned), plain, subject.tolerance)
    expanded = tuple(x[:1].expand(3, *x.shape[1:]) for x in subject.inputs)
    first = tuple(p[:1].expand(3, *p.shape[1:]) for p in plain)
    assert_same(run(subject, "layout", expanded), first, subject.tolerance)


def test_grad_modes_do_not_matter(subject):
    plain = run(subject, "grad mode", subject.inputs)
    for mode in MODES.values():
        assert_same(run(subject, "grad mode", subject.inputs, mode), plain, subject.tolerance)
    for k, x in enumerate(subject.inputs):
        mixed = run(subject, "grad mode", replaced(subject.inputs, k, x.clone().requires_grad_()))
        assert_same(mixed, plain, subject.tolerance)
        backward(mixed)


def test_batch_sizes(subject):
    plain = run(subject, "batch size", subject.inputs)
    one = run(subject, "batch size", tuple(x[1:2] for x in subject.inputs))
    assert_same(one, rows(plain, slice(1, 2)), subject.tolerance)
    empty = run(subject, "batch size", tuple(x[:0].clone().requires_grad_() for x in subject.inputs))
    for out, full in zip(empty, plain):
        assert out.shape == (0, *full.shape[1:])
    backward(empty)


def test_dtypes(subject):
    plain = run(subject, "dtype", subject.inputs)
    for mode in (contextlib.nullcontext, *MODES.values()):
        single = run(subject, "dtype", tuple(x.float() for x in subject.inputs), mode)
        assert_same(single, plain, 0.3 if mode is MODES["autocast"] else 1e-2)
    kinds = (torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
    for k, x in enumerate(subject.inputs):
        for dtype in kinds:  # rounded values may leave a domain, which is then said
            with contextlib.suppress(ConvexLearnError):
                run(subject, "dtype", replaced(subject.inputs, k, x.to(dtype)))
        with contextlib.suppress(ConvexLearnError):
            assert_same(run(subject, "dtype", replaced(subject.inputs, k, x.numpy())), plain, subject.tolerance)
    for k, x in enumerate(subject.inputs):
        if not subject.plain and type(getattr(subject.call, "iteration", None)) is not cl.RobustPCA:
            with pytest.raises(ConvexLearnError, match="complex"):
                run(subject, "dtype", replaced(subject.inputs, k, x.to(torch.complex128)))


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e-12, 1e6, 1e12])
def test_scales_give_numbers_or_an_error(subject, scale):
    if subject.diverges and scale > 1:
        return
    try:
        outputs = run(subject, "scale", replaced(subject.inputs, 0, scale * subject.inputs[0]))
    except ConvexLearnError:
        return
    for out in outputs:
        assert torch.isfinite(out.double()).all()


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_entry_harms_its_sample_alone_or_is_named(subject, bad):
    plain, said = run(subject, "not finite", subject.inputs), []
    for k, x in enumerate(subject.inputs):
        spoilt = x.clone()
        spoilt[1].view(-1)[0] = BAD[bad]
        try:
            outputs = run(subject, "not finite", replaced(subject.inputs, k, spoilt))
        except ConvexLearnError as error:
            said.append(str(error))
            continue
        assert_same(rows(outputs, [0, 2]), rows(plain, [0, 2]), subject.tolerance)
        if bad == "nan" and not subject.gaps:
            for out in outputs:
                lost = ~torch.isfinite(out[1]) if out.is_floating_point() else out[1] < 0
                assert lost.any()
    for message in said:
        assert any(word in message for word in ("NaN", "nan", "inf", "finite"))


def test_wrong_shapes_are_refused(subject):
    wrong = (RuntimeError, ValueError, TypeError) if subject.plain else ConvexLearnError
    for k, x in enumerate(subject.inputs):
        shapes = [] if subject.lengths else [torch.cat([x, x], -1), x.flatten()[:5]]
        shapes += [] if subject.leading else [x[None, None, None], torch.tensor(1.0).double()]
        shapes += [torch.cat([x, x])] if len(subject.inputs) > 1 else []
        for value in shapes:
            with pytest.raises(wrong):
                run(subject, "shape", replaced(subject.inputs, k, value))


@pytest.mark.parametrize("junk", [None, "x", object(), [["a"], [1]], {"x": 1}], ids=lambda v: type(v).__name__)
def test_what_is_no_tensor_is_refused(subject, junk):
    for k in range(len(subject.inputs)):
        if junk is None and k and subject.optional:
            continue
        with pytest.raises(ConvexLearnError):
            run(subject, "no tensor", replaced(subject.inputs, k, junk))


def test_missing_and_superfluous_inputs_are_refused(subject):
    many = [] if subject.lengths else [(*subject.inputs, *subject.inputs, subject.inputs[0])]
    few = () if subject.optional else subject.inputs[:-1]
    for inputs in (few, *many):
        with pytest.raises((ConvexLearnError, TypeError)):
            run(subject, "count", inputs)
