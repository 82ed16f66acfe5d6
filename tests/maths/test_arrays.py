import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from mechatlas.base import InputError
from mechatlas.maths.arrays import as_array, as_numbers, as_tensor

X = np.arange(12, dtype=np.float32).reshape(4, 3)


@given(
    kind=st.sampled_from(["<f4", ">f4", "<f8", ">f8", "<f2", "<i8", ">i4", "u1", "?"]),
    order=st.permutations([0, 1, 2]),
    steps=st.tuples(*[st.sampled_from([1, 2, -1, -2])] * 3),
)
def test_any_order_stride_and_byte_order_gives_the_same_numbers(kind, order, steps):
    base = np.arange(4 * 6 * 8).reshape(4, 6, 8).transpose(order).astype(kind)
    value = base[tuple(slice(None, None, step) for step in steps)]
    for found in (as_array(value, "a b c", "x"), as_tensor(value, "a b c", "x").numpy()):
        assert found.tolist() == value.tolist()
        assert found.dtype.isnative
    assert as_array(value, "a b c", "x", dtype=np.float32).flags.c_contiguous


def test_arrays_and_tensors_that_fit_are_not_copied():
    assert np.shares_memory(as_array(X, "a b", "x"), X)
    assert np.shares_memory(as_tensor(X, "a b", "x").numpy(), X)
    tensor = torch.from_numpy(X)
    assert as_tensor(tensor, "a b", "x").data_ptr() == tensor.data_ptr()
    assert np.shares_memory(as_array(tensor, "a b", "x"), X)


def test_a_column_first_memory_map_stays_a_map(tmp_path):
    np.save(tmp_path / "x.npy", np.asfortranarray(X))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert np.shares_memory(as_tensor(x, "a b", "x").numpy(), x)


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.from_numpy(X).to_sparse(), r"x is a sparse tensor.*\.to_dense\(\)"),
        (sparse.csr_array(X), r"x is a sparse matrix.*\.toarray\(\)"),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "x is a nested tensor"),
        (torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.qint8), "quantized tensor"),
        (torch.zeros(2, 3, device="meta"), "on the meta device"),
        (np.ma.masked_array(X, mask=X > 9), "masked array with 2 masked values"),
        ([np.ma.masked_array(X[0], mask=True)], r"x\[0\] is a masked array"),
        (X + 1j, "holds complex"),
        ([[1, 2], [3]], "is not an array of numbers"),
        (["a"], "holds <U1 values"),
        ("x.npy", r"x is the text 'x\.npy'.*numpy\.load"),
        (None, "x is a NoneType"),
        ({"a": 1}, "x is a dict"),
        (np.array(["2020-01-01"], "M8[D]"), "holds datetime64"),
        (Endless(), "Endless whose rows cannot be read by number"),
        (
            DataLoader(TensorDataset(torch.zeros(2, 3)), collate_fn=lambda items: items),
            "DataLoader whose rows cannot be read by number",
        ),
        (
            DataLoader(TensorDataset(torch.zeros(2, 3)), sampler=WeightedRandomSampler([1.0], 2)),
            "DataLoader whose rows cannot be read by number",
        ),
        (torch.zeros(3), r"x has shape \(3,\), expected an array \(a, b\)"),
    ],
)
def test_what_is_no_array_is_named(value, message):
    with pytest.raises(InputError, match=message):
        as_array(value, "a b", "x")
    with pytest.raises(InputError, match=message):
        as_tensor(value, "a b", "x")


def test_tensors_in_lists_are_taken_whatever_their_format():
    rows = [torch.ones(3, dtype=torch.bfloat16, requires_grad=True), torch.zeros(3)]
    assert as_numbers(rows, "x").tolist() == [[1, 1, 1], [0, 0, 0]]
    assert as_numbers(torch.ones(2).to(torch.float8_e4m3fn), "x").dtype == np.float32
    assert as_numbers(np.array([1.5], np.longdouble), "x").dtype == np.float64
    assert as_numbers(range(3), "x").tolist() == [0, 1, 2]
