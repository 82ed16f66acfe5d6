"""The served page: files of one folder, on this machine alone, fetched when they are needed."""

import http.client
import re

import numpy as np
import pytest
import torch

import mechatlas as ma
from mechatlas.app.commands import serve as command
from mechatlas.app.commands.match import MatchConfig
from mechatlas.app.report.pieces import word_lists
from mechatlas.app.report.server import serve
from mechatlas.app.run_folder import execute
from mechatlas.base import RecipeError

from .browser import Browser, find
from .worlds import pictures_and_words, run_command


def answer(
    address: str,
    path: str,
    *,
    host: str = "",
    method: str = "GET",
    headers: dict[str, str] | None = None,
):
    """Status, headers and body of one request, under whatever name of a host."""
    where = address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(where)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or where)
    for name, value in (headers or {}).items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    return response.status, dict(response.getheaders()), response.read()


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "page"
    (inside / "parts").mkdir(parents=True)
    (inside / "index.html").write_text("the page")
    (inside / "parts" / "0").write_bytes(b"numbers")
    (tmp_path / "secret").write_text("not yours")
    (inside / "link").symlink_to(tmp_path / "secret")
    return inside


def test_files_of_the_folder_are_served_and_nothing_else(folder):
    with serve(folder) as address:
        assert answer(address, "/")[2] == b"the page"
        assert answer(address, "/parts/0")[2] == b"numbers"
        for path in ("/parts/", "/parts", "/link", "/../secret", "/%2e%2e/secret", "/none", "//"):
            status, _, body = answer(address, path)
            assert (status, b"not yours" in body) == (404, False) or body == b"the page", path
        assert answer(address, "/", method="POST")[0] == 501
    with pytest.raises(ConnectionRefusedError):
        answer(address, "/")


def test_part_of_a_file_is_served(folder):
    with serve(folder) as address:
        for asked, status, body in (
            ("bytes=1-3", 206, b"umb"), ("bytes=0-6", 206, b"numbers"), ("bytes=3-2", 416, b""),
            ("bytes=0-7", 416, b""), ("bytes=-3", 200, b"numbers"),
        ):  # fmt: skip
            got = answer(address, "/parts/0", headers={"Range": asked})
            assert got[0] == status, asked
            assert got[2] == body or status == 416, asked
        assert answer(address, "/link", headers={"Range": "bytes=0-1"})[0] == 404


def test_features_are_listed_by_word_and_by_file():
    random = np.random.default_rng(0)
    n, shown, length, context = 30, 4, 9, 5
    arrays = {
        "g0/tokens": random.integers(0, 12, (6, length)).astype(np.uint32),
        "0/slot": random.integers(-1, 6, (n, shown)).astype(np.int32),
        "0/first": np.stack(
            [random.integers(0, length, (n, shown)), np.zeros((n, shown), int)], axis=2
        ).astype(np.int16),
        "0/heat": (random.random((n, shown, context, 1)) < 0.2).astype(np.uint8),
    }
    data = {
        "dictionaries": [{"gallery": "g0", "kind": "text"}],
        "galleries": {"g0": {"names": list("abcdef"), "words": [str(k) for k in range(12)]}},
    }
    found = word_lists(data, arrays)
    for key, n_keys in (("token", 12), ("file", 6)):
        at, features = found[f"0/{key}"]
        for k in range(n_keys):
            expected = set()
            for i in range(n):
                for rank in range(shown):
                    slot, first = arrays["0/slot"][i, rank], arrays["0/first"][i, rank, 0]
                    if slot < 0:
                        continue
                    active = [
                        arrays["g0/tokens"][slot, first + t]
                        for t in range(min(context, length - first))
                        if arrays["0/heat"][i, rank, t, 0]
                    ]
                    if k == slot if key == "file" else k in active:
                        expected.add(i)
            assert features[int(at[k]) : int(at[k + 1])].tolist() == sorted(expected)


def test_only_the_names_of_this_machine_are_answered(folder):
    with serve(folder) as address:
        port = address.rstrip("/").rpartition(":")[2]
        assert address.startswith("http://127.0.0.1:")
        assert answer(address, "/", host=f"localhost:{port}")[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port}0"):
            status, headers, body = answer(address, "/", host=host)
            assert (status, b"the page" in body) == (403, False)
            assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_a_port_that_is_taken_is_named(folder):
    with serve(folder) as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        with pytest.raises(RecipeError, match=rf"Port {port} cannot be used .*--port"):
            serve(folder, port).__enter__()


def test_the_command_serves_numbers_apart_from_the_page(tmp_path, monkeypatch, capsys):
    rows = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
    for name in ("a", "b"):
        sae = ma.Autoencoder(d_in=8, n_latents=24, sparsity=ma.TopK(k=2))
        sae.W_dec.data[:] = torch.from_numpy(rows)
        ma.save(sae, tmp_path / name)
    paths = tmp_path / "a", tmp_path / "b"
    execute(MatchConfig(dictionaries=paths, out=tmp_path / "runs" / "match"))
    seen: dict[str, bytes] = {}

    def ask_and_leave() -> None:
        (address,) = re.findall(r"(http://\S+) \(Ctrl-C", capsys.readouterr().err)
        seen[""] = answer(address, "/")[2]
        for part in re.findall(r'data-src="([^"]+)"', seen[""].decode()):
            seen[part] = answer(address, "/" + part)[2]
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "wait", ask_and_leave)
    result, told = run_command("serve", str(tmp_path / "runs"))
    page = seen.pop("").decode()
    assert "connect-src 'self'" in page
    assert result["address"] in told
    names = re.findall(r'data-array="([^"]+)" data-dtype="(\w+)"[^>]* data-src="([^"]+)"', page)
    arrays = {name: np.frombuffer(seen[src], kind) for name, kind, src in names}
    assert np.array_equal(arrays["matching/0/latent_b"], arrays["matching/0/latent_a"])
    assert result["bytes"] == sum(map(len, seen.values())) + len(page.encode())


COUNTS = """(async () => {
  const counts = [];
  for (const text of %s) {
    const box = document.getElementById('search'), place = document.getElementById('count');
    box.value = text;
    place.textContent = '';
    document.querySelector('#atlas form').dispatchEvent(new Event('submit', { cancelable: true }));
    while (!place.textContent) await new Promise((done) => setTimeout(done, 20));
    counts.push(place.textContent);
  }
  return counts;
})()"""
FETCHED = """Object.values(performance.getEntriesByType('resource').reduce((sizes, each) => {
  sizes[each.name] = (sizes[each.name] ?? 0) + each.encodedBodySize;
  return sizes;
}, {})).reduce((a, b) => a + b, 0)"""


@pytest.mark.page
@pytest.mark.skipif(find() is None, reason="there is no Chromium or Chrome")
def test_a_browser_draws_the_served_page_from_pieces(tmp_path):
    from mechatlas.app.recipes import TrustConfig
    from mechatlas.app.report.page import report, write_parts
    from mechatlas.app.report.runs import find_runs

    folder = pictures_and_words(tmp_path / "runs")
    execute(MatchConfig(dictionaries=(folder / "mixed",) * 2, out=folder / "match"))
    runs = find_runs(folder, trust=TrustConfig(trust=True))
    write_parts(runs, tmp_path / "page")
    whole = report(folder, tmp_path / "atlas.html", trust=True)
    program = find()
    assert program is not None
    asked = {
        "mixed": ["10-19", "right", "photo 3", "file:photo", "matched", "-matched", "nothing-is"],
        "out": ["wwww", "token:wwwwww", "file:txt", "density>0.01"],
    }
    with serve(tmp_path / "page") as address:
        browser = Browser(program, tmp_path / "profile")
        try:
            found = {}
            for page in (address, whole.as_uri()):
                for site, texts in asked.items():
                    browser.open(f"{page}#{site}")
                    browser.until("document.querySelectorAll('.card .body > *').length > 3")
                    if page == address and site == "mixed":
                        browser.until("document.querySelectorAll('.card canvas').length > 3")
                        size = sum(f.stat().st_size for f in (tmp_path / "page").rglob("*")
                                   if f.is_file())  # fmt: skip
                        assert browser.run(FETCHED) < 0.8 * size
                    found[page, site] = browser.run(COUNTS % texts)
            for site in asked:
                assert found[address, site] == found[whole.as_uri(), site]
            assert any(count.startswith("300") for count in found[address, "mixed"])
            browser.open(f"{address}#mixed/200")  # of another piece than the first cards
            browser.until("document.querySelector('dialog[open] .claims[data-ready]')")
            titles = browser.run("[...document.querySelectorAll('dialog h4')]"
                                 ".map((e) => e.textContent)")  # fmt: skip
            assert {"Activations", "Goes to"} <= set(titles)
            assert browser.complaints == []
            assert any("/parts/" in request for request in browser.requests)
            assert all(request.startswith((address, "data:", "blob:", "file:", "about:"))
                       for request in browser.requests)  # fmt: skip
        finally:
            browser.close()
