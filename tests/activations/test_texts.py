import csv
import gzip
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from torch import nn

from mechatlas.activations import text_sources, texts
from mechatlas.activations.samples import open_samples
from mechatlas.activations.text_input import TextInput
from mechatlas.activations.texts import Texts, TextSamples, text_samples
from mechatlas.base import InputError

pytest.importorskip("transformers")

from tests.language_models import byte_tokenizer

START, END = 256, 257
DOCUMENTS = ["The first text.", "Two", "A third text, which is longer than all others."]


def network(first: str | None = None, last: str | None = None, *, causal: bool = True) -> Any:
    """A network of which only the tokenizer is used."""
    module = nn.Module()
    tokenizer = byte_tokenizer(first, last)
    module.input = TextInput("Bytes", tokenizer, vocabulary=258, context=48, causal=causal)
    return module


def words(samples: TextSamples, index: int) -> str:
    ids = samples.token_ids(index)[~samples.padding(index)].tolist()
    return byte_tokenizer().decode(ids)


def cut(path: Path, **settings: Any) -> TextSamples:
    samples = open_samples(Texts(source=path, **settings), network())
    assert isinstance(samples, TextSamples)
    return samples


def write(path: Path, documents: list[Any], column: str = "text") -> Path:
    """A file of rows, in the format of its ending."""
    rows = [{"id": i, column: document} for i, document in enumerate(documents)]
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, path, row_group_size=2)
        return path
    if name.endswith(".csv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["id", column])
            writer.writeheader()
            writer.writerows(rows)
        return path
    lines = name.endswith(".jsonl")
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


FORMATS = ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_rows_give_the_windows_of_their_texts(tmp_path, name):
    path = write(tmp_path / name, DOCUMENTS)
    column = "text" if name.endswith("csv") else None  # all columns of a csv are text
    samples = cut(path, context=16, packing="document", column=column)
    texts = [words(samples, i) for i in range(len(samples))]
    assert texts[:2] == DOCUMENTS[:2]
    assert "".join(texts[2:]) == DOCUMENTS[2]
    assert samples.name(1) == f"{name} row 2 window 0"
    assert samples.name(3) == f"{name} row 3 window 1"
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(path, f"in/{name}")
    packed = cut(tmp_path / "z.zip", context=16, packing="document", column=column)
    assert [words(packed, i) for i in range(len(packed))] == texts
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / name)
    folder = cut(tmp_path / "folder", context=16, packing="document", column=column)
    assert [words(folder, i) for i in range(len(folder))] == texts


def test_packed_documents_are_joined_by_the_token_that_ends_a_text(tmp_path):
    samples = cut(write(tmp_path / "a.jsonl", DOCUMENTS), context=10)
    joined = [*DOCUMENTS[0].encode(), END, *DOCUMENTS[1].encode(), END, *DOCUMENTS[2].encode()]
    vocabulary = byte_tokenizer().get_vocab()
    plain = [vocabulary[c] if (c := chr(b)) in vocabulary else vocabulary["Ġ"] for b in joined[:15]]
    tokens = np.concatenate([samples.token_ids(i) for i in range(len(samples))])
    assert len(samples) == len(joined) // 10
    assert tokens[:15].tolist() == plain
    assert np.flatnonzero(tokens == END).tolist() == [15, 19]
    assert samples.name(1) == "a.jsonl row 1 from token 10"
    assert samples.name(2) == "a.jsonl row 3 from token 0"
    assert not any(samples.padding(i).any() for i in range(len(samples)))


def test_special_tokens_stand_in_every_window_however_it_is_packed(tmp_path):
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    for packing in ("cut", "packed", "document"):
        samples = open_samples(
            Texts(source=path, context=12, packing=packing), network("<s>", "</s>")
        )
        assert isinstance(samples, TextSamples)
        for i in range(len(samples)):
            real = samples.token_ids(i)[~samples.padding(i)]
            assert real[0] == START
            assert real[-1] == END
        if packing == "document":
            assert [int((~samples.padding(i)).sum()) for i in range(3)] == [12, 7, 5]
    assert samples.special_ids == {START, END}


def test_the_padding_of_a_short_document_comes_last(tmp_path):
    samples = cut(write(tmp_path / "a.jsonl", ["abc", "defg"]), context=6, packing="document")
    assert samples.padding(0).tolist() == [False] * 3 + [True] * 3
    assert samples.padding(1).tolist() == [False] * 4 + [True] * 2
    assert (samples.token_ids(1)[4:] == END).all()
    batch = samples.stack([samples.read(0), samples.read(1)])
    assert batch.shape == (2, 6)
    assert batch.dtype == torch.int64


def test_text_files_are_cut_as_they_always_were(tmp_path):
    text = "One line.\nAnother line.\n\nAnd a last one without an end"
    (tmp_path / "b.txt").write_text(text)
    (tmp_path / "a.txt").write_text("Short.")
    samples = cut(tmp_path, context=7)
    assert samples.packing == "cut"
    expected = network().input.windows(text, 7)
    assert np.array_equal([samples.read(i) for i in range(len(samples))], expected)
    assert samples.name(3) == "b.txt window 3"


def test_a_long_text_has_the_tokens_of_the_whole_whatever_its_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, "PIECE", 30)
    tokenizer = pytest.importorskip("tokenizers")
    bpe = tokenizer.Tokenizer(tokenizer.models.BPE())
    bpe.pre_tokenizer = tokenizer.pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "the cat sat on the mat\nthe dog  \n\n sat\ton the\nmat and the cat\n" * 9
    trainer = tokenizer.trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>"])
    bpe.train_from_iterator([text], trainer)
    import transformers

    module = nn.Module()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")
    module.input = TextInput("BPE", fast, vocabulary=200, context=None)
    (tmp_path / "a.txt").write_text(text)
    samples = open_samples(Texts(source=tmp_path / "a.txt", context=3), module)
    whole = fast(text)["input_ids"]
    tokens = np.concatenate([samples.read(i) for i in range(len(samples))])
    assert tokens.tolist() == whole[: len(whole) // 3 * 3]
    row = text_samples([text], module, context=3, packing="cut")
    assert [row.read(i).tolist() for i in range(len(row))] == tokens.reshape(-1, 3).tolist()
    assert row.name(2) == "document row 1 window 2"


def test_texts_without_line_ends_are_read_too(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, "PIECE", 10)
    (tmp_path / "a.txt").write_text("word " * 100 + "x" * 400)
    samples = cut(tmp_path / "a.txt", context=9)
    assert "".join(words(samples, i) for i in range(100)) == ("word " * 100 + "x" * 400)
    (tmp_path / "b.txt").write_bytes(b"A line of Windows.\r\n" * 40)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:  # kept there, as it always was
        archive.write(tmp_path / "b.txt", "b.txt")
    for path, end in (("b.txt", "\n"), ("z.zip", "\r\n")):
        samples = cut(tmp_path / path, context=10)
        text = "".join(words(samples, i) for i in range(len(samples)))
        assert ("A line of Windows." + end) * 40 == text


@pytest.mark.parametrize(("setting", "expected"), [("max_samples", 3), ("max_tokens", 3)])
def test_reading_stops_at_a_limit(setting, expected):
    taken: list[int] = []

    def endless():
        while True:
            taken.append(1)
            yield "Some words. "

    limit = {"max_samples": 3, "max_tokens": 31}[setting]
    samples = text_samples(endless(), network(), context=10, **{setting: limit})
    assert len(samples) == expected
    assert len(taken) < 6


@pytest.mark.parametrize("packing", ["cut", "document", "packed"])
def test_a_limit_takes_windows_of_many_files_in_turn(tmp_path, packing, monkeypatch):
    monkeypatch.setattr(texts, "OPEN_FILES", 8)
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(
            f"{i:02} " * 100 * (1 + 30 * (i == 0 and packing == "cut"))
        )
    options: dict[str, Any] = {"context": 12, "packing": packing}
    some = cut(tmp_path, max_samples=400, **options)
    n_windows = Counter(some.name(i)[:2] for i in range(len(some)))
    assert len(some) == 400
    assert len(n_windows) >= 16
    assert max(n_windows.values()) <= 60
    if packing != "packed":
        for i in range(len(some)):  # of the file that it names
            assert some.name(i)[:2] in words(some, i)
    everything = cut(tmp_path, max_samples=10**6, **options)
    in_order = cut(tmp_path, **options)
    assert [in_order.name(i)[:2] for i in (0, 1)] == ["00", "00"]
    assert len(in_order) == len(everything)


def test_packed_documents_of_many_files_are_taken_in_turn(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.jsonl", [f"{i}{j}" for j in range(9)])
    samples = cut(tmp_path, context=20, max_samples=3)
    found = [words(samples, i) for i in range(3)]
    documents = "".join(found).split("</s>")
    assert len({d[0] for d in documents[:5]}) == 5
    assert [d[1] for d in documents[:15]] == [*"00000", *"11111", *"22222"]
    assert samples.name(0)[0] == documents[0][0]


def test_any_iterable_of_texts_rows_or_token_ids_can_be_read():
    plain = text_samples(iter(DOCUMENTS), network(), context=8, packing="document")
    rows = text_samples(
        [{"text": t, "n": 1} for t in DOCUMENTS], network(), context=8, packing="document"
    )
    ids = [network().input.tokens(t) for t in DOCUMENTS]
    several: list[Any] = [ids, [i.tolist() for i in ids], [torch.from_numpy(i) for i in ids]]
    for same in (
        rows,
        *(text_samples(x, network(), context=8, packing="document") for x in several),
    ):
        assert [same.read(i).tolist() for i in range(len(same))] == [
            plain.read(i).tolist() for i in range(len(plain))
        ]
    assert plain.name(0) == "document row 1 window 0"
    opened = open_samples((t for t in DOCUMENTS), network())
    assert isinstance(opened, TextSamples)
    windows = np.zeros((4, 8), dtype=np.int64)
    assert not isinstance(open_samples(windows, network()), TextSamples)


def test_token_ids_are_taken_as_they_are():
    samples = text_samples([[1, 2, 3], [4, 5, 6, 7, 8]], network("<s>"), context=4)
    assert [samples.read(i).tolist() for i in range(2)] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    with pytest.raises(InputError, match=r"document row 2 has token ids 4\.\.900"):
        text_samples([[1, 2], [4, 900]], network(), context=2)


def test_special_tokens_written_in_a_text_stay_words(tmp_path):
    (tmp_path / "a.txt").write_text("He wrote <s> and </s> here. " * 9)
    samples = open_samples(Texts(source=tmp_path / "a.txt", context=16), network("<s>"))
    assert isinstance(samples, TextSamples)
    for i in range(len(samples)):
        assert np.isin(samples.token_ids(i), list(samples.special_ids)).sum() == 1
    assert "<s>" in words(samples, 0)[3:]


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}"
    "{% endfor %}"
)


def test_conversations_are_laid_out_in_the_chat_template(tmp_path):
    module = network("<s>")
    talk = [{"role": "user", "content": " hi "}, {"role": "bot", "content": "say </s>!"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": talk, "text": "no"}))
    with pytest.raises(InputError, match="cannot lay out a conversation"):
        open_samples(Texts(source=path, chat=True, context=40), module)
    module.input.tokenizer.chat_template = TEMPLATE
    samples = open_samples(Texts(source=path, chat=True, context=40), module)
    assert isinstance(samples, TextSamples)
    assert words(samples, 0) == "<s>[user]hi</s>[bot]say </s>!</s>"
    ids = samples.token_ids(0)[~samples.padding(0)]
    assert np.isin(ids, [START, END]).sum() == 3
    expected = module.input.tokenizer.apply_chat_template(talk[:1], tokenize=True)["input_ids"]
    one = text_samples([{"messages": talk[:1]}], module, chat=True, context=40)
    assert one.token_ids(0)[~one.padding(0)].tolist() == expected


def refusal(source: Any, module: Any = None, **settings: Any) -> str:
    values: dict[str, Any] = {"context": 16, **settings}
    with pytest.raises(InputError) as error:
        open_samples(Texts(source=source, **values), module or network())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sources_that_are_no_texts_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    assert "ends in '.docx', expected one of .csv, .json" in refusal(tmp_path / "a.docx")
    assert "no file that matches '*' and ends in" in refusal(tmp_path)
    (tmp_path / "b.txt").write_bytes(bytes(range(256)) * 9)
    assert "b.txt is not text" in refusal(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_bytes("café".encode("latin-1") * 99)
    assert "c.txt is not text in UTF-8 (invalid" in refusal(tmp_path / "c.txt")
    (tmp_path / "n.txt").write_bytes(b"abc\0" * 99)
    assert "bytes that are zero" in refusal(tmp_path / "n.txt")
    assert "There is no text file, folder or zip" in refusal(tmp_path / "none.txt")


def test_rows_that_hold_no_text_are_refused_by_their_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x", "b": "y"}\n')
    assert "has 2 columns of text; name one with `column`. Columns: a, b." in refusal(path)
    assert "row 1, has no column 'c'; it has a, b" in refusal(path, column="c")
    path.write_text('{"a": "x"}\n\n{"a": "y"\n')
    assert "line 3, is not JSON" in refusal(path)
    path.write_text('{"a": ""}\n{"a": null}\n')
    assert "no text in the column 'a' of its 2 rows" in refusal(path)
    path.write_text('{"a": "x"}\n{"a": 3}\n')
    assert "row 2, holds a int in the column 'a'" in refusal(path)
    path.write_text('{"messages": []}\n')
    assert "set chat = true" in refusal(path)
    path.write_text('{"messages": ["hi"]}\n')
    assert "holds no conversation in the column 'messages'" in refusal(path, chat=True)
    rows = tmp_path / "b.json"
    rows.write_text('{"text": "x"}\n{"text": "y"}\n')
    assert "Rows of JSON one a line are a .jsonl file" in refusal(rows)
    rows.write_text('"x"')
    assert "holds a str, expected a list" in refusal(rows)
    table = tmp_path / "c.csv"
    table.write_text("text\na,b\n")
    assert "row 1, has more fields" in refusal(table)


@pytest.mark.parametrize("name", FORMATS)
def test_files_that_are_cut_short_are_refused(tmp_path, name):
    path = write(tmp_path / name, ["A text of some words." * 9] * 40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if name == "a.csv":  # a row more or less cannot be told
        assert len(cut(path, context=16, column="text")) > 9
    else:
        assert name in refusal(path, context=16, column="text")


def test_windows_that_do_not_fit_the_network_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    assert "reads at most 48 tokens at once, got a context of 49" in refusal(path, context=49)
    assert "no text of at least 48 tokens" in refusal(
        write(tmp_path / "b.jsonl", ["abc"]), context=48
    )
    assert "max_tokens = 5 is less than one window" in refusal(path, context=16, max_tokens=5)
    encoder = network("<s>", "</s>", causal=False)
    assert "no token for padding" in refusal(path, encoder, context=16, packing="document")
    module = network()
    module.input.separator = None
    assert "no token that ends a text" in refusal(path, module, context=16, packing="packed")
    with pytest.raises(ValueError, match="max_samples must be at least 1"):
        Texts(source=path, max_samples=0)


def test_windows_are_read_in_any_order_and_thread(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    samples = cut(write(tmp_path / "a.jsonl", ["some words"] * 3000), context=16)
    expected = [samples.read(i).tobytes() for i in range(len(samples))]
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).permutation(len(samples)).tolist()
        found = dict(zip(order, pool.map(lambda i: samples.read(i).tobytes(), order), strict=True))
    assert [found[i] for i in range(len(samples))] == expected
    with pytest.raises(IndexError):
        samples.read(len(samples))
