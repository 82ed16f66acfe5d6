"""Logit effects, steering and attribution, against plain hooks on tiny decoders."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import mechatlas as ma
from mechatlas.activations.text_input import TextInput
from mechatlas.analysis.effects.logits import head_of, unfrozen
from mechatlas.base import InputError

pytest.importorskip("transformers")

from tests import language_models

FINAL = {
    "gpt2": "transformer.ln_f",
    "llama": "model.norm",
    "gemma2": "model.norm",
    "qwen3": "model.norm",
    "neox": "gpt_neox.final_layer_norm",
}
SITE = "blocks.0.hook_resid_post"
TOKENS = torch.randint(0, 258, (3, 12), generator=torch.Generator().manual_seed(5))


def decoder(name: str) -> Any:
    """A decoder whose predictions differ from token to token."""
    network = language_models.model(name)
    with torch.no_grad():
        for weights in network.parameters():
            if weights.ndim > 1:
                weights *= 5
    return network


def dictionary(d_in: int = 16, n_latents: int = 24, k: int = 6) -> Any:
    sae = ma.Autoencoder(d_in=d_in, n_latents=n_latents, sparsity=ma.TopK(k=k), seed=3)
    draw = torch.Generator().manual_seed(4)
    sae.b_dec.data = torch.randn(d_in, generator=draw)
    return sae


def stranger(sae: Any) -> Any:
    """A dictionary of another library, of which only encode and decode are known."""
    return SimpleNamespace(
        d_in=sae.d_in, n_latents=sae.n_latents, encode=sae.encode, decode=sae.decode
    )


@pytest.fixture(scope="module")
def llama():
    return decoder("llama")


@pytest.mark.parametrize("name", FINAL)
def test_effects_are_those_of_patching_the_stream_with_the_norm_frozen(name):
    network, sae = decoder(name), dictionary()
    head = head_of(network)
    norm = network.get_submodule(FINAL[name])
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    hooks = [
        norm.register_forward_hook(lambda _m, args, _y: inputs.append(args[0].detach())),
        network.get_output_embeddings().register_forward_hook(
            lambda _m, _args, y: outputs.append(y.detach())
        ),
    ]
    with torch.no_grad():
        network(TOKENS)
    for hook in hooks:
        hook.remove()
    x, logits = inputs[0], outputs[0]
    mean = x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else torch.zeros(1)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    assert eps is not None
    scale = ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt()
    weight = norm.weight + 1 if name == "gemma2" else norm.weight
    bias = getattr(norm, "bias", None)
    for latent in (0, 7):
        atom = sae.W_dec[latent].detach()
        moved = x + 1.7 * atom
        if isinstance(norm, nn.LayerNorm):
            moved = moved - moved.mean(-1, keepdim=True)
        y = moved / scale * weight + (0 if bias is None else bias)
        with torch.no_grad():
            rise = network.get_output_embeddings()(y) - logits
        predicted = 1.7 * head.effects(atom[None]) / scale
        assert torch.allclose(predicted, rise, atol=1e-4 * float(rise.abs().max()))
        assert torch.allclose(head.scale(x.flatten(0, 1)), scale.flatten(), rtol=1e-5)


@pytest.mark.parametrize("foreign", [False, True])
def test_listed_tokens_are_the_ends_of_all_effects(llama, foreign):
    sae = dictionary()
    found = ma.logit_effects(
        llama, stranger(sae) if foreign else sae, [5, 2], tokens=TOKENS, site=SITE, n_top=4
    )
    effects = (sae.W_dec * llama.model.norm.weight) @ llama.lm_head.weight.T
    effects = (effects[[5, 2]] / found.scale).detach().numpy()
    order = np.argsort(-effects, axis=1)
    assert found.top_tokens.tolist() == order[:, :4].tolist()
    assert found.bottom_tokens.tolist() == order[:, ::-1][:, :4].tolist()
    assert found.top_effects == pytest.approx(np.sort(effects)[:, ::-1][:, :4], abs=1e-5)
    stream = ma.read_activations(llama, TOKENS, ["model.norm:input"])["model.norm:input"]
    rms = stream.square().mean(-1).add(llama.config.rms_norm_eps).sqrt()
    assert found.scale == pytest.approx(float(rms.detach().median()), rel=1e-5)
    assert "Logit effects of 2 latents" in str(found)


def test_the_difference_to_the_unfrozen_norm_is_that_of_a_plain_computation(llama):
    sae = dictionary()
    found = ma.logit_effects(llama, sae, tokens=TOKENS, site=SITE)
    with torch.no_grad():
        read = ma.read_activations(llama, TOKENS, [SITE, "model.norm:input"])
        code = sae.encode(read[SITE].flatten(0, 1))
        stream = read["model.norm:input"].flatten(0, 1)
        shares = []
        for row, latent in code.nonzero().tolist():
            x, v = stream[row], code[row, latent] * sae.W_dec[latent]
            true = llama.lm_head(llama.model.norm(x) - llama.model.norm(x - v))
            frozen = llama.lm_head(llama.model.norm.weight * v / x.square().mean().sqrt())
            shares.append(float((frozen - true).norm() / true.norm()))
    assert found.unfrozen_difference is not None
    assert found.unfrozen_difference.n == len(shares)
    assert found.unfrozen_difference.value == pytest.approx(np.mean(shares), rel=1e-3)
    along = stream[:4] / stream[:4].norm(dim=1, keepdim=True)
    small = 1e-2 * stream[:4].roll(1, dims=1)
    across = small - (small * along).sum(dim=1, keepdim=True) * along
    assert unfrozen(head_of(llama), stream[:4], across).max() < 0.01, "to first order nothing"


def test_random_atoms_are_as_chance_and_planted_ones_are_not(llama):
    draw = torch.Generator().manual_seed(8)
    sae = dictionary(n_latents=400)
    sae.W_dec.data = torch.randn(400, 16, generator=draw) * torch.rand(400, 1, generator=draw)
    unembed = (llama.lm_head.weight * llama.model.norm.weight).detach()
    for latent in range(20):
        sae.W_dec.data[latent] = unembed[int(unembed.norm(dim=1).argsort()[-1 - latent])]
    found = ma.logit_effects(llama, sae, n_random=2000)
    assert found.words is None
    assert (found.p_top[:10] < 0.01).all()
    chance = found.p_top[20:]
    assert stats.kstest(chance, "uniform").pvalue > 0.01
    assert stats.kstest(found.p_bottom[20:], "uniform").pvalue > 0.01
    assert (found.q_top[20:] <= 0.05).sum() <= 3


def test_tokens_have_their_text_where_there_is_a_tokenizer(llama):
    tokenizer = language_models.byte_tokenizer()
    llama.input = TextInput("Bytes", tokenizer, vocabulary=258, context=64, causal=True)
    try:
        found = ma.logit_effects(llama, dictionary(), [3])
        assert found.words is not None
        assert set(found.words) == {*found.top_tokens[0], *found.bottom_tokens[0]}
        assert repr(found.words[int(found.top_tokens[0, 0])]) in str(found)
    finally:
        del llama.input


def patched(network: Any, change: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits, or generated tokens, with a hook of our own on the first block."""

    def hook(_module, _args, output):
        x = output if isinstance(output, torch.Tensor) else output[0]
        return change(x) if isinstance(output, torch.Tensor) else (change(x), *output[1:])

    handle = network.model.layers[0].register_forward_hook(hook)
    with torch.no_grad():
        found = network.generate(tokens, **options) if options else network(tokens).logits
    handle.remove()
    return found


@pytest.mark.parametrize("foreign", [False, True])
def test_steering_is_an_own_hook_and_works_inside_generate(llama, foreign):
    sae = dictionary()
    given = stranger(sae) if foreign else sae
    atom = sae.W_dec[4].detach()
    expected = patched(llama, lambda x: x + 2.5 * atom, TOKENS)
    plain = llama(TOKENS).logits
    with torch.no_grad(), ma.steer(llama, given, 4, 2.5, site=SITE) as steered:
        assert torch.allclose(steered(TOKENS).logits, expected, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert torch.equal(llama(TOKENS).logits, plain), "the network is left as it was"
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    own = patched(llama, lambda x: x + 30 * atom, TOKENS[:1], **options)
    with ma.steer(llama, given, 4, 30.0, site=SITE):
        steered = llama.generate(TOKENS[:1], **options)
    assert torch.equal(steered, own)
    assert not torch.equal(own, llama.generate(TOKENS[:1], **options))


def test_clamping_and_ablation_keep_the_error(llama):
    sae = dictionary()

    def clamped(values: dict[int, float]) -> Any:
        def change(x: torch.Tensor) -> torch.Tensor:
            code = sae.encode(x.flatten(0, 1))
            for latent, value in values.items():
                x = x + ((value - code[:, latent])[:, None] * sae.W_dec[latent]).view_as(x)
            return x

        return patched(llama, change, TOKENS)

    with torch.no_grad():
        code = sae.encode(ma.read_activations(llama, TOKENS, [SITE])[SITE].flatten(0, 1))
        often = [int(i) for i in (code != 0).sum(0).argsort()[-2:]]
        plain, expected = llama(TOKENS).logits, clamped(dict.fromkeys(often, 0.0))
        assert not torch.allclose(expected, plain, atol=1e-2)
        with ma.steer(llama, sae, often, 0.0, site=SITE, mode="clamp"):
            assert torch.allclose(llama(TOKENS).logits, expected, atol=1e-4)
        values = {often[0]: 3.0, often[1]: -1.0}
        expected = clamped(values)
        with ma.steer(llama, sae, values, site=SITE, mode="clamp"):
            assert torch.allclose(llama(TOKENS).logits, expected, atol=1e-4)
        silent = int((code == 0).all(dim=0).nonzero()[0])
        with ma.steer(llama, sae, silent, 0.0, site=SITE, mode="clamp"):
            assert torch.equal(llama(TOKENS).logits, plain), "a silent latent costs nothing"


def test_attribution_is_exact_for_an_output_that_is_linear_in_the_site():
    last = nn.Linear(8, 3)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), last)
    sae = dictionary(8, 20, 4)
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    found = ma.attribute(network, sae, x, lambda y: y[..., 1].sum(), site="1")
    with torch.no_grad():
        rows = network[:2](x)
        code, weight = sae.encode(rows), last.weight[1]
        expected = code * (sae.W_dec @ weight)
        error = (rows - sae.decode(code)) @ weight
    assert np.allclose(found.values[:, 0], expected, atol=1e-5)
    assert np.allclose(found.error[:, 0], error, atol=1e-5)
    assert np.allclose(found.falls, found.latents[found.ablated], atol=1e-4)
    assert found.rank_correlation is not None
    assert found.rank_correlation.value > 0.999
    constant = 30 * float(last.bias[1].detach() + sae.b_dec.detach() @ weight)
    total = found.latents.sum() + found.error.sum() + constant
    assert total == pytest.approx(found.output, rel=1e-4)


def test_attribution_in_a_decoder_agrees_with_ablation_and_its_permutation_does_not(llama):
    sae = dictionary(n_latents=64, k=8)
    sae.b_dec.data.zero_()  # many latents are active

    def margin(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1, 3] - logits[:, -1, 9]).sum()

    found = ma.attribute(llama, sae, TOKENS, margin, site=SITE, n_ablated=40)
    assert found.values.shape == (3, 12, 64)
    latent = found.top(1)[0][0]
    with torch.no_grad():
        plain = margin(llama(TOKENS).logits)

        def without(x: torch.Tensor) -> torch.Tensor:
            code = sae.encode(x.flatten(0, 1))[:, latent]
            return x - (code[:, None] * sae.W_dec[latent]).view_as(x)

        fall = float(plain - margin(patched(llama, without, TOKENS)))
    assert found.output == pytest.approx(float(plain), rel=1e-4)
    assert found.falls[found.ablated.tolist().index(latent)] == pytest.approx(fall, abs=1e-3)
    assert found.rank_correlation is not None
    assert found.null is not None
    assert found.rank_correlation.value > 0.8 > found.null.high
    assert abs(found.null.value) < 0.05
    assert "permuted" in str(found)
    # The gradient is that of a finite difference.
    sample, position, latent = (
        int(i) for i in np.unravel_index(np.abs(found.values).argmax(), found.values.shape)
    )

    def nudged(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[sample, position] += 1e-2 * sae.W_dec[latent].detach()
        return x

    slope = (float(margin(patched(llama, nudged, TOKENS))) - float(plain)) / 1e-2
    expected = slope * found.activations[sample, position, latent]
    assert found.values[sample, position, latent] == pytest.approx(expected, rel=0.05)


def test_a_token_id_means_its_logit_after_the_last_token(llama):
    one = ma.attribute(llama, dictionary(), TOKENS, 7, site=SITE, n_ablated=4)
    two = ma.attribute(
        llama, dictionary(), TOKENS, lambda y: y[:, -1, 7].sum(), site=SITE, n_ablated=4
    )
    assert np.array_equal(one.values, two.values)


def refusal(call: Any) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def steered(network: Any, *arguments: Any, **options: Any) -> None:
    with torch.no_grad(), ma.steer(network, *arguments, **{"site": SITE, **options}):
        network(TOKENS)


def test_what_cannot_be_is_refused_in_a_sentence(llama):
    sae, other = dictionary(), dictionary(d_in=12)
    assert "no latent 24; it has 0 to 23" in refusal(lambda: steered(llama, sae, 24, 1.0))
    assert "no latent -1" in refusal(lambda: ma.logit_effects(llama, sae, [-1]))
    assert "name one" in refusal(lambda: steered(llama, sae, [], 1.0))
    for call in (
        lambda: steered(llama, other, 3, 1.0),
        lambda: ma.logit_effects(llama, other),
        lambda: ma.attribute(llama, other, TOKENS, 1, site=SITE),
    ):
        assert "is it of another site or model?" in refusal(call)
    named: Any = SimpleNamespace(**vars(stranger(sae)), site="model.layers.1")
    assert "is of site model.layers.1, not of" in refusal(lambda: steered(llama, named, 3, 1.0))
    assert "give `site`" in refusal(lambda: steered(llama, sae, 3, 1.0, site=None))
    assert "finite number" in refusal(lambda: steered(llama, sae, 3, float("inf")))
    assert "finite number" in refusal(lambda: steered(llama, sae, 3, 1e40))
    assert "Give a `scale`" in refusal(lambda: steered(llama, sae, 3))
    assert "leave `scale` out" in refusal(lambda: steered(llama, sae, {3: 1.0}, 2.0))
    assert "overflows torch.float16" in refusal(
        lambda: steered(decoder("llama").half(), sae, 3, 1e6)
    )
    attributed: Any = lambda output: ma.attribute(llama, sae, TOKENS, output, site=SITE)  # noqa: E731
    assert "must be one number, got (3, 12, 258)" in refusal(lambda: attributed(lambda y: y))
    assert "There is no output 900" in refusal(lambda: attributed(900))
    assert "cannot be computed" in refusal(lambda: attributed(lambda y: y[99]))
    assert "does not depend" in refusal(lambda: attributed(lambda y: y.detach().sum()))
    headless: Any = language_models.MODELS["llama"]().model
    assert "no language-model head" in refusal(lambda: ma.logit_effects(headless, sae))
    assert "no language-model head" in refusal(lambda: ma.logit_effects(nn.Linear(2, 2), sae))
    transcoder = ma.Transcoder(d_in=16, d_out=12, n_latents=24, sparsity=ma.TopK(k=4))
    assert "writes the one site" in refusal(lambda: steered(llama, transcoder, 3, 1.0))


def test_verbs_of_language_models_take_texts(llama):
    tokenizer = language_models.byte_tokenizer()
    llama.input = TextInput("Bytes", tokenizer, vocabulary=258, context=64, causal=True)
    try:
        lines = ["the cat sat on the mat, and the dog", "shares fell on monday, and rose on friday"]
        texts = ma.text_samples(lines, llama, context=8, packing="cut")
        ids = texts.stack([texts.read(i) for i in range(len(texts))])
        sae, later = dictionary(), dictionary()
        points = [(sae, 3, SITE), (later, 5, "blocks.1.hook_resid_post")]
        for verb in (
            lambda x: ma.attribute(llama, sae, x, 7, site=SITE, n_ablated=2).values,
            lambda x: ma.logit_effects(llama, sae, [3], tokens=x, site=SITE, n_random=50).scale,
            lambda x: (
                ma.compare_steering(
                    llama, points, x, lambda y: y[..., 7].mean(), scale=1.0, n_random=1
                ).track.change
            ),
            lambda x: (
                ma.circuit(
                    llama, sae, later, x, site_a=SITE, site_b="blocks.1.hook_resid_post"
                ).edges.weight
            ),
        ):
            assert np.array_equal(verb(texts), verb(ids))
        padded = ma.text_samples(lines, llama, context=16, packing="document")
        with pytest.raises(InputError, match="packing='cut'"):
            ma.attribute(llama, sae, padded, 7, site=SITE)
        with pytest.raises(InputError, match=r"TextSamples is not a batch.*samples\.stack"):
            ma.read_activations(llama, texts, [SITE])
    finally:
        del llama.input
