"""The functions of fuzz_numeric under the inputs of test_hostile_inputs, and arguments that none can take."""

import contextlib

import pytest
import test_hostile_inputs as hostile
import torch
from fuzz_numeric import Function, functions, refused
from test_hostile_inputs import (  # noqa: F401  (pytest collects them here, for the subjects of this file)
    report,
    test_a_bad_entry_harms_its_sample_alone_or_is_named,
    test_batch_sizes,
    test_grad_modes_do_not_matter,
    test_memory_layout_does_not_matter,
    test_missing_and_superfluous_inputs_are_refused,
    test_scales_give_numbers_or_an_error,
    test_wrong_shapes_are_refused,
)

from convexlearn.errors import ConvexLearnError

FUNCTIONS, REFUSED = functions(), refused()
KINDS = (torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


@pytest.fixture(scope="module", params=list(FUNCTIONS))
def subject(request) -> Function:
    return FUNCTIONS[request.param]()


def test_dtypes(subject):
    plain = hostile.run(subject, "dtype", subject.inputs)
    single = hostile.run(subject, "dtype", tuple(x.float() if x.is_floating_point() else x for x in subject.inputs))
    hostile.assert_same(single, plain, 1e-2)
    for k, x in enumerate(subject.inputs):
        for dtype in KINDS:
            with contextlib.suppress(ConvexLearnError):
                hostile.run(subject, "dtype", hostile.replaced(subject.inputs, k, x.to(dtype)))
        with contextlib.suppress(ConvexLearnError):
            array = hostile.run(subject, "dtype", hostile.replaced(subject.inputs, k, x.numpy()))
            hostile.assert_same(array, plain, subject.tolerance)
        given = hostile.replaced(subject.inputs, k, x.to(torch.complex128))
        if k < subject.complexes:
            outputs = tuple(out.real for out in hostile.run(subject, "dtype", given))
            hostile.assert_same(outputs, plain, subject.tolerance)
        elif not subject.plain:
            with pytest.raises(ConvexLearnError, match="complex"):
                hostile.run(subject, "dtype", given)


def test_leading_dimensions_are_a_batch(subject):
    """As the flattened batch; where there is one batch dimension only, expanded inputs carry gradients."""
    twice = tuple(torch.stack([x, x.flip(0)]) for x in subject.inputs)
    flat = tuple(x.flatten(0, 1).requires_grad_() for x in twice)
    expected = hostile.run(subject, "leading", flat)
    hostile.backward(expected)
    if subject.batches:
        found = hostile.run(subject, "leading", twice)
        hostile.assert_same(tuple(out.flatten(0, 1) for out in found), expected, subject.tolerance)


@pytest.mark.parametrize("junk", [None, "x", object(), [["a"], [1]], {"x": 1}], ids=lambda v: type(v).__name__)
def test_what_is_no_tensor_is_refused(subject, junk):
    for k in range(len(subject.inputs)):
        if junk is None and k in subject.optional:
            continue
        with pytest.raises(ConvexLearnError):
            hostile.run(subject, "no tensor", hostile.replaced(subject.inputs, k, junk))


@pytest.mark.parametrize("name", REFUSED)
def test_unsound_arguments_are_named(name):
    hostile.COUNTS["argument"] = hostile.COUNTS.get("argument", 0) + 1
    word, call = REFUSED[name]
    with pytest.raises(ConvexLearnError, match=rf"\b{word}\b"):
        call()
