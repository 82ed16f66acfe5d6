from typing import Any

import pytest
import torch

from mechatlas.activations.site_names import lens_sites, translate
from mechatlas.activations.sites import branches_of, find_sites, intervene, read_activations
from mechatlas.base import Site, SiteError

pytest.importorskip("transformers")

from tests.language_models import MODELS, model

TOKENS = torch.arange(3, 27).reshape(2, 12)


def blocks_of(network: Any) -> Any:
    base = network.base_model
    return next(m for m in base.modules() if isinstance(m, torch.nn.ModuleList))


@torch.no_grad()
def read(network: Any, *names: str) -> list[torch.Tensor]:
    sites = [find_sites(network, [name])[0] for name in names]
    found = read_activations(network, TOKENS, sites)
    return [found[site] for site in sites]


@torch.no_grad()
def recorded(network: Any, *modules: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """First input and output of some modules, by hooks of the test's own."""
    seen: dict[int, Any] = {}

    def note(module, args, kwargs, output):
        first = args[0] if args else next(iter(kwargs.values()))
        seen[id(module)] = (
            first.clone(),
            (output if torch.is_tensor(output) else output[0]).clone(),
        )

    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in modules]
    network(TOKENS)
    for hook in hooks:
        hook.remove()
    return [seen[id(m)] for m in modules]


@pytest.mark.parametrize("name", MODELS)
def test_the_residual_stream_is_the_sum_that_transformer_lens_defines(name):
    network = model(name)
    everywhere = lens_sites(network)
    assert all(
        f"blocks.{i}.hook_resid_{end}" in everywhere for i in (0, 1) for end in ("pre", "post")
    )
    pre, post, after = read(
        network, "blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"
    )
    (entered, left), (entered_next, _) = recorded(network, *blocks_of(network))
    torch.testing.assert_close(pre, entered)
    torch.testing.assert_close(after, entered_next)
    torch.testing.assert_close(after, left)
    if name == "bert":  # the next block starts with the norm of the sum
        mid, attention, mlp, normed = read(
            network,
            *(f"blocks.0.hook_{x}" for x in ("resid_mid", "attn_out", "mlp_out")),
            "blocks.0.hook_normalized_resid_post",
        )
        torch.testing.assert_close(mid, pre + attention)
        layer = network.bert.encoder.layer[0]
        torch.testing.assert_close(post, layer.attention.output.LayerNorm(mid) + mlp)
        torch.testing.assert_close(normed, layer.output.LayerNorm(post))
        torch.testing.assert_close(normed, after)
    elif name == "mamba":
        (mixed,) = read(network, "blocks.0.hook_out_proj")
        torch.testing.assert_close(post, pre + mixed)
    else:
        attention, mlp = read(network, "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out")
        torch.testing.assert_close(post, after)
        torch.testing.assert_close(post, pre + attention + mlp)
        if name != "neox":
            torch.testing.assert_close(read(network, "blocks.0.hook_resid_mid")[0], pre + attention)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "mamba"])
def test_queries_keys_values_and_z_make_the_attention_that_the_model_computes(name):
    network = model(name)
    heads, kv = 4, 4 if name in ("gpt2", "neox", "serial_neox", "bert") else 2
    if "neox" in name:
        parts = [
            torch.cat(read(network, *(f"blocks.1.attn.hook_{x}/head{i}" for i in range(4))), dim=-1)
            for x in "qkv"
        ]
    else:
        parts = read(network, *(f"blocks.1.attn.hook_{x}" for x in "qkv"))
    (z,) = read(network, "blocks.1.attn.hook_z")
    q, k, v = (
        x.unflatten(-1, (n, -1)).transpose(1, 2)
        for x, n in zip(parts, (heads, kv, kv), strict=True)
    )
    network.set_attn_implementation("eager")
    with torch.no_grad():
        pattern = network(TOKENS, output_attentions=True).attentions[1]
    values = v.repeat_interleave(heads // kv, dim=1)
    expected = (pattern @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(z, expected)
    if name in ("gpt2", "bert"):  # no turning, no norms
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if name == "gpt2":
            scores = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), pattern)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen3"])
def test_gated_mlps_have_all_three_places(name):
    network = model(name)
    mlp = network.model.layers[0].mlp
    pre, linear, post = read(
        network, *(f"blocks.0.mlp.hook_{x}" for x in ("pre", "pre_linear", "post"))
    )
    torch.testing.assert_close(post, mlp.act_fn(pre) * linear)
    ((_, written),) = recorded(network, mlp)
    torch.testing.assert_close(mlp.down_proj(post), written)


@pytest.mark.parametrize("name", ["gpt2", "neox", "bert"])
def test_plain_mlps_have_two_places(name):
    network = model(name)
    pre, post = read(network, "blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_post")
    block = blocks_of(network)[0]
    act = {"gpt2": lambda b: b.mlp.act, "neox": lambda b: b.mlp.act}.get(
        name, lambda b: b.intermediate.intermediate_act_fn
    )(block)
    torch.testing.assert_close(post, act(pre))


@torch.no_grad()
def test_the_recurrence_of_mamba_is_entered_where_its_lens_says():
    network = model("mamba")
    (ssm,) = read(network, "blocks.0.hook_ssm_input")
    mixer = network.backbone.layers[0].mixer
    ((entered, _),) = recorded(network, mixer)
    x = mixer.in_proj(entered).transpose(1, 2).chunk(2, dim=1)[0]
    kernel, n = mixer.conv1d.weight, x.shape[-1]
    convolved = torch.nn.functional.conv1d(
        x, kernel, mixer.conv1d.bias, padding=kernel.shape[-1] - 1, groups=x.shape[1]
    )[..., :n]
    torch.testing.assert_close(ssm, torch.nn.functional.silu(convolved).transpose(1, 2))


def test_embeddings_are_what_enters_the_first_block():
    for name in ("llama", "gemma2", "gemma3", "neox", "mamba"):
        embedded, pre = read(model(name), "hook_embed", "blocks.0.hook_resid_pre")
        torch.testing.assert_close(embedded, pre)
    embedded, place, pre = read(
        model("gpt2"), "hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre"
    )
    torch.testing.assert_close(embedded + place, pre)
    (full,) = read(model("bert"), "hook_full_embed")
    torch.testing.assert_close(full, read(model("bert"), "blocks.0.hook_resid_pre")[0])


def test_globs_and_heads_work_in_the_spelling_of_transformer_lens():
    network = model("llama")
    found = [str(site) for site in find_sites(network, ["blocks.*.hook_resid_post"])]
    assert found == ["model.layers.0", "model.layers.1"]
    (head,) = find_sites(network, ["blocks.1.attn.hook_z/head3"])
    assert str(head) == "model.layers.1.self_attn.o_proj:input/head3"
    assert len(find_sites(network, ["blocks.*.attn.hook_z/head*"])) == 8
    keys = find_sites(model("gpt2"), ["blocks.?.attn.hook_k/head1"])
    assert [str(site) for site in keys] == [
        f"transformer.h.{i}.attn.c_attn/k.head1" for i in range(2)
    ]


def test_heads_of_fused_queries_are_slices_of_them():
    network = model("gpt2")
    whole, query, head = read(
        network, "h.1.attn.c_attn", "blocks.1.attn.hook_q", "blocks.1.attn.hook_q/head2"
    )
    torch.testing.assert_close(query, whole[..., :16])
    torch.testing.assert_close(head, query[..., 8:12])
    assert list(branches_of(network, "transformer.h.1.attn.c_attn"))[4] == "k.head0"
    neox = model("neox")
    whole, head = read(neox, "layers.1.attention.query_key_value", "blocks.1.attn.hook_v/head2")
    torch.testing.assert_close(head, whole[..., 2 * 12 + 8 : 3 * 12])
    with pytest.raises(SiteError, match=r"name the head, such as attn\.hook_q/head0"):
        find_sites(neox, ["blocks.1.attn.hook_q"])


def test_names_without_that_of_the_base_model_are_the_same_sites():
    network = model("gpt2")
    assert find_sites(network, ["h.*"]) == [Site("transformer.h.0"), Site("transformer.h.1")]
    assert find_sites(network, ["transformer.h.*", "h.*"]) == find_sites(network, ["h.*"])
    assert translate(network, Site("h.1")) == Site("transformer.h.1")
    assert find_sites(network.transformer, ["h.1"]) == [Site("h.1")]
    assert translate(network, Site("h.7")) == Site("h.7")


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_by_the_name_of_transformer_lens_reaches_the_answer(name):
    network = model(name)
    (site,) = find_sites(network, ["blocks.1.hook_resid_pre"])
    with torch.no_grad(), intervene(network, {site: torch.zeros_like}):
        edited = network(TOKENS).logits
        torch.testing.assert_close(edited, edited[:, :1].expand_as(edited), atol=2, rtol=0)
    with torch.no_grad():
        assert not torch.equal(edited, network(TOKENS).logits)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("llama", "blocks.1.hook_resid_pst", "Did you mean 'blocks.1.hook_resid_post'"),
        ("llama", "blocks.9.hook_resid_post", "Did you mean 'blocks.1.hook_resid_post'"),
        ("llama", "blocks.0.attn.hook_pattern", r"of model\.layers\.0\.self_attn, .*\"eager\""),
        ("llama", "ln_final.hook_normalized", r"before the weights .*model\.norm has"),
        ("gpt2", "blocks.0.ln2.hook_normalized", r"transformer\.h\.0\.ln_2 has the weights"),
        ("mixtral", "blocks.0.mlp.hook_post", r"no fixed place.*model\.layers\.0\.mlp\.gate"),
        ("neox", "blocks.0.hook_resid_mid", "no state in between"),
        ("mamba", "blocks.0.hook_conv", "hook_ssm_input is its result"),
        ("mamba", "blocks.0.hook_h.3", "states of the recurrence"),
        ("llama", "layrs.1", "Did you mean"),
    ],
)
def test_names_that_cannot_be_read_say_why_in_one_sentence(name, wrong, message):
    with pytest.raises(SiteError, match=message) as refusal:
        find_sites(model(name), [wrong])
    assert "\n" not in str(refusal.value)


def test_other_networks_have_no_names_of_transformer_lens():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert lens_sites(network) == {}
    with pytest.raises(SiteError, match="Sequential is of no family"):
        find_sites(network, ["blocks.0.hook_resid_post"])
