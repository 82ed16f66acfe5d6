"""The contract of a dictionary, as code. A new kind passes all of `CHECKS`."""

import torch

from mechatlas.base import Dictionary


def rows(dictionary: Dictionary, n: int) -> torch.Tensor:
    return torch.randn(n, dictionary.d_in, generator=torch.Generator().manual_seed(0))


def it_fits_the_protocol(dictionary: Dictionary) -> None:
    assert isinstance(dictionary, Dictionary)
    assert dictionary.d_in >= 1
    assert dictionary.n_latents >= 1


def code_is_sparse(dictionary: Dictionary) -> None:
    code = dictionary.encode(rows(dictionary, 64))
    assert (code == 0).float().mean() > 0.2, "most latents should be exactly zero"


def code_ignores_its_neighbours(dictionary: Dictionary) -> None:
    x = rows(dictionary, 64)
    torch.testing.assert_close(dictionary.encode(x)[:8], dictionary.encode(x[:8]))


def shapes_agree(dictionary: Dictionary) -> None:
    x = rows(dictionary, 5)
    code = dictionary.encode(x)
    assert code.shape == (5, dictionary.n_latents)
    assert dictionary.decode(code).shape == x.shape


def decoding_is_affine(dictionary: Dictionary) -> None:
    code = dictionary.encode(rows(dictionary, 6))
    zero = dictionary.decode(torch.zeros_like(code))
    parts = dictionary.decode(code) - zero
    torch.testing.assert_close(dictionary.decode(2 * code) - zero, 2 * parts)


def encoding_changes_nothing(dictionary: Dictionary) -> None:
    x = rows(dictionary, 7)
    kept = x.clone()
    first = dictionary.encode(x)
    torch.testing.assert_close(x, kept)
    torch.testing.assert_close(dictionary.encode(x), first)


CHECKS = [
    it_fits_the_protocol,
    code_is_sparse,
    code_ignores_its_neighbours,
    shapes_agree,
    decoding_is_affine,
    encoding_changes_nothing,
]
