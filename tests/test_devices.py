"""Verbs on a device that is simulated: the numbers of the CPU, and no mixing of devices."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import mechatlas as ma
from mechatlas.activations.sites import as_site
from mechatlas.analysis.matching.splicing import splice
from mechatlas.analysis.symmetry.regression import CodeRegression
from mechatlas.maths.linalg import Firing, Moments, gram
from tests.simulated_device import simulated_cuda

INPUTS = torch.randn(120, 6, generator=torch.Generator().manual_seed(1))
FIRST, SECOND = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
ROWS = torch.randn(80, 8, generator=torch.Generator().manual_seed(2))


def network(device):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    return made.eval().to(device)


def dictionary(device, seed=0):
    made = ma.Autoencoder(d_in=8, n_latents=12, sparsity=ma.TopK(k=3), seed=seed)
    return made.to(device)


def spliced(device):
    own = dictionary(device)
    site = as_site(network("cpu"), "1")
    ways = {"own": lambda x, y: own.decode(own.encode(x))}
    effect = splice(network(device), list(INPUTS.split(40)), (site, site), ways)["own"]
    return [effect.variance_lost.value, effect.variance_lost.low]


def evaluated(device):
    found = ma.evaluate(
        dictionary("cpu"), network=network("cpu"), samples=INPUTS, site="1", device=device
    )
    return [found.fvu.value, found.l0.value]


def collected(device, folder):
    return ma.collect(network(device), INPUTS, ["1", "3"], folder).rows("1").held_out(99).x


def streamed(device):
    rows = ma.stream(network("cpu"), INPUTS, "1", device=device)
    return ma.train(dictionary("cpu"), rows, steps=5, batch_size=16, device=device).W_dec


def saved(device, folder):
    ma.save(dictionary(device), folder / "d")
    return ma.load(folder / "d").W_dec


def edited(device):
    made = network(device)
    with ma.intervene(made, {"1": lambda x: x * 0}):
        return made(INPUTS.to(device))


def moments(device):
    rows, moments, firing = ROWS.to(device), Moments(8), Firing(8)
    for part in rows.split(30):
        moments.add(part)
        firing.add(part > 0)
    return np.stack([moments.covariance, moments.second_moment, firing.together, gram(rows)])


def regressed(device):
    made = CodeRegression(8, 6, torch.device(device))
    codes, second = ROWS.relu().to(device), np.arange(80) % 3 == 0
    codes[:, 5] = 0  # a dead latent
    for i in range(0, 80, 40):
        part = slice(i, i + 40)
        made.add(codes[part], INPUTS[:80][part], second[part])
    slopes, intercept = made.whole()
    return np.concatenate([slopes.ravel(), intercept, made.halves().ravel()])


def language_model(device):
    """GPT-2 of two layers, and tokens."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 2}
    rest: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}
    config = transformers.GPT2Config(n_head=2, **sizes, **rest)
    tokens = torch.randint(0, 50, (24, 10), generator=torch.Generator().manual_seed(5))
    return transformers.GPT2LMHeadModel(config).eval().to(device), tokens


def evaluated_language_model(device):
    model, tokens = language_model(device)
    found = ma.evaluate(dictionary(device), network=model, samples=tokens, site=FIRST)
    return [found.fvu.value, found.spliced.kl_divergence.value]


def effects(device):
    model, tokens = language_model(device)
    found = ma.logit_effects(model, dictionary(device), tokens=tokens, site=FIRST)
    return np.stack([found.top_tokens, found.top_effects])


def attributed(device):
    model, tokens = language_model(device)
    found = ma.attribute(model, dictionary(device), tokens, output=7, site=FIRST)
    return np.concatenate([found.values.ravel(), found.error.ravel(), found.falls])


def steered(device):
    model, tokens = language_model(device)
    with ma.steer(model, dictionary(device), latent=3, scale=2.0, site=FIRST):
        return model(tokens.to(device)).logits


def steerings(device):
    model, tokens = language_model(device)
    points = [(dictionary(device), 3, FIRST), (dictionary(device, 1), 5, SECOND)]
    found = ma.compare_steering(
        model, points, tokens, lambda y: y.log_softmax(-1)[..., 7].mean(), scale=2.0, n_random=3
    )
    return [[e.change, e.divergence, e.random_change] for e in (found.track, *found.single)]


def circuit(device):
    model, tokens = language_model(device)
    found = ma.circuit(
        model, dictionary(device), dictionary(device, 1), tokens, site_a=FIRST, site_b=SECOND
    )
    return found.edges.contribution


def interactions(device):
    found = ma.basis(network(device), INPUTS, ["0", "2", "4"])
    edges = [found.layers[0].edges_by_basis[found.layers[0].kind].strength.ravel()]
    return np.concatenate([*(layer.activation_eigenvalues for layer in found.layers), *edges])


def branches(device):
    found = ma.branches(dictionary(device), {"a": slice(0, 4), "b": slice(4, 8)}, ROWS.to(device))
    return found.q_values


def matched(device):
    found = ma.match(dictionary(device), dictionary(device, seed=1), device=device, seed=2)
    found.assignment.certify(found.costs)
    return np.concatenate([found.columns, found.q_values, [found.cost]])


VERBS = {
    "read_activations": lambda at, _: ma.read_activations(network(at), INPUTS, ["1"])["1"],
    "intervene": lambda at, _: edited(at),
    "collect": collected,
    "stream and train": lambda at, _: streamed(at),
    "evaluate rows": lambda at, _: [ma.evaluate(dictionary(at), ROWS).fvu],
    "evaluate a network": lambda at, _: evaluated(at),
    "match": lambda at, _: matched(at),
    "statistics of the interaction basis": lambda at, _: moments(at),
    "regressions on codes": lambda at, _: regressed(at),
    "splice": lambda at, _: spliced(at),
    "save and load": saved,
    "evaluate a language model": lambda at, _: evaluated_language_model(at),
    "logit effects": lambda at, _: effects(at),
    "attribute": lambda at, _: attributed(at),
    "steer": lambda at, _: steered(at),
    "compare_steering": lambda at, _: steerings(at),
    "circuit": lambda at, _: circuit(at),
    "basis": lambda at, _: interactions(at),
    "branches": lambda at, _: branches(at),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_computes_on_the_device_what_it_computes_on_the_cpu(verb, tmp_path):
    def numbers(found):
        whole = found.detach().cpu() if isinstance(found, torch.Tensor) else found
        return np.asarray(whole, dtype=float)

    wanted = numbers(VERBS[verb]("cpu", tmp_path / "here"))
    with simulated_cuda() as device:
        found = numbers(VERBS[verb]("cuda:0", tmp_path / "there"))
    assert np.allclose(found, wanted, atol=1e-4, rtol=1e-3)
    assert device.calls or device.copies


def test_rows_elsewhere_are_refused_in_a_sentence():
    with simulated_cuda(), pytest.raises(ma.InputError, match="on cuda:0, the rows are on cpu"):
        dictionary("cuda:0").encode(ROWS)
