"""Names of TransformerLens for the sites of language models of Hugging Face.

    lens_sites       names of TransformerLens that a network has -> sites
    translate        a site in another spelling -> the site by its module's name
    fitting_sites    sites whose name in another spelling fits a glob
    lens_hint        why a name of TransformerLens cannot be read, or which one is near
    lens_name        a site of a model that is not at hand -> its name of TransformerLens
    named_heads      heads of modules whose channels need more than the head's number

`blocks.3.hook_resid_post` is the output of `model.layers.3`; `blocks.3.attn.hook_z/head5` is one
head in the input of the layer that mixes the heads. The activations are those of TransformerLens
with its `from_pretrained_no_processing`: with post-norms (Gemma 2 and 3), `hook_attn_out` and
`hook_mlp_out` are what is added to the residual stream. Queries and keys are read before their
norms, as there. Besides, names may leave out the name of the base model: `layers.3` is
`model.layers.3`.

Families are recognized by the class of their blocks, since modules of the same name mean other
things in other models.
"""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Mapping

from torch import nn

from mechatlas.base import Site

HEAD = "<head>"
"""Place of a head in a branch of the tables below."""
WHOLE = Site("")
"""Site that asks for no branch, call or axes."""


@dataclasses.dataclass(frozen=True)
class _Family:
    """Sites of one kind of transformer, in the written form."""

    whole: Mapping[str, str]
    """Name -> site relative to the base model."""
    block: Mapping[str, str]
    """Name after `blocks.N.` -> site relative to the block; empty for its output."""
    unread: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Ending of a name that no module holds -> reason, and what to read instead; `{block}` is the
    block's name."""


_RESIDUAL = {"hook_resid_pre": ":input", "hook_resid_post": ""}
_ATTENTION = {
    "attn.hook_q": "self_attn.q_proj",
    "attn.hook_k": "self_attn.k_proj",
    "attn.hook_v": "self_attn.v_proj",
    "attn.hook_z": "self_attn.o_proj:input",
}
_GATED = {
    "mlp.hook_pre": "mlp.gate_proj",
    "mlp.hook_pre_linear": "mlp.up_proj",
    "mlp.hook_post": "mlp.down_proj:input",
}
_SUMS = {
    "hook_resid_mid": "post_attention_layernorm:input",
    "hook_attn_out": "self_attn",
    "hook_mlp_out": "mlp",
}
_WHOLE = {"hook_embed": "embed_tokens", "unembed.hook_in": "norm"}
_PATTERN = (
    "attention patterns are the second output of {block}.%s, which is none unless the network "
    'is loaded with attn_implementation = "eager"; call network(tokens, output_attentions=True) '
    "and take `attentions`"
)
_NORMALIZED = (
    "it is the activation before the weights of its norm, which no module of transformers holds; "
    "the output of {block}.%s has the weights in it"
)
_UNREAD = {
    "attn.hook_pattern": _PATTERN % "self_attn",
    "attn.hook_attn_scores": "attention scores lie inside one function and have no module",
    "attn.hook_rot_q": "turned queries have no module; attn.hook_q is before the turn",
    "attn.hook_rot_k": "turned keys have no module; attn.hook_k is before the turn",
    "attn.hook_result": "it is attn.hook_z of one head times that head's output weights",
    "ln1.hook_normalized": _NORMALIZED % "input_layernorm",
    "ln2.hook_normalized": _NORMALIZED % "post_attention_layernorm",
}
_LLAMA = _Family(_WHOLE, {**_RESIDUAL, **_ATTENTION, **_SUMS, **_GATED}, _UNREAD)
_GEMMA = _Family(
    _WHOLE,
    {
        **_RESIDUAL,
        **_ATTENTION,
        "hook_resid_mid": "pre_feedforward_layernorm:input",
        "hook_attn_out": "post_attention_layernorm",
        "hook_mlp_out": "post_feedforward_layernorm",
        **_GATED,
    },
    {**_UNREAD, "ln2.hook_normalized": _NORMALIZED % "pre_feedforward_layernorm"},
)
_MIXTURE = _Family(
    _WHOLE,
    {**_RESIDUAL, **_ATTENTION, **_SUMS},
    {
        **_UNREAD,
        "mlp.hook_expert_weights": (
            "weights of experts are a softmax of {block}.mlp.gate, whose output can be read"
        ),
        **dict.fromkeys(
            ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"),
            "rows of an expert have no fixed place, since each token chooses its experts; read "
            "hook_mlp_out, or the router at {block}.mlp.gate",
        ),
    },
)
_GPT2 = _Family(
    {"hook_embed": "wte", "hook_pos_embed": "wpe", "unembed.hook_in": "ln_f"},
    {
        **_RESIDUAL,
        "hook_resid_mid": "ln_2:input",
        "attn.hook_q": "attn.c_attn/q.<head>",
        "attn.hook_k": "attn.c_attn/k.<head>",
        "attn.hook_v": "attn.c_attn/v.<head>",
        "attn.hook_z": "attn.c_proj:input",
        "hook_attn_out": "attn",
        "mlp.hook_pre": "mlp.c_fc",
        "mlp.hook_post": "mlp.c_proj:input",
        "hook_mlp_out": "mlp",
    },
    {
        **_UNREAD,
        "attn.hook_pattern": _PATTERN % "attn",
        "ln1.hook_normalized": _NORMALIZED % "ln_1",
        "ln2.hook_normalized": _NORMALIZED % "ln_2",
    },
)
_HEAD_BY_HEAD = (
    "queries, keys and values of one head lie side by side in {block}.attention.query_key_value; "
    "name the head, such as attn.hook_q/head0"
)
_NEOX = _Family(
    {"hook_embed": "embed_in", "unembed.hook_in": "final_layer_norm"},
    {
        **_RESIDUAL,
        "attn.hook_q": "attention.query_key_value/<head>.q",
        "attn.hook_k": "attention.query_key_value/<head>.k",
        "attn.hook_v": "attention.query_key_value/<head>.v",
        "attn.hook_z": "attention.dense:input",
        "hook_attn_out": "attention",
        "mlp.hook_pre": "mlp.dense_h_to_4h",
        "mlp.hook_post": "mlp.dense_4h_to_h:input",
        "hook_mlp_out": "mlp",
    },
    {
        **_UNREAD,
        **dict.fromkeys(("attn.hook_q", "attn.hook_k", "attn.hook_v"), _HEAD_BY_HEAD),
        "hook_resid_mid": (
            "attention and MLP are added at once in this model; there is no state in between"
        ),
        "attn.hook_pattern": _PATTERN % "attention",
    },
)
_MAMBA = _Family(
    {"hook_embed": "embeddings", "unembed.hook_in": "norm_f"},
    {
        **_RESIDUAL,
        "hook_layer_input": "norm:input",
        "hook_ssm_input": "mixer.x_proj:input",
        "hook_out_proj": "mixer",
    },
    {
        "hook_conv": "the convolution and its activation run as one function; hook_ssm_input is "
        "its result, after the activation",
        "hook_h": "states of the recurrence lie inside one function and have no module",
    },
)
_BERT = _Family(
    {
        "embed.hook_embed": "embeddings.word_embeddings",
        "hook_full_embed": "embeddings",
    },
    {
        **_RESIDUAL,
        "hook_resid_mid": "attention.output.LayerNorm:input",
        "hook_resid_post": "output.LayerNorm:input",
        "hook_normalized_resid_post": "",
        "attn.hook_q": "attention.self.query",
        "attn.hook_k": "attention.self.key",
        "attn.hook_v": "attention.self.value",
        "attn.hook_z": "attention.output.dense:input",
        "hook_attn_out": "attention.output.dense",
        "mlp.hook_pre": "intermediate.dense",
        "mlp.hook_post": "output.dense:input",
        "hook_mlp_out": "output.dense",
    },
    {
        **_UNREAD,
        "attn.hook_pattern": _PATTERN % "attention.self",
        "ln1.hook_normalized": _NORMALIZED % "attention.output.LayerNorm",
        "ln2.hook_normalized": _NORMALIZED % "output.LayerNorm",
    },
)
FAMILIES: dict[str, _Family] = {
    "GPT2Block": _GPT2,
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "Gemma2DecoderLayer": _GEMMA,
    "Gemma3DecoderLayer": _GEMMA,
    "MixtralDecoderLayer": _MIXTURE,
    "Qwen3MoeDecoderLayer": _MIXTURE,
    "GPTNeoXLayer": _NEOX,
    "MambaBlock": _MAMBA,
    "BertLayer": _BERT,
}
"""Class of the blocks -> their names."""
QUERY_NORMS = {"Qwen3Attention": "btcc", "Qwen3MoeAttention": "btcc", "Gemma3Attention": "bctc"}
"""Attention that normalizes queries and keys head by head -> axes of what its norms return."""


def lens_sites(network: nn.Module) -> dict[str, Site]:
    """Names of TransformerLens that a network has, in its order, and their sites.

    Empty for a network whose blocks are of no family that is known here.
    """
    every = _all_sites(network).items()
    return {name: whole for name, site in every if (whole := _wanted(site, WHOLE)) is not None}


def _all_sites(network: nn.Module) -> dict[str, Site]:
    """Names and sites, with the place of a head in the branches."""
    found = _blocks(network)
    if found is None:
        return {}
    base, blocks, family = found
    names = {name for name, _ in network.named_modules()}
    sites = {name: _below(base, site) for name, site in family.whole.items()}
    for number, block in enumerate(blocks):
        for name, site in _of_block(network.get_submodule(block), family).items():
            sites[f"blocks.{number}.{name}"] = _below(block, site)
    return {name: site for name, site in sites.items() if site.module in names}


def _of_block(block: nn.Module, family: _Family) -> dict[str, str]:
    """Names of one block; models of experts have blocks without, and GPT-NeoX may be serial."""
    sites = dict(family.block)
    if family is _NEOX and not getattr(block, "use_parallel_residual", True):
        sites["hook_resid_mid"] = "post_attention_layernorm:input"
    if family is _MIXTURE and not hasattr(getattr(block, "mlp", None), "experts"):
        sites |= _GATED
    return sites


def translate(network: nn.Module, site: Site) -> Site:
    """Write a site by the name of its module, whatever its spelling.

    Args:
        network: Network that has the site.
        site: Site by the name of its module, by that name without the base model's, or by its
            name in TransformerLens; any other is returned as it is.
    """
    names = {name for name, _ in network.named_modules()}
    if site.module not in names:
        prefix = _prefix(network)
        if prefix and prefix + site.module in names:
            site = dataclasses.replace(site, module=prefix + site.module)
        else:
            site = next(iter(fitting_sites(network, site, site.module.__eq__)), site)
    return site


def fitting_sites(network: nn.Module, wanted: Site, fits: Callable[[str], object]) -> list[Site]:
    """Find the sites whose name in another spelling fits.

    Args:
        network: Network that has the sites.
        wanted: Site whose branch, call and axes they get.
        fits: Whether a name does, such as the match of a glob.
    """
    prefix = _prefix(network)
    modules = [name for name, _ in network.named_modules()]
    found = [
        dataclasses.replace(wanted, module=name)
        for name in modules
        if prefix and name.startswith(prefix) and fits(name.removeprefix(prefix))
    ]
    if found:
        return found
    if wanted.take == "input":
        return []
    lens = [site for name, site in _all_sites(network).items() if fits(name)]
    return [named for site in lens if (named := _wanted(site, wanted)) is not None]


def _wanted(site: Site, wanted: Site) -> Site | None:
    """A site of TransformerLens with the branch that is asked for, inside its own if it has one."""
    branch = wanted.branch
    if site.branch is not None:
        if branch is None and site.branch.startswith(HEAD):
            return None  # no slice of its own without a head
        branch = site.branch.replace(HEAD, branch or "").strip(".")
    return dataclasses.replace(wanted, module=site.module, branch=branch, take=site.take)


def lens_hint(network: nn.Module, name: str) -> str | None:
    """Sentence about a name in the spelling of TransformerLens; `None` for other spellings."""
    if not any(part.startswith("hook_") for part in name.split(".")):
        return None
    found = _blocks(network)
    if found is None:
        return (
            f"{name!r} is a name of TransformerLens, and {type(network).__name__} is of no family "
            "whose names are known; name a module, such as the output of a block."
        )
    _, blocks, family = found
    number, _, ending = name.removeprefix("blocks.").partition(".")
    why = next((w for end, w in family.unread.items() if ending.startswith(end)), None)
    at = int(number) if number.isdecimal() else 0
    if name.startswith("blocks.") and why and at < len(blocks):
        block = blocks[at]
        return f"{name!r} cannot be read: {why.format(block=block)}."
    norm = lens_sites(network).get("unembed.hook_in")
    if name == "ln_final.hook_normalized" and norm is not None:
        why = (_NORMALIZED % "").replace("{block}.", str(norm))
        return f"{name!r} cannot be read: {why}."
    names = list(lens_sites(network))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
    return (
        f"The network has no {name!r} of TransformerLens.{hint} `mechatlas sites NETWORK` lists "
        f"all {len(names)} of its names."
    )


_LISTS = {"h": (_GPT2,), "layer": (_BERT,), "layers": (_LLAMA, _GEMMA, _MIXTURE, _NEOX, _MAMBA)}
"""Name of the list of blocks -> families that may have it."""
_IN_BLOCK = re.compile(r"(?:.+\.)?(h|layers?)\.(\d+)(?:\.(.+))?")
_BEFORE_NORM = ("self_attn", "mlp")
"""Modules whose output some models add to the residual stream, and others only after a norm."""


def lens_name(site: str) -> str | None:
    """Name of TransformerLens for a site of a language model of Hugging Face, from its spelling.

    None for other sites, for a part of a site, and where models of different families have
    different names for it.
    """
    parsed = Site.parse(site)
    found = _IN_BLOCK.fullmatch(parsed.module)
    if found is None or parsed.branch or parsed.call or parsed.axes:
        return None
    below = found[3] or ""
    if found[1] == "layers" and below in _BEFORE_NORM:
        return None
    wanted = below + (":input" if parsed.take == "input" else "")
    names = {
        name
        for family in _LISTS[found[1]]
        for name, inside in family.block.items()
        if inside == wanted
    }
    return f"blocks.{found[2]}.{names.pop()}" if len(names) == 1 else None


def _blocks(network: nn.Module) -> tuple[str, list[str], _Family] | None:
    """Name of the base model, names of its blocks, and their family."""
    for name, module in network.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        family = FAMILIES.get(type(module[0]).__name__)
        if family is not None:
            base = name.rpartition(".")[0]
            if family is _BERT:  # its blocks are in an encoder
                base = base.rpartition(".")[0]
            return base, [f"{name}.{i}" for i in range(len(module))], family
    return None


def _below(parent: str, site: str) -> Site:
    below = Site.parse(site)
    module = ".".join(part for part in (parent, below.module) if part)
    return dataclasses.replace(below, module=module)


def _prefix(network: nn.Module) -> str:
    """Name of the base model inside a model with a head, and a dot; empty where there is none."""
    prefix = getattr(network, "base_model_prefix", "")
    inside = isinstance(prefix, str) and prefix and hasattr(network, prefix)
    return f"{prefix}." if inside else ""


def named_heads(network: nn.Module, module_name: str) -> dict[str, slice]:
    """Heads in the output of fused queries, keys and values, and of their norms.

    `q.head3` where all queries come first (GPT-2), `head3.q` where the heads do (GPT-NeoX),
    `head3` where queries and keys are normalized head by head. Empty for other modules.
    """
    parent, _, name = module_name.rpartition(".")
    attention = network.get_submodule(parent)
    kind, config = type(attention).__name__, getattr(attention, "config", None)
    n = getattr(config, "num_attention_heads", 0)
    if kind == "GPT2Attention" and name == "c_attn":
        places = [f"{part}.head{i}" for part in "qkv" for i in range(n)]
    elif kind == "GPTNeoXAttention" and name == "query_key_value":
        places = [f"head{i}.{part}" for i in range(n) for part in "qkv"]
    elif kind in QUERY_NORMS and name in ("q_norm", "k_norm"):
        n = n if name == "q_norm" else getattr(config, "num_key_value_heads", n)
        places = [f"head{i}" for i in range(n)]
    else:
        return {}
    width = getattr(attention, "head_dim", None) or getattr(attention, "head_size", 0)
    return {place: slice(i * width, (i + 1) * width) for i, place in enumerate(places)}


def joined(branches: Mapping[str, slice | list[int]], name: str) -> slice | list[int] | None:
    """Slice of a branch, or of all branches `name.*` where these lie side by side."""
    if name in branches:
        return branches[name]
    inner = [part for branch, part in branches.items() if branch.startswith(f"{name}.")]
    parts = [part for part in inner if isinstance(part, slice)]
    beside = all(a.stop == b.start for a, b in itertools.pairwise(parts))
    fits = parts and parts == inner and beside
    return slice(parts[0].start, parts[-1].stop) if fits else None
