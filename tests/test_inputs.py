import numpy as np
import pytest
import torch

from convexlearn.errors import MissingParameterError, ShapeError
from convexlearn.inputs import as_contexts, as_floating, as_tensor, flattened


def test_numbers_and_arrays_become_tensors_of_their_precision():
    assert as_tensor("x", np.float32([1.0])).dtype == torch.float32
    assert as_tensor("x", [1, 2]).dtype == as_tensor("x", np.arange(2)).dtype == torch.float64
    tensor = torch.ones(2)
    assert as_tensor("x", tensor) is tensor is as_floating("x", tensor)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_count_as_the_default_dtype(dtype):
    assert as_tensor("x", torch.ones(2, dtype=dtype)).dtype == dtype
    torch.testing.assert_close(as_floating("x", torch.ones(2, dtype=dtype)), torch.ones(2))


@pytest.mark.parametrize(("value", "said"), [(None, "is None"), ("x", "got str"), (torch.ones(1) * 1j, "is complex")])
def test_what_is_no_real_tensor_is_named(value, said):
    with pytest.raises(MissingParameterError, match=f"parameter 'rho' .*{said}"):
        as_tensor("rho", value)


def test_complex_arrays_do_not_lose_their_imaginary_part():
    with pytest.raises(MissingParameterError, match="'rho' is complex"):
        as_tensor("rho", np.ones(1) * 1j)


def test_contexts_are_counted_and_have_a_batch():
    dtypes = [x.dtype for x in as_contexts("Rule", (torch.ones(2), torch.ones(2, dtype=torch.int64)))]
    assert dtypes == [torch.float32] * 2
    with pytest.raises(MissingParameterError, match="Rule needs a context"):
        as_contexts("Rule", ())
    with pytest.raises(ShapeError, match="Rule takes 1 context, got 2"):
        as_contexts("Rule", (torch.ones(2), torch.ones(2)), most=1)
    with pytest.raises(ShapeError, match="Rule: context 'x1' must have shape"):
        as_contexts("Rule", (torch.ones(2), torch.tensor(1.0)))


def test_flattened_joins_the_entries_of_a_sample():
    x, y = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([7.0, 8.0])
    torch.testing.assert_close(flattened("Rule", (x, y)), torch.cat([x.reshape(2, 6), y[:, None]], 1))
    assert flattened("Rule", (x[:0],)).shape == (0, 6)
    with pytest.raises(ShapeError, match=r"different batch sizes \[2, 1\]"):
        flattened("Rule", (x, y[:1]))
