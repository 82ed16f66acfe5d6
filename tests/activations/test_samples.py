import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from mechatlas.activations.architectures.inception import InceptionMini
from mechatlas.activations.samples import Arrays, Images, Texts, open_samples
from mechatlas.base import InputError, RecipeError
from tests.networks import tiny

NETWORK = InceptionMini()


def picture(seed: int, size: tuple[int, int] = (40, 50)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cats").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "cats" / f"{i}.png")
    picture(3).convert("L").save(tmp_path / "grey.png")
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_a_folder_and_a_zip_of_it_give_the_same_samples(folder, tmp_path):
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for path in sorted(folder.rglob("*.png")):
            opened.write(path, path.relative_to(folder))
    a = open_samples(Images(source=str(folder)), NETWORK)
    b = open_samples(Images(source=str(archive)), NETWORK)
    assert len(a) == len(b) == 4
    for i in range(4):
        assert a.name(i) == b.name(i)
        assert (a.read(i) == b.read(i)).all()
        assert a.read(i).shape == (31, 31, 3)


def test_include_picks_by_name(folder):
    samples = open_samples(Images(source=str(folder), include="cats/*"), NETWORK)
    assert [samples.name(i) for i in range(len(samples))] == [
        "cats/0.png",
        "cats/1.png",
        "cats/2.png",
    ]


def test_a_batch_is_rgb_in_0_to_1(folder):
    samples = open_samples(Images(source=str(folder), side=40), NETWORK)
    batch = samples.stack([samples.read(0), samples.read(1)])
    assert batch.shape == (2, 3, 40, 40)
    expected = np.asarray(picture(0))[:, 5:45].astype(np.float32) / 255
    torch.testing.assert_close(batch[0].permute(1, 2, 0), torch.from_numpy(expected))


def test_crops_differ_and_are_the_same_every_time(folder):
    recipe = Images(source=str(folder), crops=5, seed=1)
    first, second = open_samples(recipe, NETWORK), open_samples(recipe, NETWORK)
    assert len(first) == 20
    crops = [first.read(i) for i in range(5)]
    assert all((crops[i] == second.read(i)).all() for i in (3, 1, 4, 0, 2))
    assert len({c.tobytes() for c in crops}) == 5
    assert first.name(7) == "cats/1.png crop 2"


def test_the_photos_of_the_package_are_there():
    samples = open_samples(Images(), NETWORK)
    assert len(samples) >= 5
    assert all(samples.read(i).std() > 3 for i in range(len(samples)))


def test_an_array_of_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 31, 31, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    np.save(tmp_path / "b.npy", images.astype(np.float32) / 255)
    for name in ("a.npz", "b.npy"):
        samples = open_samples(Images(source=str(tmp_path / name)), NETWORK)
        assert (samples.read(4) == images[4]).all()


def test_a_truncated_image_is_named(folder):
    whole = (folder / "cats" / "1.png").read_bytes()
    (folder / "cats" / "1.png").write_bytes(whole[: len(whole) // 2])
    samples = open_samples(Images(source=str(folder)), NETWORK)
    samples.read(0)
    with pytest.raises(InputError, match=r"cats/1\.png cannot be read as an image"):
        samples.read(1)


def test_what_is_not_an_image_at_all_is_named(folder):
    (folder / "fake.jpg").write_bytes(b"hello")
    samples = open_samples(Images(source=str(folder), include="fake*"), NETWORK)
    with pytest.raises(InputError, match=r"fake\.jpg cannot be read as an image"):
        samples.read(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Images(source=str(p / "nowhere")), "no folder or file"),
        (lambda p: Images(source=str(p)), r"no image whose name matches '\*'"),
        (lambda p: Images(source=str(p / "a.zip")), "cannot be read as a zip"),
        (lambda p: Images(source=str(p / "a.npz")), "cannot be read as an array"),
        (lambda p: Images(source=str(p / "flat.npy")), r"has shape \(3, 4\), expected images"),
        (lambda p: Images(source=str(p / "a.doc")), "is not a folder"),
        (lambda p: Arrays(source=p / "empty.npy"), "is empty"),
        (lambda p: Arrays(source=p / "two.npz"), "holds 2 arrays, expected one"),
    ],
)
def test_sources_that_hold_nothing_usable_are_refused(tmp_path, make, message):
    place = tmp_path / "place"
    place.mkdir()
    for name in ("a.zip", "a.npz", "a.doc"):
        (place / name).write_bytes(b"nothing of the kind")
    np.save(place / "flat.npy", np.zeros((3, 4)))
    np.save(place / "empty.npy", np.zeros((0, 4)))
    np.savez(place / "two.npz", a=np.zeros(2), b=np.zeros(2))
    with pytest.raises(InputError, match=message):
        open_samples(make(place), NETWORK)


def test_the_wrong_number_of_channels_is_named(tmp_path):
    np.save(tmp_path / "grey.npy", np.zeros((2, 31, 31, 1), np.uint8))
    samples = open_samples(Images(source=str(tmp_path / "grey.npy")), NETWORK)
    with pytest.raises(
        InputError, match=r"grey\.npy: image 1 has 1 channels, the network expects 3"
    ):
        samples.read(1)


def test_floats_outside_0_to_1_are_refused(tmp_path):
    np.save(tmp_path / "big.npy", np.full((2, 31, 31, 3), 7.0))
    samples = open_samples(Images(source=str(tmp_path / "big.npy")), NETWORK)
    with pytest.raises(InputError, match=r"must be bytes, or floats in 0\.\.1"):
        samples.read(0)


def test_a_network_that_does_not_say_its_side_needs_one_in_the_recipe(folder):
    with pytest.raises(RecipeError, match="set `side` in the recipe"):
        open_samples(Images(source=str(folder)), tiny())
    assert open_samples(Images(source=str(folder), side=9), tiny()).read(0).shape == (9, 9, 3)


def test_rows_of_an_array_are_given_as_they_are(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(12.0).reshape(4, 3))
    np.save(tmp_path / "tokens.npy", np.arange(12, dtype=np.int32).reshape(4, 3))
    samples = open_samples(Arrays(source=tmp_path / "x.npy"), tiny())
    assert samples.stack([samples.read(2)]).tolist() == [[6.0, 7.0, 8.0]]
    tokens = open_samples(Arrays(source=tmp_path / "tokens.npy"), tiny())
    assert tokens.stack([tokens.read(1)]).dtype == torch.int64


def test_a_row_with_nan_is_named(tmp_path):
    x = np.zeros((4, 3))
    x[2, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    samples = open_samples(Arrays(source=tmp_path / "x.npy"), tiny())
    with pytest.raises(InputError, match=r"x\.npy row 2 is NaN or infinite at \[1\]"):
        samples.read(2)


class Letters(torch.nn.Module):
    """A tokenizer of one token a letter."""

    def windows(self, text: str, context: int) -> np.ndarray:
        ids = np.array([ord(c) for c in text])
        return ids[: len(ids) // context * context].reshape(-1, context)


def test_texts_are_cut_into_windows_in_order_of_their_names(tmp_path):
    network = tiny()
    network.input = Letters()
    (tmp_path / "b.txt").write_text("abcdefgh")
    (tmp_path / "a.txt").write_text("ABCDE")
    (tmp_path / "c.md").write_text("xxxxxxxxx")
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        for name in ("a.txt", "b.txt"):
            archive.write(tmp_path / name, name)
    for source in (tmp_path, tmp_path / "t.zip"):
        samples = open_samples(Texts(source=source, context=4), network)
        assert [samples.name(i) for i in range(len(samples))] == [
            "a.txt window 0",
            "b.txt window 0",
            "b.txt window 1",
        ]
        assert "".join(map(chr, samples.read(2))) == "efgh"


def test_texts_that_are_too_short_or_have_no_tokenizer_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(InputError, match="has no tokenizer"):
        open_samples(Texts(source=tmp_path), tiny())
    network = tiny()
    network.input = Letters()
    with pytest.raises(InputError, match="no text of at least 4 tokens"):
        open_samples(Texts(source=tmp_path, context=4), network)


def test_reading_is_the_same_in_any_order_and_thread(folder):
    from concurrent.futures import ThreadPoolExecutor

    samples = open_samples(Images(source=str(folder), crops=30), NETWORK)
    expected = [samples.read(i).tobytes() for i in range(len(samples))]
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).permutation(len(samples)).tolist()
        found = dict(zip(order, pool.map(lambda i: samples.read(i).tobytes(), order), strict=True))
    assert [found[i] for i in range(len(samples))] == expected
