"""The served page: files of one folder, on this machine alone, fetched when they are needed."""

import http.client
import re

import numpy as np
import pytest
import torch

import mechatlas as ma
from mechatlas.app.commands import serve as command
from mechatlas.app.commands.match import MatchConfig
from mechatlas.app.report.server import serve
from mechatlas.app.run_folder import execute
from mechatlas.base import RecipeError

from .browser import Browser, find
from .worlds import pictures_and_words, run_command


def answer(address: str, path: str, *, host: str = "", method: str = "GET"):
    """Status, headers and body of one request, under whatever name of a host."""
    where = address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(where)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or where)
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
        address = capsys.readouterr().err.split(" (Ctrl-C")[0]
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


@pytest.mark.page
@pytest.mark.skipif(find() is None, reason="there is no Chromium or Chrome")
def test_a_browser_draws_the_served_page(tmp_path):
    from mechatlas.app.recipes import TrustConfig
    from mechatlas.app.report.page import write_parts
    from mechatlas.app.report.runs import find_runs

    runs = find_runs(pictures_and_words(tmp_path / "runs"), trust=TrustConfig(trust=True))
    write_parts(runs, tmp_path / "page")
    program = find()
    assert program is not None
    with serve(tmp_path / "page") as address:
        browser = Browser(program, tmp_path / "profile")
        try:
            browser.open(address + "#features")
            browser.until("document.querySelectorAll('.card canvas').length > 3")
            assert browser.complaints == []
            assert any("/parts/" in request for request in browser.requests)
            assert all(request.startswith(address) for request in browser.requests
                       if not request.startswith(("data:", "blob:")))  # fmt: skip
        finally:
            browser.close()
