"""Every main verb shows how it is called, and the example runs as it stands."""

import doctest

import pytest

import mechatlas

VERBS = (
    "assign",
    "basis",
    "branches",
    "circuit",
    "collect",
    "evaluate",
    "find_sites",
    "group",
    "intervene",
    "list_sites",
    "load",
    "load_network",
    "load_proof",
    "match",
    "open_samples",
    "prove",
    "read_activations",
    "save",
    "Store",
    "symmetry",
    "track",
    "train",
)


def example_of(verb: str) -> doctest.DocTest:
    function = getattr(mechatlas, verb)
    parser = doctest.DocTestParser()
    return parser.get_doctest(function.__doc__ or "", {"__name__": "example"}, verb, None, None)


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_a_verb_runs(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = example_of(verb)
    assert test.examples, f"{verb} has no example"
    lines: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=lines.append)
    assert not runner.failures, "".join(lines)


def test_an_example_that_is_wrong_is_reported():
    parser = doctest.DocTestParser()
    test = parser.get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    runner = doctest.DocTestRunner()
    runner.run(test, out=lambda text: None)
    assert runner.failures == 1
