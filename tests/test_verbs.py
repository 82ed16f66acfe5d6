"""Every verb takes arrays in whatever form people have them: the answer is one, or a sentence."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mechatlas as ma
from mechatlas.base import UserError


def quarters(*shape: int) -> np.ndarray:
    """Numbers that every format holds exactly."""
    random = np.random.default_rng(len(shape) + shape[0])
    return (random.integers(-8, 9, shape) / 4).astype(np.float32)


X, ROWS, BLOCKS = quarters(120, 8), quarters(16, 8), quarters(6, 4, 5)
LEFT, RIGHT, UNEMBED = quarters(5, 12), quarters(5, 12), quarters(12, 5)
BRANCHES = {"a": slice(0, 4), "b": slice(4, 8)}
TABLE = ma.group("C5").table


def sae() -> ma.Autoencoder:
    torch.manual_seed(0)
    return ma.Autoencoder(d_in=8, n_latents=16, sparsity=ma.TopK(k=3))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


def collected(x: Any, folder: Path) -> Any:
    return ma.collect(network(), x, ["0"], str(folder)).rows("0").held_out(99).x


VERBS: dict[str, tuple[np.ndarray, Callable[[Any, Path], Any]]] = {
    "evaluate": (X, lambda x, _: ma.evaluate(sae(), x).fvu),
    "evaluate target": (X, lambda x, _: ma.evaluate(sae(), X, target=x).fvu),
    "train": (X, lambda x, _: ma.train(sae(), x, steps=2, batch_size=32).W_dec),
    "match": (ROWS, lambda x, _: ma.match(x, ROWS[::-1].copy()).columns),
    "assign": (ROWS, lambda x, _: ma.assign(x).columns),
    "branches": (ROWS, lambda x, _: ma.branches(x, BRANCHES).share),
    "branches on rows": (X, lambda x, _: ma.branches(ROWS, BRANCHES, activations=x).share),
    "symmetry": (BLOCKS, lambda x, _: ma.symmetry(x, ma.group("C4")).q_values),
    "prove": (LEFT, lambda x, _: ma.prove(x, RIGHT, UNEMBED, TABLE).accuracy_bound),
    "basis": (X, lambda x, _: ma.basis(network(), x, ["0", "1"])["0"].to_basis),
    "read_activations": (X, lambda x, _: ma.read_activations(network(), x, ["0"])["0"]),
    "list_sites": (X, lambda x, _: ma.list_sites(network(), x)[0].width),
    "collect": (X, collected),
}


@functools.cache
def plain_answer(verb: str) -> np.ndarray:
    x, call = VERBS[verb]
    with tempfile.TemporaryDirectory() as folder:
        return as_plain(call(x.copy(), Path(folder) / "s"))


def as_plain(answer: Any) -> np.ndarray:
    return np.asarray(answer.detach() if isinstance(answer, torch.Tensor) else answer)


def mapped(x: np.ndarray, folder: Path) -> np.ndarray:
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.copy())


FORMS: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "float64": lambda x, _: x.astype(np.float64),
    "float16": lambda x, _: x.astype(np.float16),
    "columns first": lambda x, _: np.asfortranarray(x),
    "backwards": lambda x, _: x[::-1].copy()[::-1],
    "strided": lambda x, _: np.repeat(x, 2, axis=-1)[..., ::2],
    "big endian": lambda x, _: x.astype(">f4"),
    "memory map": mapped,
    "masked nowhere": lambda x, _: np.ma.masked_array(x, mask=False),
    "tensor": lambda x, _: tensor(x),
    "tensor of doubles": lambda x, _: tensor(x).double(),
    "bfloat16": lambda x, _: tensor(x).bfloat16(),
    "half": lambda x, _: tensor(x).half(),
    "with gradient": lambda x, _: tensor(x).requires_grad_(),
    "lists": lambda x, _: x.tolist(),
    "list of arrays": lambda x, _: list(x),
    "list of tensors": lambda x, _: list(tensor(x)),
    "data set": lambda x, _: TensorDataset(tensor(x), torch.zeros(len(x))),
    "loader": lambda x, _: DataLoader(TensorDataset(tensor(x), torch.zeros(len(x))), 16),
}
"""Forms of an array whose answer is that of the plain array."""
WRONG: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "masked": lambda x, _: np.ma.masked_array(x, mask=x > 1),
    "sparse": lambda x, _: tensor(x).to_sparse(),
    "no values": lambda x, _: tensor(x).to("meta"),
    "complex": lambda x, _: x.astype(np.complex64),
    "complex tensor": lambda x, _: tensor(x).to(torch.complex64),
    "words": lambda x, _: np.full(x.shape, "a"),
    "a mapping": lambda x, _: {"x": x},
    "nothing": lambda x, _: None,
}
"""Values that are no arrays of numbers."""
REFUSED = {("match", "data set"), ("match", "loader")}
"""Decoder rows are no samples of a data set."""
TYPED = {"assign", "symmetry", "prove"}
"""Verbs whose signatures, which tests check, have arrays, tensors and lists only."""
UNTYPED_FORMS = {"data set", "loader", "a mapping", "nothing"}
STREAMS = {("train", "loader")}
"""A loader is a stream, of which the first rows are held out."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("verb", VERBS)
def test_the_answer_is_the_same_for_every_form_of_an_array(verb, form, tmp_path):
    x, call = VERBS[verb]
    if verb in TYPED and form in UNTYPED_FORMS:
        pytest.skip("the signature refuses it under test")
    given = FORMS[form](x, tmp_path)
    if (verb, form) in REFUSED:
        with pytest.raises(UserError, match="pass a dictionary"):
            call(given, tmp_path / "s")
        return
    found = as_plain(call(given, tmp_path / "s"))
    if (verb, form) not in STREAMS:
        np.testing.assert_allclose(found, plain_answer(verb), atol=1e-5)


@pytest.mark.parametrize("form", WRONG)
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_no_array_of_numbers_is_refused_by_every_verb(verb, form, tmp_path):
    x, call = VERBS[verb]
    if form == "nothing" and verb in ("branches on rows", "evaluate", "evaluate target"):
        pytest.skip("an optional argument")
    if verb in TYPED and form in UNTYPED_FORMS:
        pytest.skip("the signature refuses it under test")
    with pytest.raises(UserError) as caught:
        call(WRONG[form](x, tmp_path), tmp_path / "s")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_are_texts_or_paths(kind, tmp_path):
    store = ma.collect(network(), X, "0", kind(tmp_path / "store"))
    assert ma.Store(kind(tmp_path / "store")).sites == store.sites == ["0"]
    np.save(tmp_path / "x.npy", X)
    again = ma.collect(network(), kind(tmp_path / "x.npy"), ["0"], kind(tmp_path / "again"))
    assert torch.equal(again.rows().held_out(9).x, store.rows().held_out(9).x)
    built = ma.Autoencoder(d_in=12, n_latents=16, sparsity=ma.TopK(k=3))
    trained = ma.train(built, store, steps=2, batch_size=16, checkpoint=kind(tmp_path / "c"))
    ma.save(trained, kind(tmp_path / "sae"))
    ma.save(trained, kind(tmp_path / "other"), format="saelens")
    for name in ("sae", "other"):
        assert torch.equal(ma.load(kind(tmp_path / name)).W_dec, trained.W_dec)


@pytest.mark.parametrize("verb", VERBS)
def test_a_path_in_place_of_an_array_is_read_or_refused_by_name(verb, tmp_path):
    x, call = VERBS[verb]
    if verb in TYPED:
        pytest.skip("the signature refuses it under test")
    for path in (mapped(x, tmp_path).filename, str(tmp_path / "x.npy")):  # pyright: ignore
        if verb == "collect":
            np.testing.assert_allclose(as_plain(call(path, tmp_path / "s")), plain_answer(verb))
            continue
        with pytest.raises(UserError, match=r"numpy\.load|pass a|Path|str"):
            call(path, tmp_path / "s")
