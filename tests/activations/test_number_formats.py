"""What is kept was checked, in any number format, and what a network raises is a sentence."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mechatlas.activations.collect import StoreConfig, collect
from mechatlas.activations.networks import Network, as_input, load_network, run_network
from mechatlas.activations.sites import list_sites, read_activations
from mechatlas.activations.stream import stream
from mechatlas.analysis.interaction.interaction_basis import basis
from mechatlas.base import InputError, NonFiniteError, Site, StoreError, UserError

X = np.random.default_rng(0).normal(size=(40, 4))
KINDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float64": torch.float64}  # fmt: skip


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval().to(dtype)


@pytest.mark.parametrize("kept", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_in_any_number_format_reads_arrays_and_its_rows_are_kept(tmp_path, kind, kept):
    model = network(KINDS[kind])
    settings = StoreConfig(dtype=kept, held_out=0.5)
    store = collect(model, X, [Site("0")], tmp_path / "s", settings)
    found = store.rows("0").held_out(99).x
    truth = model[0](torch.from_numpy(X).to(KINDS[kind])).detach().to(KINDS[kept]).float()
    distance = torch.cdist(found.float(), truth).min(dim=1).values
    assert len(found) == 20
    assert distance.max() <= (0.02 if "16" in kind else 1e-6)


def test_a_network_of_doubles_reads_doubles_as_they_are():
    model = network(torch.float64)
    found = read_activations(model, X, [Site("0")])[Site("0")]
    assert torch.equal(found, model[0](torch.from_numpy(X)))


@dataclasses.dataclass(frozen=True)
class Case:
    dtype: str
    largest: float
    hint: str


@pytest.mark.parametrize(
    "case",
    [Case("float16", 65504, "bfloat16 or float32"), Case("bfloat16", 3.3895e38, "float32")],
    ids=lambda case: case.dtype,
)
def test_numbers_that_the_store_cannot_hold_are_refused_while_collecting(tmp_path, case):
    model = network(torch.float64)
    layer: Any = model[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.bias[5] = 1.2 * case.largest
    largest = f"{case.largest:.5g}".replace("+", r"\+")
    message = (
        rf"site 0, sample array row \d+, channel 5, and {case.dtype} holds up to {largest}"
        rf".*largest of the batch.*Use {case.hint}"
    )
    with pytest.raises(NonFiniteError, match=message):
        collect(model, X, [Site("0")], tmp_path / "s", StoreConfig(dtype=case.dtype))


def test_a_large_sum_of_finite_numbers_is_kept(tmp_path):
    model = network(torch.float16)
    layer: Any = model[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(60_000)
    store = collect(model, X, [Site("0")], tmp_path / "s", StoreConfig(dtype="float16"))
    assert (store.rows("0").held_out(9).x == 60_000).all()


class Odd(nn.Module):
    """Gives what a test asks for, from one layer."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make, self.layer, self.site = make, nn.Linear(4, 8), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.site(self.make(self.layer(x)))


class Changing:
    """Maps of 4 x 4 of one channel at first, then of another shape."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.n_calls = shape, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        shape = (1, 4, 4) if self.n_calls < 5 else self.shape
        return x[:, :1, None, None].expand(len(x), *shape)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: torch.complex(x, x), "Site site holds complex numbers"),
        (lambda x: x[0], "not known which axis is the batch of the activations at site"),
        (lambda x: x[:, :0], r"holds no numbers: its shape is \(1, 0\)"),
        (Changing(1, 2, 8), "map of 2 x 8 here, and of 4 x 4 for the first sample"),
        (Changing(3, 4, 4), "Site site has 3 channels here, and 1 for the first sample"),
        (lambda x: x / 0, r"gave (inf|-inf|nan) at site site, sample array row \d+, channel 0"),
    ],
)
def test_activations_that_no_store_holds_are_refused(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        collect(Odd(make).eval(), X, [Site("site")], tmp_path / "s", StoreConfig(batch_size=8))


@pytest.mark.parametrize("shape", [(1, 2, 8), (3, 4, 4), (4, 2, 2)])
def test_maps_that_change_are_refused_in_a_stream_too(shape):
    rows = stream(Odd(Changing(*shape)).eval(), X, "site@bchw", batch_size=1)
    with pytest.raises(UserError, match="for the first sample"):
        list(itertools.islice(rows.batches(64), 4))


class Picky(nn.Module):
    """Raises what a test asks for."""

    def __init__(self, error: Exception, after: int = 0) -> None:
        super().__init__()
        self.error, self.left, self.layer = error, after, nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.layer(x)


@pytest.mark.parametrize(
    "error", [KeyError("mask"), AssertionError(), MemoryError(), RuntimeError("one\ntwo")]
)
def test_what_a_network_raises_is_one_sentence_with_site_sample_and_shape(tmp_path, error):
    model = nn.Sequential(Picky(error, after=4)).eval()
    with pytest.raises(InputError) as caught:
        collect(model, X, [Site("0")], tmp_path / "s", StoreConfig(batch_size=8))
    message = str(caught.value)
    assert "\n" not in message
    assert f"({type(error).__name__} in module '0', a Picky)" in message
    assert "cannot run on float32 inputs of shape (8, 4) to read 0" in message
    assert "The batch: array row " in message
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((3, 5)), r"float32 inputs of shape \(3, 5\)"),
        (np.zeros((3, 4), int), r"int64 inputs of shape \(3, 4\)"),
        (np.zeros(()), r"float32 inputs of shape \(\)"),
        (torch.zeros(3, 4, dtype=torch.complex64), "complex64 inputs"),
        ([["a", "b", "c", "d"]], "holds <U1 values"),
        (torch.zeros(3, 4).to_sparse().unsqueeze(0), "inputs of shape|sparse"),
    ],
)
@pytest.mark.parametrize(
    "call", [run_network, list_sites, lambda n, x: read_activations(n, x, [Site("1")])]
)
def test_inputs_that_do_not_fit_are_refused_by_everything_that_runs_a_network(
    call, inputs, message
):
    with pytest.raises(InputError, match=message):
        call(network(), inputs)


@pytest.mark.parametrize(
    "inputs",
    [X, X.tolist(), torch.from_numpy(X), X.astype(">f8"), np.asfortranarray(X)],
)
def test_a_batch_in_any_form_is_read(inputs):
    expected = network()(torch.from_numpy(X).float())
    torch.testing.assert_close(run_network(network(), inputs), expected)
    assert as_input(network(), inputs).dtype == torch.float32


def test_token_ids_and_several_inputs_stay_as_they_are():
    assert as_input(network(), np.zeros((2, 3), np.uint8)).dtype == torch.int64
    pair = (torch.zeros(1), torch.ones(1))
    assert as_input(network(), pair) is pair


def raising() -> nn.Module:
    raise OSError("no such weights")


def test_what_a_factory_raises_is_one_sentence():
    with pytest.raises(UserError, match=r"cannot be built: no such weights \(OSError\)"):
        load_network(Network(name=f"{__name__}:raising"))


def test_the_interaction_basis_of_a_network_of_doubles_is_found_or_refused_if_coarse():
    found = basis(network(torch.float64), X, ["0", "1", "2"])["0"].free_directions
    assert found == basis(network(), X, ["0", "1", "2"])["0"].free_directions
    with pytest.raises(InputError, match="too coarse"):
        basis(network(torch.bfloat16), X, ["0", "1", "2"])


def test_a_store_of_other_samples_is_not_taken_for_that_of_these(tmp_path):
    first = collect(network(), X, "0", tmp_path / "s")
    again = collect(network(), X.tolist(), "0", tmp_path / "s")
    assert torch.equal(again.rows("0").held_out(9).x, first.rows("0").held_out(9).x)
    with pytest.raises(StoreError, match=r"made from another recipe .*recipe\.samples"):
        collect(network(), X + 1, "0", tmp_path / "s")
