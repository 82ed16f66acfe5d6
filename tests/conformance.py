"""The contracts of dictionaries and rows, as code.

A new kind of dictionary passes all of `CHECKS`, a new source of rows all of `ROWS_CHECKS`.
"""

import itertools

import torch

from mechatlas.base import Dictionary, Rows


def rows(dictionary: Dictionary, n: int) -> torch.Tensor:
    return torch.randn(n, dictionary.d_in, generator=torch.Generator().manual_seed(0))


def decoded(dictionary: Dictionary, code: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of a changed code; a dictionary that scales each row by itself needs the rows too."""
    if getattr(dictionary, "norm", None) is None:
        return dictionary.decode(code)
    return dictionary.decode(code, x)  # pyright: ignore[reportCallIssue]


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
    d_out = getattr(dictionary, "d_out", dictionary.d_in)  # a transcoder gives another site
    assert dictionary.decode(code).shape == (5, d_out)


def decoding_is_affine(dictionary: Dictionary) -> None:
    x = rows(dictionary, 6)
    code = dictionary.encode(x)
    zero = decoded(dictionary, torch.zeros_like(code), x)
    parts = decoded(dictionary, code, x) - zero
    torch.testing.assert_close(dictionary.decode(code) - zero, parts)
    if getattr(getattr(dictionary, "sparsity", None), "by_site", False):
        return  # a code twice as large may open what a site had closed
    torch.testing.assert_close(decoded(dictionary, 2 * code, x) - zero, 2 * parts)


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


def first(rows: Rows, n: int, size: int, **options: int) -> torch.Tensor:
    batches = itertools.islice(rows.batches(size, **options), n)
    return torch.cat([batch.row for batch in batches])


def they_fit_the_protocol(rows: Rows) -> None:
    assert isinstance(rows, Rows)
    batch = next(rows.batches(7))
    assert batch.x.shape == (7, rows.d_in)
    assert batch.x.dtype == torch.float32
    assert batch.row.shape == (7,)


def an_epoch_has_every_row_once(rows: Rows) -> None:
    drawn = first(rows, 2 * rows.n_rows, 1)
    one, two = drawn[: rows.n_rows], drawn[rows.n_rows :]
    assert len(one.unique()) == rows.n_rows
    assert torch.equal(one.sort().values, two.sort().values)
    assert not torch.equal(one, two)


def the_order_depends_on_the_seed_alone(rows: Rows) -> None:
    assert torch.equal(first(rows, 3, 20, seed=1), first(rows, 3, 20, seed=1))
    assert not torch.equal(first(rows, 3, 20, seed=1), first(rows, 3, 20, seed=2))


def a_stream_can_be_entered_anywhere(rows: Rows) -> None:
    whole = first(rows, 12, 33, seed=3)
    for start in (1, 4, 9):
        assert torch.equal(first(rows, 3, 33, seed=3, start=start), whole[33 * start :][: 3 * 33])


def a_row_is_the_same_whenever_it_comes(rows: Rows) -> None:
    seen: dict[int, torch.Tensor] = {}
    for batch in itertools.islice(rows.batches(rows.n_rows), 2):
        for x, row in zip(batch.x, batch.row.tolist(), strict=True):
            assert torch.equal(seen.setdefault(row, x), x)


def held_out_rows_are_never_yielded(rows: Rows) -> None:
    held = rows.held_out(10**6)
    assert 1 <= len(held.x) == len(held.row)
    assert not set(held.row.tolist()) & set(first(rows, rows.n_rows, 1).tolist())
    assert torch.equal(rows.held_out(3).x, held.x[:3])


def every_row_can_be_described(rows: Rows) -> None:
    words = {rows.describe(row) for row in first(rows, rows.n_rows, 1).tolist()}
    assert len(words) == rows.n_rows


ROWS_CHECKS = [
    they_fit_the_protocol,
    an_epoch_has_every_row_once,
    the_order_depends_on_the_seed_alone,
    a_stream_can_be_entered_anywhere,
    a_row_is_the_same_whenever_it_comes,
    held_out_rows_are_never_yielded,
    every_row_can_be_described,
]
