from tests.dictionaries.formats_table import LIMIT, MEMORY_LIMIT, in_docs, memory, rows

MEASURED = ("dictionary_learning AutoEncoder", "Gemma Scope", "SAELens jumprelu")
"""Classes whose memory is measured again: a torch file, an archive of numpy, safetensors."""


def cells():
    return [line.strip("| ").split(" | ") for line in in_docs().splitlines()[2:]]


def test_the_table_of_formats_says_what_is_read_and_written():
    found = rows()
    stated = {name: writes.replace("mechatlas alone", "") for name, writes, *_ in cells()}
    assert stated == {name: writes for name, (writes, _) in found.items()}, (
        "write it anew: python -m tests.dictionaries.formats_table"
    )
    assert all(difference <= LIMIT for _, difference in found.values())
    assert all(float(each[2]) <= LIMIT for each in cells())


def test_a_large_file_is_not_widened_in_memory():
    stated = {name: float(size) for name, *_, size in cells() if size != "-"}
    assert len(stated) > 30
    assert max(stated.values()) <= MEMORY_LIMIT
    found = memory(MEASURED)
    assert set(found) == set(MEASURED)
    assert max(found.values()) <= MEMORY_LIMIT, "float32 would need three times the file"
