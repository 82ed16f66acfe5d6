"""The hub, as a server on this machine that speaks its protocol."""

import hashlib
import http.server
import json
import re
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import constants

from mechatlas.base import WeightsError
from mechatlas.dictionaries import hub
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.foreign.layouts import LAYOUTS
from mechatlas.dictionaries.formats import load
from mechatlas.dictionaries.sparsity import TopK
from tests.dictionaries.golden import GOLDEN, expected

COMMIT = "1" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, `me/sae`, whose files are those of a folder."""

    root: Path
    damage = ""
    asked: list[str]
    uploaded: dict[str, bytes]

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""

    def answer(self, data: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        own = {"Content-Length": str(len(data)), **headers}
        for key, value in own.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, what: str) -> None:
        self.answer(b"{}", 404, X_Error_Code=what)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        type(self).asked.append(f"{self.command} {path}")
        parts = path.removeprefix("/api/models").split("/")[3:]
        files = {str(f.relative_to(self.root)): f for f in self.root.rglob("*") if f.is_file()}
        name = "/".join(parts[2:])
        if not path.removeprefix("/api/models").startswith("/me/sae"):
            self.missing("RepoNotFound")
        elif parts and parts[1] not in ("main", COMMIT):
            self.missing("RevisionNotFound")
        elif parts and parts[0] == "tree":
            entries = [
                {"type": "file", "path": name, "size": f.stat().st_size, "oid": "0" * 40}
                for name, f in files.items()
            ]
            self.answer(json.dumps(entries).encode(), Content_Type="application/json")
        elif not parts or parts[0] == "revision":
            siblings = [{"rfilename": name} for name in files]
            facts = {"id": "me/sae", "sha": COMMIT, "siblings": siblings, "private": False}
            self.answer(json.dumps(facts).encode(), Content_Type="application/json")
        elif name not in files:
            self.missing("EntryNotFound")
        else:
            self.give(files[name].read_bytes())

    def give(self, data: bytes) -> None:
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        if self.damage == "checksum":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(200)
        sizes = dict.fromkeys(("Content-Length", "X-Linked-Size"), str(len(data)))
        tags = {"ETag": etag, "X-Linked-Etag": etag, "X-Repo-Commit": COMMIT}
        for key, value in {**sizes, **tags}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if self.damage == "cut" else data)

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        own = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            found = {"url": f"{own}/me/sae"}
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            found = {
                "files": [
                    {"path": f["path"], "uploadMode": "lfs", "shouldIgnore": False} for f in files
                ]
            }
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            found = {
                "transfer": "basic",
                "objects": [
                    {**o, "actions": {"upload": {"href": f"{own}/upload/{o['oid']}"}}}
                    for o in objects
                ],
            }
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "lfsFile":
                    target = self.root / line["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(type(self).uploaded[line["value"]["oid"]])
            found = {"commitUrl": f"{own}/me/sae/commit/{COMMIT}", "commitOid": COMMIT}
        self.answer(json.dumps(found).encode(), Content_Type="application/vnd.git-lfs+json")

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).uploaded[self.path.split("/")[-1]] = data
        self.answer()


@pytest.fixture
def server(tmp_path, monkeypatch):
    handler = type("Served", (Hub,), {"root": tmp_path / "served", "asked": [], "uploaded": {}})
    handler.root.mkdir()
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{served.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield handler
    served.shutdown()
    served.server_close()


def test_a_dictionary_is_fetched_once_with_its_settings(server):
    shutil.copytree(GOLDEN / "llama_scope", server.root / "L3")
    (server.root / "README.md").write_text("not asked for")
    dictionary = load("hf://me/sae/L3@main")
    found = expected("llama_scope")
    torch.testing.assert_close(dictionary.encode(found["x"]), found["code"], rtol=1e-5, atol=1e-5)
    names = {line.split("/", 5)[-1] for line in server.asked if line.startswith("GET /me")}
    assert names == {"L3/hyperparams.json", "L3/checkpoints/final.safetensors"}
    server.asked.clear()
    load("hf://me/sae/L3@main")
    assert not [line for line in server.asked if line.startswith("GET /me")]


def test_a_file_is_fetched_with_what_lies_beside_it(server):
    shutil.copytree(GOLDEN / "connor_rob", server.root, dirs_exist_ok=True)
    dictionary = load("hf://me/sae/gpt2-small_L3_Hcat_z.pt")
    assert dictionary.site == "blocks.3.attn.hook_z"


def test_what_goes_wrong_at_the_hub_is_one_sentence(server, monkeypatch):
    shutil.copytree(GOLDEN / "qwen_scope", server.root, dirs_exist_ok=True)
    for address, said in (
        ("hf://me/other", "The hub has no repository me/other, or it is private"),
        ("hf://me/sae@v9", "me/sae has no revision 'v9'"),
        ("hf://me/sae/layer9", r"me/sae has no 'layer9'; it has layer0\.sae\.pt"),
        ("hf://me", "is not of the form hf://owner/name"),
        ("hf://me/sae/../x", "is not of the form hf://owner/name"),
    ):
        with pytest.raises(WeightsError, match=said) as caught:
            load(address, k=4)
        assert "\n" not in str(caught.value)
    server.damage = "cut"
    with pytest.raises(WeightsError, match="cannot be fetched"):
        load("hf://me/sae", k=4)
    server.damage = "checksum"
    with pytest.raises(WeightsError, match="is not the file that the hub states: its checksum"):
        load("hf://me/sae", k=4)
    server.damage = ""
    assert load("hf://me/sae", k=4).n_latents == 24
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"cannot be fetched .* Is there a network\?"):
        load("hf://me/sae@other", k=4)


def test_a_dictionary_that_is_pushed_comes_back(server):
    dictionary = Autoencoder(d_in=4, n_latents=8, sparsity=TopK(k=2))
    address = hub.push(dictionary, "hf://me/sae/mine", format="saelens")
    assert address == f"hf://me/sae/mine@{COMMIT}"
    again = load(address)
    x = torch.randn(5, 4)
    torch.testing.assert_close(again.encode(x), dictionary.encode(x))


def test_a_release_is_found_in_the_table_and_its_settings_with_it(server, monkeypatch):
    shutil.copytree(GOLDEN / "qwen_scope", server.root, dirs_exist_ok=True)
    shutil.copytree(GOLDEN / "circuit_tracer_clt_relu", server.root, dirs_exist_ok=True)
    table = {
        "qwen": {"repository": "me/sae", "format": "qwen_scope", "ids": {"0": "layer0.sae.pt"}},
        "clt": {"repository": "me/sae", "format": "mntss_clt_layer_transcoder", "ids": {"1": None}},
    }
    monkeypatch.setattr(hub, "releases", lambda: table)
    assert hub.load_release("qwen", "0", k=4).n_latents == 24
    layer = hub.load_release("clt", "1")
    assert layer.sites == ("blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out")
    with pytest.raises(WeightsError, match=r"There is no release 'clts' among 2\. Near: clt"):
        hub.load_release("clts", "1")


def test_settings_of_releases_are_those_of_their_names():
    address, given = hub.find_release(
        "gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical"
    )
    assert address.repository == "google/gemma-scope-2b-pt-res"
    assert address.path.startswith("layer_20/width_16k/average_l0_")
    assert given == {}
    qwen = next(name for name, each in hub.releases().items() if each["format"] == "qwen_scope")
    _, given = hub.find_release(qwen, next(iter(hub.releases()[qwen]["ids"])))
    assert given["k"] >= 1
    addresses = [
        hub.find_release(release, name)[0]
        for release, each in hub.releases().items()
        for name in list(each["ids"])[::9]
    ]
    assert all(hub.Address.parse(str(address)) == address for address in addresses)


def test_nearly_all_registered_dictionaries_are_of_a_format_that_is_read():
    known, total = hub.readable()
    assert total >= 13_857
    assert known == total
    assert set(hub.REGISTERED.values()) <= {layout.name for layout in LAYOUTS}


def test_the_library_of_the_hub_is_imported_only_for_an_address(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails from here on
    assert load(GOLDEN / "deepseek").n_latents == 24
    with pytest.raises(WeightsError, match=r"pip install 'mechatlas\[hub\]'"):
        load("hf://me/sae")
    source = Path(hub.__file__).parents[1]
    early = re.compile(r"^(import|from) huggingface_hub", re.MULTILINE)
    assert not [file for file in source.rglob("*.py") if early.search(file.read_text())]
