from tests.dictionaries.formats_table import LIMIT, in_docs, rows


def test_the_table_of_formats_says_what_is_read_and_written():
    found = rows()
    lines = [line.strip("| ").split(" | ") for line in in_docs().splitlines()[2:]]
    stated = {name: writes.replace("mechatlas alone", "") for name, writes, _ in lines}
    assert stated == {name: writes for name, (writes, _) in found.items()}, (
        "write it anew: python -m tests.dictionaries.formats_table"
    )
    assert all(difference <= LIMIT for _, difference in found.values())
    assert all(float(each[2]) <= LIMIT for each in lines)
