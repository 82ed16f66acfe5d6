"""Language models of Hugging Face transformers, from a folder on this machine.

    transformer    a folder, or an installed package with a model in it -> the network

The network is the model of transformers itself, without a head for its training task, so its
own module names are sites: `encoder.layer.3` of BERT, `h.3` of GPT-2, `layers.3` of Llama, and
`encoder.layer.3.attention.self/head5` one head. It is called with token ids alone, and
`network.input`, a `TextInput`, makes them from text. Nothing is ever downloaded, and code that
lies in a model's folder never runs.
"""

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from mechatlas.activations.text_input import TextInput
from mechatlas.base import UserError, WeightsError
from mechatlas.tensorfiles import non_finite


def transformer(path: str | Path) -> nn.Module:
    """A transformer in evaluation mode, in float32, with its tokenizer as `.input`.

    Args:
        path: What `save_pretrained` of the model and its tokenizer wrote (a folder, or a zip of
            it), or the name of an installed package that carries such a folder or zip.

    Raises:
        UserError: transformers is not installed.
        WeightsError: There is no model there, a part of it is missing, or it needs code of
            its own.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UserError(
            f"A language model needs {error.name}: pip install 'mechatlas[text]'."
        ) from error
    with _folder(path) as folder, _quiet(transformers.logging):
        network = _network(folder, path)
        tokenizer = _tokenizer(folder, path)
    limits = (
        getattr(network.config, "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),  # astronomical where it is not known
    )
    network.input = TextInput(
        f"{type(network).__name__} of {path}",
        tokenizer,
        vocabulary=len(network.get_input_embeddings().get_parameter("weight")),
        context=min((n for n in limits if n is not None and 0 < n < 2**31), default=None),
    )
    network.register_forward_pre_hook(_check_tokens, with_kwargs=True)
    return network


def _check_tokens(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tokens = args[0] if args else kwargs.get("input_ids")
    check = network.input
    if isinstance(tokens, Tensor) and isinstance(check, TextInput):
        check.check(tokens)


def _network(folder: Path, path: str | Path) -> Any:
    from transformers import AutoModel

    with _explained(path, "model"):
        network, report = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, all of them
        )
    if network.config.is_encoder_decoder:
        raise WeightsError(
            f"{path} is a {type(network).__name__}, an encoder with a decoder, which cannot be "
            "run on one text alone. Save its `get_encoder()` and load that."
        )
    # Where a file lacks a tensor, transformers makes one up.
    missing = sorted(report["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        network.pooler = None  # encoders trained on masked words alone have none
        missing = []
    wrong = [f"missing {name}" for name in missing]
    wrong += [
        f"{name} has shape {tuple(given)}, expected {tuple(expected)}"
        for name, given, expected in sorted(report["mismatched_keys"])
    ]
    wrong += non_finite(network.state_dict())
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise WeightsError(
            f"{path} does not fit {type(network).__name__}: {'; '.join(wrong[:8])}{more}. "
            "Is the model saved whole, with the configuration it was trained with?"
        )
    network.config.use_cache = False  # keys and values kept for generation, unused here
    return network.float().eval()


def _tokenizer(folder: Path, path: str | Path) -> Any:
    from transformers import AutoTokenizer

    with _explained(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    # Where the files are missing, transformers makes up an empty vocabulary.
    names = set(tokenizer.vocab_files_names.values())
    if names and not any((folder / name).is_file() for name in names | {"tokenizer.json"}):
        raise WeightsError(
            f"{path} has no tokenizer ({', '.join(sorted(names))}). Save it beside the model "
            "with the tokenizer's `save_pretrained`."
        )
    return tokenizer


@contextmanager
def _explained(path: str | Path, part: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise WeightsError(f"The {part} in {path} cannot be loaded: {reason}") from error


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without the bars and warnings of transformers; what they say is raised here instead."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _folder(path: str | Path) -> Iterator[Path]:
    """The folder of a model, unpacked for as long as it takes to load.

    Raises:
        WeightsError: There is neither a folder, nor a zip, nor a package.
    """
    place = Path(path)
    if not place.exists():
        place = _in_package(str(path)) or place
    if place.is_dir():
        yield place
    elif zipfile.is_zipfile(place):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as unpacked:
            with zipfile.ZipFile(place) as archive:
                archive.extractall(unpacked)
            configs = sorted(Path(unpacked).rglob("config.json"), key=lambda p: len(p.parts))
            yield configs[0].parent if configs else Path(unpacked)
    else:
        raise WeightsError(
            f"There is no folder or zip {path}, nor an installed package of that name with a "
            "model in it. Models are never downloaded: save one with `save_pretrained`."
        )


def _in_package(name: str) -> Path | None:
    """The model's folder or zip in an installed package, by the name of either kind."""
    files = [Path(str(file.locate())) for file in _files(name)]
    if not files and name.isidentifier() and (spec := util.find_spec(name)):
        files = [p for root in spec.submodule_search_locations or () for p in Path(root).rglob("*")]
    configs = [file for file in files if file.name in ("config.json", "model.zip")]
    if not configs:
        return None
    outermost = min(configs, key=lambda p: len(p.parts))
    return outermost if outermost.suffix == ".zip" else outermost.parent


def _files(distribution: str) -> list[metadata.PackagePath]:
    try:
        return metadata.files(distribution) or []
    except (metadata.PackageNotFoundError, ValueError):  # a path is no name at all
        return []
