"""Dictionaries on the Hugging Face Hub: fetched where an address names them, and only then.

    fetch           hf://owner/name/folder@revision -> a folder or file on this disk
    load_release    a release and an id of public registries -> its dictionary
    push            a dictionary -> a repository

`huggingface_hub` (the extra `hub`) is imported when one of these is called. Its environment
variables say where the hub is (`HF_ENDPOINT`), where files are kept (`HF_HOME`), and whether it may
be asked at all (`HF_HUB_OFFLINE`). Files are compared with the checksum that the hub states.

Releases are those of SAELens' registry, by their names there (`tools/write_releases.py`).
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from mechatlas.base import WeightsError
from mechatlas.dictionaries.foreign.layouts import FILES, LAYOUTS
from mechatlas.dictionaries.foreign.weights import INDEX
from mechatlas.outputs import temporary_folder
from mechatlas.tensorfiles import TORCH

SCHEME = "hf://"
SETTINGS = ("cfg.json", "config.json", "hyperparams.json", "config.yaml", "conf.yaml")
"""Files of settings that are fetched with weights."""
WEIGHTS = (*TORCH, ".safetensors", ".npz")
_ADDRESS = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+)((?:/[^/@\s]+)*)/?(?:@([\w./-]+))?")


@dataclasses.dataclass(frozen=True)
class Address:
    """Address of a dictionary on the hub: `hf://owner/name/folder@revision`."""

    repository: str
    """Owner and name."""
    path: str = ""
    """Folder or file in it."""
    revision: str | None = None
    """Branch, tag or commit; by default the main branch."""

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Parse the written form.

        Raises:
            WeightsError: The text is not of that form.
        """
        parts = _ADDRESS.fullmatch(text)
        if parts is None or ".." in parts[2].split("/"):
            raise WeightsError(
                f"{text!r} is not of the form hf://owner/name/folder@revision, folder and revision "
                "optional."
            )
        return cls(parts[1], parts[2].strip("/"), parts[3])

    def __str__(self) -> str:
        """Write the address in the form that `parse` reads."""
        path = f"/{self.path}" if self.path else ""
        return f"{SCHEME}{self.repository}{path}" + (f"@{self.revision}" if self.revision else "")


def is_address(path: Path | str) -> bool:
    """Whether a path is an address of the hub, as a text or as a `Path` makes it."""
    return str(path).startswith("hf:/")


def fetch(address: Address | str, wanted: str = "*") -> Path:
    """Fetch the files of one dictionary, unless they are on this disk already.

    Args:
        address: Address of a folder or file.
        wanted: Pattern of the files of weights that are fetched of a folder.

    Returns:
        The folder or file.

    Raises:
        WeightsError: The hub cannot be reached, has no such repository, revision or file, or a
            file is not the one that it states.
    """
    if not isinstance(address, Address):
        address = Address.parse(address)
    hub = _hub()
    with _telling(address):
        endpoint = os.environ.get("HF_ENDPOINT")
        api = hub.HfApi(endpoint=endpoint)
        names = api.list_repo_files(address.repository, revision=address.revision)
        path, files = _files(address, names, wanted)
        whole = hub.snapshot_download(
            address.repository,
            revision=address.revision,
            allow_patterns=files,
            endpoint=endpoint,
            max_workers=2,
        )
    for name in files:
        _verify(Path(whole) / name, address)
    return Path(whole) / path


def _hub() -> Any:
    """Library of the hub."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise WeightsError(
            "Addresses hf:// need huggingface_hub: pip install 'mechatlas[hub]'."
        ) from error
    return huggingface_hub


def _files(address: Address, names: list[str], wanted: str) -> tuple[str, list[str]]:
    """Path in the repository, and its files that are needed."""
    path = address.path
    if path not in names and f"{path}.safetensors" in names:
        path = f"{path}.safetensors"
    if path in names:
        folder, stem = PurePosixPath(path).parent, PurePosixPath(path).name.split(".")[0]
        beside = {str(folder / name) for name in (*SETTINGS, f"{stem}_cfg.json")}
        return path, [path, *sorted(beside & set(names))]
    prefix = f"{path}/" if path else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if not inside:
        raise WeightsError(
            f"{address.repository} has no {path!r}; it has {', '.join(sorted(names)[:4])}."
        )
    known = [name for name in inside if name in FILES]
    weights = known or [
        name
        for name in inside
        if "/" not in name
        and PurePosixPath(name).match(wanted)
        and name.endswith((*WEIGHTS, INDEX))
    ]
    if not weights:
        folders = sorted({str(PurePosixPath(n).parent) for n in inside if n.endswith(WEIGHTS)})
        hint = f" It has {', '.join(folders[:4])}." if folders else ""
        raise WeightsError(f"There is no dictionary at {address}.{hint} Name one folder.")
    chosen = [*weights, *(name for name in inside if name in SETTINGS)]
    return path, sorted(prefix + name for name in chosen)


def _verify(file: Path, address: Address) -> None:
    """Compare a file with the checksum that the hub states, which is the name it is kept under."""
    kept = file.resolve()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", kept.name):
        return  # a disk without links keeps no checksum
    size = kept.stat().st_size
    large = len(kept.name) == 64
    state = hashlib.sha256() if large else hashlib.sha1(f"blob {size}\0".encode())
    with kept.open("rb") as opened:
        while data := opened.read(1 << 22):
            state.update(data)
    if state.hexdigest() != kept.name:
        kept.unlink()
        raise WeightsError(
            f"{file.name} of {address} is not the file that the hub states: its checksum differs. "
            "It was deleted; try again."
        )


@contextlib.contextmanager
def _telling(address: Address) -> Iterator[None]:
    """Turn whatever goes wrong at the hub into one sentence."""
    from huggingface_hub import errors

    where = address.repository
    try:
        yield
    except WeightsError:
        raise
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{where} asks for its terms to be accepted on the hub, and a token (`hf auth login`)."
        ) from error
    except errors.RevisionNotFoundError as error:
        revision = address.revision or "main"
        raise WeightsError(f"{where} has no revision {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"The hub has no repository {where}, or it is private (`hf auth login`)."
        ) from error
    except Exception as error:  # of many kinds: no network, no answer, a file that is cut
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise WeightsError(
            f"{address} cannot be fetched ({type(error).__name__}: {reason}). Is there a network?"
        ) from error


@functools.cache
def releases() -> Mapping[str, Any]:
    """Releases of public registries: name -> repository, format, model, and ids with paths."""
    packed = resources.files("mechatlas.dictionaries.foreign").joinpath("releases.json.gz")
    return json.loads(gzip.decompress(packed.read_bytes()))


def load_release(release: str, name: str, **options: Any) -> Any:
    """Load a dictionary by its name in public registries.

    Args:
        release: Name of a release, such as `gemma-scope-2b-pt-res-canonical`.
        name: Id of a dictionary in it, such as `layer_20/width_16k/canonical`.
        options: As `load`; settings that the files lack are taken from the registry.

    Raises:
        WeightsError: No such release or id is known, or it cannot be fetched or read.

    Examples:
        >>> import mechatlas as ma
        >>> try:
        ...     ma.load_release("gemma-scope-2b-pt-res", "layer_99")
        ... except ma.UserError as error:
        ...     print(str(error)[:46])
        gemma-scope-2b-pt-res has no 'layer_99'. Near:
    """
    from mechatlas.dictionaries.formats import load  # imports this module

    address, given = find_release(release, name)
    wanted = f"W_???_{given['layer']}.safetensors" if "layer" in given else "*"
    return load(fetch(address, wanted), **{**given, **options})


def find_release(release: str, name: str) -> tuple[Address, dict[str, Any]]:
    """Find the address of a dictionary of a release, and the settings that its files lack.

    Raises:
        WeightsError: No such release or id is known.
    """
    import difflib

    known = releases()
    if release not in known:
        near = ", ".join(difflib.get_close_matches(release, known, n=3, cutoff=0.3))
        raise WeightsError(f"There is no release {release!r} among {len(known)}. Near: {near}.")
    entry = known[release]
    if name not in entry["ids"]:
        near = ", ".join(difflib.get_close_matches(name, entry["ids"], n=3, cutoff=0.0))
        raise WeightsError(f"{release} has no {name!r}. Near: {near}.")
    path, repository = entry["ids"][name] or name, entry["repository"]
    given: dict[str, Any] = {}
    if entry["format"] == "gemma_2_transcoder":
        given["transcodes"] = True
    if entry["format"] == "mntss_clt_layer_transcoder":
        given["layer"], path = int(path.rpartition("_")[2]), ""
    active = re.search(r"L0_(\d+)", repository)
    if entry["format"] == "qwen_scope" and active:
        given["k"] = int(active[1])
    return Address(repository, path), given


REGISTERED = {
    "sae_lens": "SAELens", "connor_rob_hook_z": "Connor and Rob", "gemma_2": "Gemma Scope",
    "gemma_2_transcoder": "Gemma Scope", "gemma_3": "Gemma Scope 2", "goodfire": "Goodfire",
    "dictionary_learning_1": "dictionary_learning", "deepseek_r1": "DeepSeek R1",
    "qwen_scope": "Qwen Scope", "llama_scope": "OpenMOSS", "llama_scope_r1_distill": "OpenMOSS",
    "sparsify": "sparsify", "mwhanna_transcoder": "circuit-tracer",
    "mntss_clt_layer_transcoder": "circuit-tracer cross-layer", "temporal": "temporal",
}  # fmt: skip
"""Format in the registry -> library of the layout that reads it."""


def readable() -> tuple[int, int]:
    """Count the registered dictionaries whose format has a layout, and all of them."""
    names = {layout.name for layout in LAYOUTS}
    counts = [
        (len(each["ids"]), REGISTERED.get(each["format"]) in names) for each in releases().values()
    ]
    return sum(n for n, known in counts if known), sum(n for n, _ in counts)


def push(
    dictionary: Any,
    address: str,
    *,
    format: str = "mechatlas",
    metadata: Mapping[str, Any] | None = None,
    private: bool = False,
) -> str:
    """Write a dictionary into a repository of the hub, which is made if it is not there.

    Args:
        dictionary: Dictionary to write.
        address: Address of the folder, such as `hf://owner/name/layer3`.
        format: Format, as in `save`.
        metadata: Further entries, as in `save`.
        private: Whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        WeightsError: The format does not know the dictionary, or the hub refuses it.
    """
    from mechatlas.dictionaries.formats import save  # imports this module

    place, hub = Address.parse(address), _hub()
    with temporary_folder() as folder:
        save(dictionary, folder, format=format, metadata=metadata)
        with _telling(place):
            api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
            api.create_repo(place.repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=place.repository,
                folder_path=folder,
                path_in_repo=place.path or None,
                revision=place.revision,
                commit_message=f"A dictionary in the format of {format}",
            )
    return str(dataclasses.replace(place, revision=commit.oid))
