"""Language models of Hugging Face transformers, from a folder, zip or GGUF file on this machine.

    transformer    a folder, zip, `.gguf` file or installed package -> the network

The network is the model of transformers itself, with its language-model head where the file has
one, so its own module names are sites: `transformer.h.3` of GPT-2, `model.layers.3` of Llama, and
`model.layers.3.self_attn.o_proj:input/head5` one head. Names without the leading `transformer.`
or `model.` work too, and so do TransformerLens's (`activations/site_names.py`). The network takes
token ids, alone or in a mapping with an attention mask, and `network.input`, a `TextInput`, makes
them from text. Nothing is ever downloaded, and code that lies in a model's folder never runs.
"""

import io
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from mechatlas.activations.text_input import TextInput
from mechatlas.base import UserError, WeightsError
from mechatlas.outputs import temporary_folder
from mechatlas.tensorfiles import non_finite

HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
}
"""Ending of the class that a configuration names -> class of transformers that keeps the head."""


class _Model(NamedTuple):
    """Files of a model."""

    folder: Path
    gguf: str | None
    """Name of the GGUF file in the folder; `None` for what `save_pretrained` wrote."""
    path: str | Path
    """Path that the user gave, for messages."""

    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that keep it to these files."""
        local = {"local_files_only": True, "trust_remote_code": False}
        return local if self.gguf is None else {**local, "gguf_file": self.gguf}


def transformer(
    path: str | Path,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    attn_implementation: str | None = None,
) -> nn.Module:
    """A transformer in evaluation mode, with its tokenizer as `.input`.

    Args:
        path: What `save_pretrained` of the model and its tokenizer wrote (a folder, or a zip of
            it), a `.gguf` file, or the name of an installed package that carries one of these.
        dtype: Number format of the weights: "float32", "bfloat16", "float16", or "auto" for the
            file's own.
        device_map: Devices of the layers, as transformers spreads them ("auto", "cuda:0"); needs
            accelerate. By default all weights are on the CPU.
        attn_implementation: Attention of transformers ("sdpa", "eager"); "eager" is the one that
            returns attention patterns.

    Raises:
        UserError: transformers is not installed, or there is no such number format.
        WeightsError: There is no model there, a part of it is missing, its tokenizer is another
            model's, or it needs code of its own.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UserError(
            f"A language model needs {error.name}: pip install 'mechatlas[text]'."
        ) from error
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    if not (attn_implementation or "eager").isidentifier():  # others are code from a hub
        raise UserError(
            f"attn_implementation must be one of transformers, such as 'sdpa' or 'eager', got "
            f"{attn_implementation!r}."
        )
    settings = {"device_map": device_map, "attn_implementation": attn_implementation}
    given = {key: value for key, value in settings.items() if value is not None}
    with _found(path) as model, _quiet(transformers.logging):
        network = _network(model, {"dtype": dtype, **given})
        tokenizer = _tokenizer(model)
    config = network.config.get_text_config()
    limits = (
        getattr(config, "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),  # astronomical where it is not known
    )
    name = f"{type(network).__name__} of {path}"
    vocabulary = len(network.get_input_embeddings().get_parameter("weight"))
    _refuse_other_tokenizer(name, tokenizer, vocabulary)
    network.input = TextInput(
        name,
        tokenizer,
        vocabulary=vocabulary,
        context=min((n for n in limits if n is not None and 0 < n < 2**31), default=None),
        causal=_is_causal(config),
    )
    network.register_forward_pre_hook(_prepare, with_kwargs=True)
    return network


def _prepare(
    network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Spread a mapping over the arguments, check the tokens, and hide padding from an encoder.

    Padding comes last, so that no token of a causal model sees it.
    """
    if args and isinstance(args[0], Mapping):
        args, kwargs = args[1:], {**args[0], **kwargs}
    tokens = args[0] if args else kwargs.get("input_ids")
    text = network.input
    if isinstance(tokens, Tensor) and isinstance(text, TextInput):
        text.check(tokens)
        if not text.causal and text.pad is not None and len(args) < 2:
            real = tokens != text.pad
            if not real.all():
                kwargs = {"attention_mask": real.long(), **kwargs}
    return args, kwargs


def _is_causal(config: Any) -> bool:
    """Whether no position sees a later one: models that are trained on masked words alone do."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return not masked or bool(getattr(config, "is_decoder", False))


def _refuse_other_tokenizer(name: str, tokenizer: Any, vocabulary: int) -> None:
    """Refuse a tokenizer with more words than the model embeds."""
    known = int(getattr(tokenizer, "vocab_size", 0))  # without tokens that were added later
    if known > vocabulary:
        raise WeightsError(
            f"{name} embeds {vocabulary:,} tokens and the tokenizer beside it has {known:,}, so "
            "they are not of the same model. Save the tokenizer that the model was trained with "
            "there."
        )


def _network(model: _Model, settings: Mapping[str, Any]) -> Any:
    import transformers

    kind = "AutoModelForCausalLM" if model.gguf else _head(model)
    network, report = _loaded(model, getattr(transformers, kind), settings)
    trunk = f"{network.base_model_prefix}."
    if kind != "AutoModel" and any(not name.startswith(trunk) for name in report["missing_keys"]):
        network, report = _loaded(model, transformers.AutoModel, settings)  # there is no head
    if network.config.is_encoder_decoder:
        raise WeightsError(
            f"{model.path} is a {type(network).__name__}, an encoder with a decoder, which cannot "
            "be run on one text alone. Save its `get_encoder()` and load that."
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
    wrong += non_finite({n: t for n, t in network.state_dict().items() if not t.is_meta})
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise WeightsError(
            f"{model.path} does not fit {type(network).__name__}: {'; '.join(wrong[:8])}{more}. "
            "Is the model saved whole, with the configuration it was trained with?"
        )
    network.config.use_cache = False  # keys and values kept for generation, unused here
    return network.eval()


def _head(model: _Model) -> str:
    """Class of transformers that loads a folder's model with its language-model head."""
    from transformers import AutoConfig

    with _explained(model.path, "model"):
        config = AutoConfig.from_pretrained(model.folder, **model.options())
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    return next((kind for ending, kind in HEADS.items() if named.endswith(ending)), "AutoModel")


def _loaded(model: _Model, kind: Any, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    bars = io.StringIO()  # of the reader of GGUF files, which no setting turns off
    with _explained(model.path, "model"), redirect_stderr(bars if model.gguf else sys.stderr):
        return kind.from_pretrained(
            model.folder,
            **model.options(),
            **settings,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_network` names all of them
        )


def _tokenizer(model: _Model) -> Any:
    from transformers import AutoTokenizer

    with _explained(model.path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model.folder, **model.options())
    # Where the files are missing, transformers makes up an empty vocabulary.
    names = set(tokenizer.vocab_files_names.values())
    present = (model.folder / name for name in names | {"tokenizer.json"})
    if model.gguf is None and names and not any(file.is_file() for file in present):
        raise WeightsError(
            f"{model.path} has no tokenizer ({', '.join(sorted(names))}). Save it beside the model "
            "with the tokenizer's `save_pretrained`."
        )
    return tokenizer


@contextmanager
def _explained(path: str | Path, part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the readers of many formats raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        short = isinstance(error, IndexError | EOFError) or "reshape array of size" in reason
        hint = ". Is the file whole?" if short else ""
        if isinstance(error, ModuleNotFoundError | ImportError):
            hint = ". It may need pip install 'mechatlas[text]'."
        raise WeightsError(f"The {part} in {path} cannot be loaded: {reason}{hint}") from error


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
def _found(path: str | Path) -> Iterator[_Model]:
    """The files of a model, unpacked for as long as it takes to load."""
    place = Path(path)
    if not place.exists():
        place = _in_package(str(path)) or place
    if place.is_dir():
        yield _in_folder(place, path)
    elif place.suffix == ".gguf" and place.is_file():
        yield _Model(place.parent, place.name, path)
    elif zipfile.is_zipfile(place):
        with temporary_folder() as unpacked:
            with zipfile.ZipFile(place) as archive:
                archive.extractall(unpacked)
            files = [p for p in unpacked.rglob("*") if _is_model(p)]
            outermost = min(files, key=lambda p: len(p.parts), default=unpacked / "none")
            yield _in_folder(outermost.parent, path)
    else:
        raise WeightsError(
            f"There is no folder or zip {path}, nor a .gguf file, nor an installed package of that "
            "name with a model in it. Models are never downloaded: save one with "
            "`save_pretrained`."
        )


def _in_folder(folder: Path, path: str | Path) -> _Model:
    """The model of a folder: its `config.json`, or else its one GGUF file."""
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if (folder / "config.json").is_file() or not files:
        return _Model(folder, None, path)
    if len(files) > 1:
        raise WeightsError(
            f"{path} holds {len(files)} GGUF files ({', '.join(files)}); name one of them as the "
            "path."
        )
    return _Model(folder, files[0], path)


def _is_model(file: Path) -> bool:
    return file.name in ("config.json", "model.zip") or file.suffix == ".gguf"


def _in_package(name: str) -> Path | None:
    """The model's folder, zip or GGUF file in an installed package, by the name of either kind."""
    files = [Path(str(file.locate())) for file in _files(name)]
    if not files and name.isidentifier() and (spec := util.find_spec(name)):
        files = [p for root in spec.submodule_search_locations or () for p in Path(root).rglob("*")]
    outermost = min(filter(_is_model, files), key=lambda p: len(p.parts), default=None)
    if outermost is None or outermost.name != "config.json":
        return outermost
    return outermost.parent


def _files(distribution: str) -> list[metadata.PackagePath]:
    try:
        return metadata.files(distribution) or []
    except (metadata.PackageNotFoundError, ValueError):  # a path is no name at all
        return []
