"""Positions that a store leaves out, and the rows of it that are outliers."""

import warnings
from collections import Counter
from typing import Any

import pytest
import torch

from mechatlas.activations.collect import StoreConfig, collect
from mechatlas.activations.positions import Positions, is_causal, left_out
from mechatlas.activations.sites import read_activations
from mechatlas.activations.store import Store
from mechatlas.base import InputError, Site
from mechatlas.files import read_manifest, write_manifest
from tests.networks import Reader, Windows

BEGIN, PAD = 0, 1
SITES = [Site("embed"), Site("block")]


def every_place(store: Store, site: str) -> list[tuple[int, int]]:
    where = torch.cat([w for _, w in store.rows(site).scan()])
    return sorted((s, y) for s, y, _ in where.tolist())


def places_by_hand(samples: Windows, *, first: int, special: bool, tokens=()) -> list:
    kept = []
    for sample, row in enumerate(samples.tokens):
        real = [p for p, token in enumerate(row) if token != PAD]
        kept += [
            (sample, p)
            for n, p in enumerate(real)
            if n >= first and (special or row[p] != BEGIN) and row[p] not in tokens
        ]
    return kept


@pytest.mark.parametrize("rule", ["norm", "random", "all"])
@pytest.mark.parametrize("left", [True, False], ids=["padded left", "padded right"])
def test_special_tokens_padding_and_the_first_position_have_no_rows(tmp_path, rule, left):
    samples = Windows(n=30, length=12, padded_left=left)
    settings = StoreConfig(positions=Positions(rule=rule, per_sample=50), batch_size=7)
    store = collect(Reader(), samples, SITES, tmp_path / "store", settings)
    for site in store.sites:
        assert every_place(store, site) == places_by_hand(samples, first=1, special=False)
    counts = store.manifest["left_out"]
    assert counts["padding"] == (samples.tokens == PAD).sum() > 0
    assert counts["first"] == 30
    assert counts["special"] == (samples.tokens == BEGIN).sum() - 30 > 0
    assert counts["tokens"] == 0


def test_what_is_left_out_can_be_chosen(tmp_path):
    samples = Windows(n=30, length=12)
    positions = Positions(rule="all", keep_special=True, skip_first=3, skip_tokens=(5, 6))
    store = collect(
        Reader(), samples, SITES[1:], tmp_path / "store", StoreConfig(positions=positions)
    )
    assert Positions.of_store(store.manifest) == positions
    expected = places_by_hand(samples, first=3, special=True, tokens=(5, 6))
    assert every_place(store, "block") == expected


@pytest.mark.parametrize("rule", ["norm", "random"])
def test_a_draw_among_the_others_has_as_many_as_there_are_and_never_one_left_out(tmp_path, rule):
    samples = Windows(n=40, length=12)
    settings = StoreConfig(positions=Positions(rule=rule, per_sample=4), paired=True)
    store = collect(Reader(), samples, SITES, tmp_path / "store", settings)
    allowed = places_by_hand(samples, first=1, special=False)
    places = every_place(store, "embed")
    assert places == every_place(store, "block")
    assert len(set(places)) == len(places)
    assert set(places) <= set(allowed)
    among = Counter(sample for sample, _ in allowed)
    assert Counter(s for s, _ in places) == {s: min(4, n) for s, n in among.items() if n}


def test_rows_are_those_of_their_places_where_some_are_left_out(tmp_path):
    samples, network = Windows(n=30, length=12), Reader()
    settings = StoreConfig(positions=Positions(per_sample=3), batch_size=8)
    store = collect(network, samples, SITES, tmp_path / "store", settings)
    inputs = samples.stack([samples.read(i) for i in range(30)])
    whole = read_activations(network, inputs, SITES)
    for site in SITES:
        for batch, where in store.rows(str(site)).scan():
            sample, position, _ = where.long().T
            torch.testing.assert_close(batch.x, whole[site].detach()[sample, position])


def test_a_network_that_reads_both_ways_keeps_its_first_position(tmp_path):
    samples = Windows(n=20, length=12)
    for network, first in ((Reader(), 1), (Reader(causal=False), 0)):
        inputs = samples.stack([samples.read(0)])
        assert is_causal(network, inputs, samples.padding(0), SITES) == bool(first)
        store = collect(network, samples, SITES[1:], tmp_path / f"store{first}")
        assert store.manifest["settings"]["positions"]["skip_first"] == first


def test_samples_that_are_no_tokens_lose_nothing(tmp_path):
    samples = Windows(n=20, length=12)
    settings = StoreConfig(positions=Positions(rule="all"))
    store = collect(Reader(), _Plain(samples), SITES[1:], tmp_path / "store", settings)
    assert len(every_place(store, "block")) == 20 * 12
    assert store.manifest["left_out"] == {}


def test_windows_of_nothing_but_what_is_left_out_are_refused_in_a_sentence(tmp_path):
    samples = Windows(n=5, length=1)
    settings = StoreConfig(positions=Positions(skip_first=1))
    with pytest.raises(InputError, match="Every position of the samples is left out"):
        collect(Reader(), samples, SITES, tmp_path / "store", settings)


def test_rows_of_equal_grids_are_paired_unless_a_norm_chooses_among_them(tmp_path):
    samples = Windows(n=20, length=12)
    cases: Any = ((None, True), ("random", True), ("all", True), ("norm", False))
    for rule, paired in cases:
        settings = StoreConfig(positions=Positions(rule=rule, per_sample=4))
        store = collect(Reader(), samples, SITES, tmp_path / f"{rule}", settings)
        assert store.manifest["settings"]["paired"] is paired
        assert (every_place(store, "embed") == every_place(store, "block")) or not paired


def test_a_store_of_an_older_version_is_still_the_store_of_its_recipe(tmp_path):
    samples, out = Windows(n=20, length=12), tmp_path / "store"
    plain = _Plain(samples)
    collect(Reader(), plain, SITES[1:], out)
    manifest = read_manifest(out / "manifest.json")
    for name in ("keep_special", "skip_first", "skip_tokens"):
        del manifest["settings"]["positions"][name]
    del manifest["left_out"], manifest["outliers"]
    write_manifest(out / "manifest.json", manifest)
    collect(Reader(), plain, SITES[1:], out)


class _Plain:
    """Windows that do not say that they are tokens."""

    def __init__(self, samples: Windows) -> None:
        self.name, self.read, self.stack = samples.name, samples.read, samples.stack
        self.n = len(samples)

    def __len__(self) -> int:
        return self.n


def test_outlier_rows_are_named_by_token_and_position(tmp_path):
    # Token 7 is a sink wherever it stands among the first three places.
    samples = Windows(n=200, length=12)
    samples.tokens[::9, 2] = 7
    network = Reader(sink=7)
    with pytest.warns(UserWarning, match=r"At block \d+ of .* '<7>' at position 2 \(\d+\)"):
        store = collect(network, samples, SITES[1:], tmp_path / "store")
    found = store.manifest["outliers"]["block"]
    rows = [(b.x.norm(dim=1), w) for b, w in store.rows().scan() if int(b.row[0]) < 1e9]
    norms = torch.cat([n for n, _ in rows])[: store.rows().n_rows]
    far = norms > 10 * norms.median()
    assert found["count"] == int(far.sum()) > 0
    assert found["rows_seen"] == len(norms)
    assert found["commonest"][0]["token"] == "<7>"
    assert sum(place["count"] for place in found["commonest"]) <= found["count"]
    assert found["variance_share"] > 0.5


def test_common_rows_that_carry_most_of_the_variance_are_named_though_none_is_an_outlier(tmp_path):
    samples, network = Windows(n=300, length=12), Reader()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(network, samples, SITES[:1], tmp_path / "plain")
    with torch.no_grad():
        network.embed.weight /= network.embed.weight.norm(dim=1, keepdim=True)
        network.embed.weight[9] *= 8
    with pytest.warns(UserWarning, match=r"At embed the \d+ of .* farthest .* '<9>' at position"):
        store = collect(network, samples, SITES[:1], tmp_path / "store")
    assert store.manifest["outliers"] == {}


def test_reasons_are_counted_once(tmp_path):
    samples = Windows(n=4, length=6)
    samples.tokens[:] = [[BEGIN, 5, 6, BEGIN, PAD, PAD]] * 4
    counts: Counter[str] = Counter()
    positions = Positions(skip_tokens=(5, BEGIN)).resolved(tokens=True, causal=True)
    excluded = left_out(samples, [0, 1], positions, counts)
    assert excluded.tolist() == [[True, True, False, True, True, True]] * 2
    assert counts == {"padding": 4, "first": 2, "special": 2, "tokens": 2}
