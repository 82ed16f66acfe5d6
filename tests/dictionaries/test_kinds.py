"""What holds for every kind of dictionary with every sparsity rule."""

import copy

import numpy as np
import pytest
import torch

from mechatlas.base import InputError, NonFiniteError
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder, Transcoder
from mechatlas.dictionaries.formats import load, save
from mechatlas.dictionaries.metrics import evaluate
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.rows import ArrayRows, StreamRows
from mechatlas.dictionaries.sparsity import BatchTopK, Gated, JumpReLU, ReLU, TopK
from mechatlas.dictionaries.training import train
from tests.conformance import CHECKS
from tests.dictionaries.test_autoencoder import planted
from tests.dictionaries.test_checkpoints import KilledError, kill_after

RULES = {
    "topk": TopK(k=3),
    "batchtopk": BatchTopK(k=3),
    "relu": ReLU(l1=1.0),
    "jumprelu": JumpReLU(l0=1.0),
    "gated": Gated(l1=2.0),
}
WIDTHS = {"a": 10, "b": 14}
FORMS = {
    "autoencoder": lambda rule: Autoencoder(d_in=24, n_latents=48, sparsity=rule),
    "tied": lambda rule: Autoencoder(d_in=24, n_latents=48, sparsity=rule, tied=True),
    "matryoshka": lambda rule: Autoencoder(
        d_in=24, n_latents=48, sparsity=rule, matryoshka_widths=(8, 20)
    ),
    "transcoder": lambda rule: Transcoder(d_in=14, d_out=10, n_latents=48, sparsity=rule),
    "crosscoder": lambda rule: Crosscoder(widths=WIDTHS, n_latents=48, sparsity=rule),
    "of one site": lambda rule: Crosscoder(widths=WIDTHS, n_latents=48, sparsity=rule, reads="b"),
}
# Every rule, every form, and the rules that have tensors of their own in the odd forms.
PAIRS = [(rule, "autoencoder") for rule in RULES] + [("batchtopk", form) for form in FORMS]
PAIRS += [("jumprelu", "matryoshka"), ("jumprelu", "of one site"), ("gated", "transcoder")]
PAIRS += [("relu", "crosscoder"), ("topk", "transcoder"), ("topk", "matryoshka")]
CASES = pytest.mark.parametrize(("rule", "form"), list(dict.fromkeys(PAIRS)), ids=lambda name: name)
TRAINED: dict[tuple[str, str], Autoencoder | Transcoder | Crosscoder] = {}
X = torch.from_numpy(planted(6000, k=3)[0]) * 40 + 7  # far from the scale of training


def trained(rule: str, form: str):
    if (rule, form) not in TRAINED:
        built = FORMS[form](RULES[rule])
        TRAINED[rule, form] = train(built, X, steps=200, batch_size=256, lr=1e-2)
    return TRAINED[rule, form]


@CASES
def test_training_explains_rows_sparsely(rule, form):
    built = trained(rule, form)
    assert built.history is not None
    # A transcoder and a crosscoder of one site must guess what they do not read.
    most = {"transcoder": 0.9, "of one site": 0.75, "matryoshka": 0.5}.get(form, 0.35)
    assert built.history.fvu[-1] < most
    assert 1 < built.history.l0[-1] < 14
    held = ArrayRows(X).held_out(4096).x
    found = evaluate(built, held[:, built.reads], target=held[:, built.writes])
    assert found.l0 == pytest.approx(built.history.l0[-1], abs=0.01)
    if form not in ("crosscoder", "of one site"):  # whose sites count alike while training
        # A code at its threshold may fall on the other side once the scale is in the weights.
        assert found.fvu == pytest.approx(built.history.fvu[-1], rel=3e-3)


@CASES
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(rule, form, check):
    with torch.no_grad():
        check(FORMS[form](RULES[rule]))
        check(trained(rule, form))


@CASES
def test_what_is_saved_is_what_is_loaded(rule, form, tmp_path):
    built = trained(rule, form)
    save(built, tmp_path)
    again = load(tmp_path)
    assert type(again) is type(built)
    assert again.extra_repr() == built.extra_repr()
    x = X[:50, built.reads]
    assert torch.equal(again(x), built(x))
    assert not again.untrained
    assert again.W_enc.shape == (built.d_in, 48)
    assert again.W_dec.shape == (48, built.d_out)


@CASES
def test_a_killed_run_ends_with_the_same_bytes(rule, form, tmp_path):
    options = {"steps": 20, "batch_size": 128, "checkpoint_every": 4, "seed": 3}

    def run(**more):
        return train(FORMS[form](RULES[rule]), X, **options, **more).state_dict()

    whole = run()
    with pytest.raises(KilledError):
        run(checkpoint=tmp_path, on_progress=kill_after(11))
    late = run(checkpoint=tmp_path)
    assert whole.keys() == late.keys()
    assert all(torch.equal(late[name], tensor) for name, tensor in whole.items())


@CASES
def test_units_of_the_rows_change_the_weights_but_not_what_is_computed(rule, form):
    one, two = (
        train(FORMS[form](RULES[rule]), X * scale, steps=25, batch_size=128) for scale in (1, 0.01)
    )
    assert two.history is not None
    assert one.history is not None
    assert two.history.l0[-1] == pytest.approx(one.history.l0[-1], rel=0.02)
    assert two.history.fvu[-1] == pytest.approx(one.history.fvu[-1], rel=0.02)


@pytest.mark.parametrize("form", FORMS)
def test_training_goes_on_where_it_ended(form):
    first = train(FORMS[form](JumpReLU()), X, steps=100, batch_size=256, lr=5e-3)
    assert first.history is not None
    before = first.history.fvu[-1]
    again = copy.deepcopy(first)
    train(again, X, steps=1, batch_size=256, lr=1e-9)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-4, atol=1e-4)
    assert again.history is not None
    assert again.history.fvu[-1] == pytest.approx(before, rel=1e-3)


def test_several_dictionaries_in_one_pass_are_those_of_one_pass_each(tmp_path):
    def build():
        return [
            Autoencoder(d_in=24, n_latents=48, sparsity=TopK(k=k), seed=seed)
            for k, seed in ((2, 0), (5, 0), (2, 1))
        ]

    options = {"steps": 30, "batch_size": 128, "seed": 2, "objective": Objective(clip=1.0)}
    told = []
    together = train(build(), X, **options, on_measure=lambda i, entry: told.append((i, entry)))
    stop = kill_after(9)
    with pytest.raises(KilledError):
        train(build(), X, **options, checkpoint=tmp_path, checkpoint_every=4, on_progress=stop)
    late = train(build(), X, **options, checkpoint=tmp_path, checkpoint_every=4)
    for one, two, three in zip(build(), together, late, strict=True):
        train(one, X, **options)
        for name, tensor in one.state_dict().items():
            assert torch.equal(two.state_dict()[name], tensor)
            assert torch.equal(three.state_dict()[name], tensor)
    assert [i for i, _ in told[-3:]] == [0, 1, 2]
    assert together[1].history is not None
    assert told[-2][1]["fvu"] == together[1].history.fvu[-1]


def test_arrays_side_by_side_are_the_rows_of_a_transcoder():
    parts = (X[:, :14].numpy(), X[:, 14:])
    one = train(FORMS["transcoder"](TopK(k=3)), parts, steps=20, batch_size=128)
    two = train(FORMS["transcoder"](TopK(k=3)), X, steps=20, batch_size=128)
    assert torch.equal(one.W_dec, two.W_dec)
    with pytest.raises(InputError, match=r"as many rows each, got shapes \(9, 14\), \(8, 10\)"):
        train(FORMS["transcoder"](TopK(k=3)), (X[:9, :14], X[:8, 14:]))


def test_sites_of_a_crosscoder_count_alike_whatever_their_scale():
    x = X.clone()
    x[:, :10] *= 1000
    built = train(
        Crosscoder(widths=WIDTHS, n_latents=48, sparsity=TopK(k=6)), x, steps=400, lr=5e-3
    )
    left = (x - built(x)).detach()
    for span in built.spans.values():
        part = x[:, span]
        assert left[:, span].square().sum() / (part - part.mean(0)).square().sum() < 0.4
    torch.testing.assert_close(built.norms.sum(dim=1), torch.ones(48))
    shares = built.norms.detach()[:, 0]
    assert 0.2 < float(shares.mean()) < 0.8, "no site should own all latents"


def test_a_prefix_explains_more_on_its_own_than_the_first_latents_of_a_plain_dictionary():
    plain, nested = trained("topk", "autoencoder"), trained("topk", "matryoshka")

    def unexplained(built) -> float:
        code = built.encode(X)
        code[:, 20:] = 0
        left = X - built.decode(code)
        return float(left.square().sum() / (X - X.mean(0)).square().sum())

    assert unexplained(nested) < 0.8 * unexplained(plain)


def test_mistakes_are_refused_at_construction():
    with pytest.raises(ValueError, match=r"matryoshka_widths \(9, 9\) must rise"):
        Autoencoder(d_in=4, n_latents=40, matryoshka_widths=(9, 9))
    with pytest.raises(ValueError, match=r"less than n_latents \(40\)"):
        Autoencoder(d_in=4, n_latents=40, matryoshka_widths=(40,))
    with pytest.raises(ValueError, match=r"reads \('c'\) must be one of 'a', 'b'"):
        Crosscoder(widths=WIDTHS, n_latents=40, reads="c")
    with pytest.raises(ValueError, match="reads one site cannot be tied"):
        Crosscoder(widths=WIDTHS, n_latents=40, reads="a", tied=True)
    with pytest.raises(ValueError, match="width of every site must be at least 1"):
        Crosscoder(widths={"a": 3, "b": 0}, n_latents=40)
    with pytest.raises(ValueError, match=r"d_out \(0\)"):
        Transcoder(d_in=3, d_out=0, n_latents=40)
    for rule, field in ((ReLU, "l1"), (Gated, "l1"), (JumpReLU, "l0"), (JumpReLU, "bandwidth")):
        with pytest.raises(ValueError, match=rf"{field} must be > 0, got 0.0"):
            rule(**{field: 0.0})
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        BatchTopK(k=0)


def chunks(sizes=(700, 900, 1000, 40, 3360)):
    return list(X.split(list(sizes)))


def test_a_stream_is_trained_on_as_an_array_is():
    def fit(data):
        built = Autoencoder(d_in=24, n_latents=48, sparsity=TopK(k=3))
        return train(built, data, steps=150, batch_size=128, lr=1e-2)

    once = fit(chunks())
    again = fit(chunks())
    assert torch.equal(once.W_dec, again.W_dec)
    assert once.history is not None
    assert once.history.fvu[-1] < 0.3


def test_rows_of_a_stream_come_once_an_epoch_and_never_those_held_out():
    rows = StreamRows(chunks(), held_out=500, pool=1500)
    held = rows.held_out(9999)
    assert torch.equal(held.x, X[:500])
    drawn = [next(batches) for batches in [rows.batches(100)] for _ in range(110)]
    ids = torch.cat([batch.row for batch in drawn])
    assert int(ids.min()) == 500
    assert ids[:3000].unique().numel() == 3000
    assert ids.unique().numel() > 5400, "the second epoch is near its end"
    assert len(ids) == 11_000
    for batch in drawn:
        assert torch.equal(batch.x, X[batch.row])
    late = StreamRows(chunks(), held_out=500, pool=1500).batches(100, start=40)
    assert torch.equal(next(late).row, drawn[40].row)
    assert rows.describe(7) == "row 7 of the stream"


def test_filling_the_pool_from_small_arrays_looks_at_each_a_few_times(monkeypatch):
    n_calls, length = [0], torch.Tensor.__len__

    def counted(tensor):
        n_calls[0] += 1
        return length(tensor)

    monkeypatch.setattr(torch.Tensor, "__len__", counted)
    stream = (torch.ones(1, 3) * i for i in range(2000))
    next(StreamRows(stream, held_out=500, pool=1000).batches(100))
    assert n_calls[0] < 20 * 2000


def test_a_stream_that_does_not_fit_is_refused():
    built = Autoencoder(d_in=24, n_latents=48, sparsity=TopK(k=3))
    with pytest.raises(InputError, match=r"ended after 6000 rows\. Train fewer steps"):
        train(built, iter(chunks()), steps=300, batch_size=128)
    with pytest.raises(InputError, match="is 7 wide, those before 24"):
        train(built, iter([X, torch.randn(4000, 7)]), steps=300, batch_size=128)
    with pytest.raises(InputError, match="stream of activations is empty"):
        train(built, [])
    with pytest.raises(InputError, match="has one row"):
        train(built, [X[:1]])
    with pytest.raises(InputError, match="has one row"):
        train(built, [[[1.0]]])
    with pytest.raises(InputError, match="Cannot train on a str"):
        train(built, "activations.npy")


def test_a_memory_map_is_trained_on_without_reading_it_whole(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    built = Autoencoder(d_in=24, n_latents=48, sparsity=TopK(k=3))
    one = train(built, mapped, steps=20, batch_size=128)
    two = train(FORMS["autoencoder"](TopK(k=3)), X, steps=20, batch_size=128)
    assert torch.equal(one.W_dec, two.W_dec)


def test_a_bad_row_of_a_memory_map_is_named_with_its_file(tmp_path):
    x = X[:300].numpy().copy()
    x[int(ArrayRows(x)._train[7]), 5] = np.nan
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    built = Autoencoder(d_in=24, n_latents=48, sparsity=TopK(k=3))
    with pytest.raises(NonFiniteError, match=r"row \d+ of .*x\.npy, column 5\. Nothing"):
        train(built, mapped, steps=3, batch_size=280)
