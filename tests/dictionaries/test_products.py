"""The product of a step is the same by every library that torch has."""

import pytest
import torch

from mechatlas.dictionaries.engine import products


@pytest.mark.parametrize("library", ["mkl", "onednn", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_library_gives_the_product(library, dtype, monkeypatch):
    if library == "mkl" and not hasattr(torch.ops.mkl, "_mkl_linear"):
        pytest.skip("this torch was built without MKL")
    monkeypatch.setattr(products, "_library", lambda: library)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(70, 24, generator=random, dtype=dtype)
    rows = torch.randn(50, 24, generator=random, dtype=dtype)
    product = products.product_with(rows, 32)
    for part in x.split(32):  # the last is shorter
        assert torch.allclose(product(part), part @ rows.T, atol=1e-5)


def test_the_choice_is_the_same_whenever_it_is_made():
    products._library.cache_clear()
    first = products._library()
    products._library.cache_clear()
    assert first == products._library()
