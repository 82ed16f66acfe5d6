import io
import os
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


RAMP = np.repeat(np.arange(256, dtype=np.uint8)[None], 256, axis=0)
"""Gray values from left to right, in an image of 8 bits."""


def shown(tmp_path, name: str, image: Image.Image, **options) -> np.ndarray:
    place = tmp_path / name.replace(".", "_")
    place.mkdir()
    image.save(place / name, **options)
    samples = open_samples(Images(source=str(place), side=min(image.size)), NETWORK)
    return samples.read(0)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("a.png", RAMP.astype(np.uint16) << 8),
        ("a.tif", RAMP.astype(np.uint16) * 257),
        ("b.tif", RAMP.astype(np.uint16).astype(">u2") * 257),
        ("f.tif", RAMP.astype(np.float32) / 255),
        ("bits.png", RAMP >= 128),
    ],
)
def test_images_of_other_depths_are_as_bright_as_those_of_8_bits(tmp_path, name, pixels):
    expected = np.where(RAMP >= 128, 255, 0) if pixels.dtype == bool else RAMP
    found = shown(tmp_path, name, Image.fromarray(pixels))
    assert np.abs(found.astype(int) - expected[..., None]).max() <= 1


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (RAMP.astype(np.int32), "whole numbers of 32 bits, and nothing says which is white"),
        (RAMP.astype(np.float32), r"its floats are in 0\.\.255; values must be"),
        (np.full((9, 9), np.nan, np.float32), r"its floats are in nan\.\.nan"),
    ],
)
def test_numbers_of_unknown_brightness_are_refused(tmp_path, pixels, message):
    with pytest.raises(InputError, match=rf"a\.tif cannot be read as an image .*{message}"):
        shown(tmp_path, "a.tif", Image.fromarray(pixels))


def test_a_picture_is_turned_as_its_camera_noted(tmp_path):
    pixels = np.asarray(picture(0, (40, 40)))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by a quarter, clockwise
    found = shown(tmp_path, "a.png", Image.fromarray(pixels), exif=exif)
    assert (found == np.rot90(pixels, -1)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_the_background(tmp_path, mode):
    picture = Image.new("RGBA", (20, 20), (0, 0, 0, 0))  # black, and not to be seen
    picture.paste((200, 200, 200, 255), (0, 0, 10, 20))
    picture.convert(mode).save(tmp_path / "a.png")
    for background, color in (("white", 255), ("#00ff00", (0, 255, 0))):
        samples = open_samples(
            Images(source=str(tmp_path), side=20, background=background), NETWORK
        )
        found = samples.read(0)
        assert (found[10, 15] == color).all()
        assert np.abs(found[10, 5].astype(int) - 200).max() <= 3


def test_a_color_that_is_none_is_refused():
    with pytest.raises(ValueError, match="background must be a color"):
        Images(background="whitish")


def test_a_picture_for_printing_has_the_colors_of_its_inks(tmp_path):
    found = shown(tmp_path, "a.tif", Image.new("CMYK", (9, 9), (255, 0, 0, 0)))
    assert (found == (0, 255, 255)).all()


def test_gray_pictures_are_read_alike_for_one_and_for_three_channels(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    gray = tiny()
    gray.input = type("Expected", (torch.nn.Module,), {"side": 256, "channels": 1})()
    one = open_samples(Images(source=str(tmp_path)), gray).read(0)
    three = open_samples(Images(source=str(tmp_path), side=256), NETWORK).read(0)
    assert one.shape == (256, 256, 1)
    assert (one == three).all()


def test_hidden_files_and_resource_forks_are_passed_over_and_counted(folder, tmp_path):
    (folder / ".trash").mkdir()
    (folder / ".trash" / "old.png").write_bytes(b"x")
    (folder / "cats" / "._0.png").write_bytes(b"\0\5\x16\7")
    archive = tmp_path / "mac.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for path in sorted((folder / "cats").glob("[0-9].png")):
            opened.write(path, path.relative_to(folder))
            opened.writestr(f"__MACOSX/cats/._{path.name}", b"\0\5\x16\7" + bytes(100))
    inside = open_samples(Images(source=str(folder)), NETWORK)
    assert "4 images" in str(inside)
    assert "(2 hidden files are passed over)" in str(inside)
    packed = open_samples(Images(source=str(archive)), NETWORK)
    assert len(packed) == 3
    assert "(3 hidden files are passed over)" in str(packed)


def test_names_of_images_that_are_no_files_are_named(folder):
    (folder / "x_link.png").symlink_to(folder / "nowhere.png")
    (folder / "x_folder.png").mkdir()
    os.mkfifo(folder / "x_pipe.png")
    samples = open_samples(Images(source=str(folder), include="x_*"), NETWORK)
    assert len(samples) == 3
    for i, reason in enumerate(
        ["x_folder.png is a folder", "no file .*x_link", "x_pipe.png is a pipe"]
    ):
        with pytest.raises(InputError, match=reason):
            samples.read(i)


def packed(path, name: str, data: bytes, *, locked: bool = False, method: int | None = None):
    """A zip whose directory says that its member is locked, or packed by another method."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, data)
    raw = bytearray(path.read_bytes())
    central = raw.find(b"PK\x01\x02")
    raw[6] |= locked
    raw[central + 8] |= locked
    if method is not None:
        raw[8] = raw[central + 10] = method
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [({"locked": True}, "locked with a password"), ({"method": 9}, "packed by method 9")],
)
def test_members_of_zips_that_cannot_be_unpacked_are_named(tmp_path, options, message):
    data = io.BytesIO()
    picture(0).save(data, "PNG")
    images = packed(tmp_path / "a.zip", "x.png", data.getvalue(), **options)
    with pytest.raises(InputError, match=rf"a\.zip: x\.png cannot be read .*{message}"):
        open_samples(Images(source=str(images)), NETWORK).read(0)
    network = tiny()
    network.input = Letters()
    texts = packed(tmp_path / "b.zip", "x.txt", b"hello " * 99, **options)
    with pytest.raises(InputError, match=rf"b\.zip: x\.txt cannot be read .*{message}"):
        open_samples(Texts(source=texts, context=4), network)
    np.savez(tmp_path / "c.npz", x=np.zeros((4, 3)))
    rows = packed(tmp_path / "c.npz", "x.npy", b"", **options)
    with pytest.raises(InputError, match=message):
        open_samples(Arrays(source=rows), network)


@pytest.mark.parametrize("compress", [False, True])
def test_damage_of_any_byte_of_an_archive_is_one_sentence_or_nothing(tmp_path, compress):
    source, random = tmp_path / "x.npz", np.random.default_rng(0)
    (np.savez_compressed if compress else np.savez)(source, x=np.arange(60.0).reshape(20, 3))
    whole = source.read_bytes()
    messages = []
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] ^= 1 << random.integers(8)
        source.write_bytes(
            damaged[: random.integers(len(whole) + 1)] if len(messages) % 3 else damaged
        )
        try:
            samples = open_samples(Arrays(source=source), NETWORK)
            assert [samples.read(i).tolist() for i in range(len(samples))]
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(str(source) in message for message in messages)


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(tmp_path):
    big = np.zeros((3, 160 << 20), np.uint8)
    np.savez_compressed(tmp_path / "packed.npz", big)
    np.lib.format.open_memmap(tmp_path / "row.npy", "w+", np.uint8, (2, 200 << 20))
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", bytes(200 << 20))
    Image.new("1", (20_000, 20_000)).save(tmp_path / "wide.png")
    makes = [
        lambda: Arrays(source=tmp_path / "packed.npz"),
        lambda: Arrays(source=tmp_path / "row.npy"),
        lambda: Images(source=str(tmp_path / "images.zip")),
        lambda: Images(source=str(tmp_path), include="wide.png"),
    ]
    for make in makes:
        with pytest.raises(InputError, match=r"memory_mib|too large to be a photograph"):
            open_samples(make(), NETWORK, memory_mib=512).read(0)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["<f4", ">f8", "<f2", "<i8", "u1", "?"])
def test_rows_of_files_are_those_of_the_array(tmp_path, kind, order):
    x = np.asarray(np.random.default_rng(0).integers(0, 2, (7, 3, 2)), kind, order=order)
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "b.npz", x=x)
    np.savez_compressed(tmp_path / "c.npz", x=x)
    for name in ("a.npy", "b.npz", "c.npz"):
        samples = open_samples(Arrays(source=tmp_path / name), tiny())
        batch = samples.stack([samples.read(i) for i in range(7)])
        assert batch.tolist() == x.tolist()
        assert batch.dtype in (torch.float32, torch.float64, torch.int64)


def test_arrays_of_words_and_objects_are_refused(tmp_path):
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "records.npy", np.zeros(3, [("a", "f4"), ("b", "i4")]))
    for name, what in (("words", "words"), ("objects", "Python objects"), ("records", "records")):
        with pytest.raises(InputError, match=rf"{name}\.npy holds {what} .*expected numbers"):
            open_samples(Arrays(source=tmp_path / f"{name}.npy"), tiny())


X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


class Pairs(torch.utils.data.Dataset):
    """Inputs with their labels."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(X[index]), index % 2


def doubled(items):
    return torch.stack([2 * x for x, _ in items]), [y for _, y in items]


FORMS = {
    "array": X,
    "columns first": np.asfortranarray(X),
    "backwards": X[::-1].copy()[::-1],
    "big endian": X.astype(">f4"),
    "masked nowhere": np.ma.masked_array(X, mask=False),
    "tensor": torch.from_numpy(X),
    "with gradient": torch.from_numpy(X).requires_grad_(),
    "float64": torch.from_numpy(X).double(),
    "lists": X.tolist(),
    "list of tensors": list(torch.from_numpy(X)),
    "data set": torch.utils.data.TensorDataset(torch.from_numpy(X)),
    "pairs": Pairs(),
    "loader": torch.utils.data.DataLoader(Pairs(), batch_size=3, shuffle=True),
    "loader that halves": torch.utils.data.DataLoader(
        Pairs(), batch_size=3, collate_fn=lambda items: (doubled(items)[0] / 2, 0)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_taken_in_whatever_form_they_come(form):
    samples = open_samples(FORMS[form], tiny())
    assert len(samples) == len(X)
    batch = samples.stack([samples.read(i) for i in range(len(X))])
    assert (batch.float().numpy() == X).all()
    assert samples.name(7).endswith("7")


def test_a_loader_is_read_as_its_own_function_makes_samples():
    loader = torch.utils.data.DataLoader(Pairs(), batch_size=3, collate_fn=doubled)
    samples = open_samples(loader, tiny())
    assert (samples.stack([samples.read(5)])[0].numpy() == 2 * X[5]).all()
    some = torch.utils.data.DataLoader(
        Pairs(), sampler=torch.utils.data.SubsetRandomSampler([6, 2])
    )
    samples = open_samples(some, tiny())
    assert [samples.name(i) for i in range(2)] == ["Pairs sample 2", "Pairs sample 6"]


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield torch.zeros(3)


class Broken(Pairs):
    def __getitem__(self, index):
        raise KeyError("row")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (Endless(), "Endless can only be iterated"),
        (
            torch.utils.data.DataLoader(
                Pairs(), sampler=torch.utils.data.WeightedRandomSampler([1.0] * 8, 8)
            ),
            "by a WeightedRandomSampler",
        ),
        (Broken(), "Broken sample 0 cannot be read .KeyError"),
        ([{"x": 1}], "holds object values"),
        (np.ma.masked_array(X, mask=X > 1), "masked values"),
        (torch.from_numpy(X).to_sparse(), "sparse tensor"),
        (X.astype(np.complex64), "complex64"),
        (["a", "b"], "holds <U1 values"),
        (np.zeros((0, 3)), "is empty"),
        (3, r"is empty|shape"),
    ],
)
def test_samples_that_cannot_be_numbered_or_are_no_numbers_are_refused(samples, message):
    with pytest.raises(InputError, match=message):
        open_samples(samples, tiny()).read(0)
