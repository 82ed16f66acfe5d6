import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from mechatlas.activations.architectures.inception import InceptionMini
from mechatlas.activations.collect import StoreConfig, collect
from mechatlas.activations.positions import Positions
from mechatlas.activations.receptive import ReceptiveField
from mechatlas.activations.samples import Images, Texts, open_samples
from mechatlas.activations.sites import read_activations
from mechatlas.analysis.examples.maps import Crop, ExamplesWanted, examples_together
from mechatlas.analysis.examples.statistics import BINS, PER_OCTAVE, feature_statistics
from mechatlas.base import InputError, Site

SITE = Site("mixed3b")
FIELD = ReceptiveField(25, 2, -11)


class Projections:
    """Each atom's projection where it is above a threshold; fits the protocol, nothing more."""

    def __init__(self, atoms, threshold=0.0):
        self.W_dec, self.threshold = atoms, threshold
        self.n_latents, self.d_in = atoms.shape

    def encode(self, x):
        projection = x @ self.W_dec.T
        return projection * (projection > self.threshold)

    def decode(self, code):
        return code @ self.W_dec


def atoms(n_latents, d_in, seed=0):
    random = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(n_latents, d_in, generator=random), dim=1)


def examples(network, samples, site, dictionary, statistics, *, field=None, **options):
    wanted = ExamplesWanted(site, dictionary, statistics, field)
    (shown,) = examples_together(network, samples, [wanted], **options)
    return shown


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.manual_seed(0)
    network = InceptionMini().eval()
    samples = open_samples(Images(source="scikit-image", crops=2), network)
    settings = StoreConfig(positions=Positions(rule="random", per_sample=40), held_out=0.2)
    store = collect(network, samples, [SITE], tmp_path_factory.mktemp("run") / "store", settings)
    rows = store.rows("mixed3b")
    projections = rows.held_out(500).x @ atoms(50, 136).T
    dictionary = Projections(atoms(50, 136), threshold=float(projections.quantile(0.8)))
    return network, samples, rows, dictionary


def everything(rows, dictionary):
    parts = [(batch.x, where) for batch, where in rows.scan()]
    code = dictionary.encode(torch.cat([x for x, _ in parts])).numpy()
    return code, torch.cat([w for _, w in parts]).numpy()


def test_statistics_are_those_of_the_whole_code_matrix(world):
    _, _, rows, dictionary = world
    found = feature_statistics(dictionary, rows)
    code, _ = everything(rows, dictionary)
    active = code > 0
    assert found.n_rows == len(code)
    np.testing.assert_allclose(found.density, active.mean(axis=0))
    np.testing.assert_allclose(found.max, code.max(axis=0), rtol=1e-5)
    expected = code.sum(axis=0) / np.maximum(active.sum(axis=0), 1)
    np.testing.assert_allclose(found.mean, expected, rtol=1e-5)


def test_top_rows_are_the_strongest_with_one_of_each_sample(world):
    _, _, rows, dictionary = world
    found = feature_statistics(dictionary, rows, top=7)
    code, where = everything(rows, dictionary)
    for latent in range(dictionary.n_latents):
        expected, seen = [], set()
        for row in np.argsort(-code[:, latent], kind="stable"):
            if code[row, latent] > 0 and where[row, 0] not in seen and len(expected) < 7:
                seen.add(where[row, 0])
                expected.append((*where[row].tolist(), code[row, latent]))
        kept = found.sample[latent] >= 0
        got = zip(
            found.sample[latent][kept], *found.place[latent][kept].T, found.value[latent][kept],
            strict=True,
        )  # fmt: skip
        assert list(got) == [pytest.approx(e, rel=1e-5) for e in expected]


def test_small_blocks_give_the_same_as_large_ones(world, monkeypatch):
    _, _, rows, dictionary = world
    whole = feature_statistics(dictionary, rows, top=3)
    monkeypatch.setattr("mechatlas.analysis.examples.statistics.CODE_BYTES", 4 * 50 * 17)
    pieces = feature_statistics(dictionary, rows, top=3)
    np.testing.assert_array_equal(whole.sample, pieces.sample)
    np.testing.assert_array_equal(whole.place, pieces.place)
    np.testing.assert_array_equal(whole.histogram, pieces.histogram)


def test_histograms_count_every_active_row_in_its_bin(world):
    _, _, rows, dictionary = world
    found = feature_statistics(dictionary, rows)
    code, _ = everything(rows, dictionary)
    np.testing.assert_array_equal(found.histogram.sum(axis=1), (code > 0).sum(axis=0))
    for latent in range(dictionary.n_latents):
        edges = found.upper[latent] * 2.0 ** (np.arange(-BINS, 1) / PER_OCTAVE)
        positive = code[:, latent][code[:, latent] > 0]
        expected = np.histogram(np.maximum(positive, edges[0]), edges)[0]
        assert np.abs(found.histogram[latent] - expected).sum() <= 2  # a value on an edge
        assert found.histogram[latent, -1] > 0 or not len(positive)


def test_no_more_rows_are_read_than_asked_for(world):
    _, _, rows, dictionary = world
    assert feature_statistics(dictionary, rows, max_rows=100).n_rows == 100


def test_a_dead_dictionary_has_no_examples(world):
    network, samples, rows, dictionary = world
    dead = Projections(torch.zeros(20, dictionary.d_in))
    found = feature_statistics(dead, rows)
    assert not found.density.any()
    assert not found.histogram.any()
    assert (found.sample == -1).all()
    shown = examples(network, samples, SITE, dead, found, field=FIELD)
    assert not shown.heat.any()
    assert shown.drift == 0


def test_maps_show_what_the_network_does_there(world):
    network, samples, rows, dictionary = world
    found = feature_statistics(dictionary, rows, top=4)
    shown = examples(network, samples, SITE, dictionary, found, field=FIELD)
    assert shown.drift < 1e-4
    height, width = shown.heat.shape[2:]
    for latent in range(0, 50, 7):
        for rank in range(4):
            sample = shown.sample[latent, rank]
            if sample < 0:
                continue
            x = read_activations(network, samples.stack([samples.read(int(sample))]), [SITE])[SITE][
                0
            ]
            code = dictionary.encode(x.detach().flatten(1).T)[:, latent].reshape(15, 15).numpy()
            top, left = shown.first[latent, rank]
            expected = code[top : top + height, left : left + width]
            got = shown.heat[latent, rank] / 255 * shown.scale[latent]
            np.testing.assert_allclose(got, expected, atol=shown.scale[latent] / 200)
            y, x = shown.place[latent, rank]
            assert shown.value[latent, rank] == pytest.approx(code[y, x], rel=1e-4)


def test_a_square_holds_the_pixels_that_its_position_sees(world):
    network, samples, rows, dictionary = world
    found = feature_statistics(dictionary, rows, top=4)
    shown = examples(network, samples, SITE, dictionary, found, field=FIELD)
    assert shown.crop is not None
    assert shown.crop.side == 25
    there = shown.sample >= 0
    begin, end = FIELD.span(shown.place[there], 31)
    assert (shown.corner[there] <= begin).all()
    assert (shown.corner[there] + shown.crop.side >= end).all()
    inside = shown.place[there] - shown.first[there]
    assert (inside >= 0).all()
    assert (inside < np.array(shown.heat.shape[2:])).all()


def test_a_changed_dictionary_is_noticed(world):
    network, samples, rows, dictionary = world
    found = feature_statistics(dictionary, rows, top=4)
    shuffled = Projections(dictionary.W_dec.roll(1, dims=0), dictionary.threshold)
    assert examples(network, samples, SITE, shuffled, found, field=FIELD).drift > 0.2


def test_a_dictionary_of_another_site_is_refused(world):
    with pytest.raises(InputError, match="136 wide, the dictionary reads 64"):
        feature_statistics(Projections(atoms(5, 64)), world[2])


class Words(nn.Module):
    """Token ids to vectors; its `input` cuts texts at spaces."""

    class Tokenizer(nn.Module):
        def windows(self, text, context):
            words = np.array([len(w) for w in text.split()])
            return words[: len(words) // context * context].reshape(-1, context)

        def forward(self, tokens):
            return tokens

    def __init__(self):
        super().__init__()
        self.input = self.Tokenizer()
        self.embed = nn.Embedding(30, 12)

    def forward(self, tokens):
        return self.embed(self.input(tokens))


def test_texts_have_windows_of_tokens(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "a.txt").write_text(" ".join("a" * (1 + i * i % 23) for i in range(400)))
    network = Words().eval()
    samples = open_samples(Texts(source=tmp_path / "a.txt", context=40), network)
    settings = StoreConfig(positions=Positions(per_sample=20), held_out=0.1)
    store = collect(network, samples, [Site("embed")], tmp_path / "store", settings)
    dictionary = Projections(network.embed.weight.detach().clone())
    found = feature_statistics(dictionary, store.rows(), top=5)
    shown = examples(network, samples, Site("embed"), dictionary, found, context=(12, 4))
    assert shown.crop is None
    assert shown.heat.shape == (30, 5, 17, 1)
    assert shown.drift < 1e-5
    latent = int(found.sample.max(axis=1).argmax())
    sample, token = int(shown.sample[latent, 0]), int(shown.place[latent, 0, 0])
    first = int(shown.first[latent, 0, 0])
    assert 0 <= first <= token < first + 17 <= 40
    code = dictionary.encode(network.embed(torch.from_numpy(samples.read(sample)))).detach()
    expected = code[first : first + 17, latent].numpy()
    got = shown.heat[latent, 0, :, 0] / 255 * shown.scale[latent]
    np.testing.assert_allclose(got, expected, atol=float(shown.scale[latent]) / 200)


def test_results_are_plain_arrays(world):
    found = feature_statistics(world[3], world[2])
    fields = dataclasses.asdict(found)
    assert all(isinstance(v, int | np.ndarray) for v in fields.values())


def test_quantiles_go_from_weak_to_strong_over_the_whole_range(world):
    _, _, rows, dictionary = world
    found = feature_statistics(dictionary, rows, top=3, quantiles=10)
    code, where = everything(rows, dictionary)
    assert found.sample.shape == (50, 13)
    often = [k for k in range(50) if len(np.unique(where[code[:, k] > 0, 0])) >= 20]
    assert len(often) > 10
    ranks = []
    for latent in often:
        active = np.sort(code[:, latent][code[:, latent] > 0])
        value, sample = found.value[latent, 3:], found.sample[latent, 3:]
        assert (np.diff(value) >= 0).all()
        assert len(set(sample.tolist())) == 10
        for v, s, (y, x) in zip(value, sample, found.place[latent, 3:], strict=True):
            (row,) = np.flatnonzero((where == [s, y, x]).all(axis=1))
            assert code[row, latent] == pytest.approx(v)
        ranks.append(np.searchsorted(active, value) / len(active))
    np.testing.assert_allclose(np.mean(ranks, axis=0), (np.arange(10) + 0.5) / 10, atol=0.12)


def test_quantiles_do_not_depend_on_how_rows_are_cut(world, monkeypatch):
    _, _, rows, dictionary = world
    whole = feature_statistics(dictionary, rows, top=3, quantiles=5)
    monkeypatch.setattr("mechatlas.analysis.examples.statistics.CODE_BYTES", 4 * 50 * 7)
    pieces = feature_statistics(dictionary, rows, top=3, quantiles=5)
    np.testing.assert_array_equal(whole.sample, pieces.sample)
    np.testing.assert_array_equal(whole.value, pieces.value)


class Tokens(nn.Module):
    """A class token and the mean colors of 4 x 4 patches."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 3, 4, stride=4, bias=False)
        self.embed.weight.data = torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4) / 16
        self.rows = nn.Identity()

    def forward(self, x):
        patches = self.embed(x).flatten(2).movedim(1, 2)
        return self.rows(torch.cat([patches.mean(dim=1, keepdim=True) - 9, patches], dim=1))


def test_tokens_of_an_image_are_mapped_at_their_patches(tmp_path):
    network = Tokens().eval()
    images = torch.zeros(9, 3, 16, 16)
    for i in range(9):  # a red patch at another place in each image
        y, x = divmod(i, 4)
        images[i, 0, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 1
    samples = open_samples(images, network)
    settings = StoreConfig(positions=Positions(rule="all"), held_out=0.2)
    store = collect(network, samples, [Site("rows")], tmp_path / "store", settings)
    dictionary = Projections(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]), threshold=0.5)
    found = feature_statistics(dictionary, store.rows("rows"), top=4)
    shown = examples(network, samples, Site("rows"), dictionary, found)
    assert shown.heat.shape == (2, 4, 4, 4)
    assert shown.apart.shape == (2, 4, 1)
    assert shown.crop == Crop(16, 4.0, 0.0)
    for rank in range(4):
        place = divmod(int(shown.sample[0, rank]), 4)
        assert tuple(shown.place[0, rank]) == place
        assert np.argwhere(shown.heat[0, rank]).tolist() == [list(place)]
        assert shown.apart[0, rank] == 0
        assert tuple(shown.place[1, rank]) == (-1, 0)
        assert not shown.heat[1, rank].any()
        assert shown.apart[1, rank] == 255
    assert shown.drift < 1e-3


def test_examples_found_together_are_those_found_alone(world):
    network, samples, rows, dictionary = world
    other = Projections(atoms(20, 136, seed=1), threshold=dictionary.threshold)
    both = [(d, feature_statistics(d, rows, top=4, quantiles=3)) for d in (dictionary, other)]
    wanted = [ExamplesWanted(SITE, d, found, FIELD) for d, found in both]
    together = examples_together(network, samples, wanted)
    for (d, found), shown in zip(both, together, strict=True):
        alone = examples(network, samples, SITE, d, found, field=FIELD)
        np.testing.assert_array_equal(alone.sample, shown.sample)
        np.testing.assert_allclose(alone.value, shown.value, rtol=1e-4, atol=1e-5)
        assert np.abs(alone.heat.astype(int) - shown.heat).max() <= 1
