"""Sections are what the network computes, and their closed forms what autograd says."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mechatlas.activations.sites import read_activations
from mechatlas.analysis.interaction import derivatives
from mechatlas.analysis.interaction.bases import (
    BASIS_KINDS,
    interaction_basis,
    neuron_basis,
    rotated_basis,
)
from mechatlas.analysis.interaction.derivatives import (
    directional_derivatives,
    vector_jacobian_products,
)
from mechatlas.analysis.interaction.edges import measure_edges
from mechatlas.analysis.interaction.layer_maps import layer_maps, like, rows_of
from mechatlas.analysis.interaction.statistics import (
    Inputs,
    LayerMapFiring,
    LayerMoments,
    collect_statistics,
    output_gradients,
    pullback,
)
from mechatlas.base import NonFiniteError, Site, SiteError


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 9), nn.Linear(9, 5)

    def forward(self, x):
        return x + self.outer(self.inner(x).relu())


class ConvReLU(nn.Module):
    def __init__(self, *arguments, **options):
        super().__init__()
        self.conv = nn.Conv2d(*arguments, **options)

    def forward(self, x):
        return self.conv(x).relu()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return torch.softmax(self.q(x) @ x.mT, dim=-1) @ self.v(x)


def double(module):
    torch.manual_seed(0)
    return module().double().eval().requires_grad_(requires_grad=False)


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Identity(), nn.Linear(5, 4)), (30, 5), "form"),
    "relu": (
        lambda: nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(5, 6), nn.ReLU())),
        (30, 5),
        "form",
    ),
    "positions": (
        lambda: nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(5, 6), nn.ReLU())),
        (12, 3, 5),
        "form",
    ),
    "residual": (lambda: nn.Sequential(nn.Identity(), Residual()), (30, 5), "form"),
    "convolution": (
        lambda: nn.Sequential(nn.Identity(), ConvReLU(3, 4, 3, padding=1)),
        (6, 3, 5, 4),
        "form",
    ),
    "strided": (
        lambda: nn.Sequential(
            nn.Identity(), ConvReLU(3, 4, (3, 2), stride=2, padding=(2, 0), dilation=(1, 2))
        ),
        (6, 3, 6, 7),
        "form",
    ),
    "attention": (lambda: nn.Sequential(nn.Identity(), Attention()), (8, 3, 4), None),
    "gelu": (
        lambda: nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(5, 6), nn.GELU())),
        (20, 5),
        None,
    ),
    "norm": (
        lambda: nn.Sequential(nn.Identity(), nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4))),
        (20, 5),
        None,
    ),
}
LAYERS = [Site("0"), Site("1")]


def setting(name):
    make, shape, form = NETWORKS[name]
    network = double(make)
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    maps = layer_maps(network, LAYERS, x[:4])
    return network, x, maps, form


def whole_jacobian(network, x):
    """(n, t, o, s, d), by torch.func and nothing of ours."""
    before = rows_of(read_activations(network, x, LAYERS[:1])[LAYERS[0]])

    def run(one):
        return rows_of(network[1](like(one[None], x[:1])))[0]

    return before, torch.func.vmap(torch.func.jacrev(run))(before)


@pytest.mark.parametrize("name", NETWORKS)
def test_moments_of_gradients_are_those_of_autograd(name):
    network, x, maps, form = setting(name)
    assert (maps[0].form is not None) == (form is not None)
    _, jacobian = whole_jacobian(network, x)
    random = np.random.default_rng(0)
    root = random.normal(size=(jacobian.shape[2], 3))
    turned = torch.einsum("ntosd,ok->ntksd", jacobian, torch.from_numpy(root))
    n, s = jacobian.shape[0], jacobian.shape[3]
    brute = (torch.einsum("ntksd,ntkse->de", turned, turned) / (n * s)).numpy()
    inputs = Inputs.from_data(x)
    slow = pullback(network, maps[0], inputs, root, batch_size=5)
    np.testing.assert_allclose(slow, brute, atol=1e-10 * np.abs(brute).max())
    _, firing = collect_statistics(network, inputs, LAYERS, maps, batch_size=7)
    if firing[0] is not None:
        fast = firing[0].pullback(root @ root.T)
        np.testing.assert_allclose(fast, brute, atol=1e-10 * np.abs(brute).max())
    (end,) = output_gradients(network, maps, maps, inputs, batch_size=6)
    everything = (torch.einsum("ntosd,ntose->de", jacobian, jacobian) / (n * s)).numpy()
    np.testing.assert_allclose(end, everything, atol=1e-10 * np.abs(everything).max())


@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in ("gelu", "norm", "attention")])
def test_edges_of_a_relu_section_are_gradient_times_coordinate(name):
    network, x, maps, _ = setting(name)
    before, jacobian = whole_jacobian(network, x)
    layers, firing = collect_statistics(network, Inputs.from_data(x), LAYERS, maps, batch_size=7)
    assert firing[0] is not None
    target = rotated_basis(neuron_basis(layers[1].moments), seed=3)
    pulled = firing[0].pullback(target.to_basis @ target.to_basis.T)
    source = interaction_basis(layers[0].moments, pulled)
    found = measure_edges(network, maps[0], source, target, Inputs.from_data(x))
    f = source.transform(before)
    turned = torch.einsum(
        "ntosd,ok,jd->ntksj",
        jacobian,
        torch.from_numpy(target.to_basis),
        torch.from_numpy(source.from_basis),
    )
    brute = torch.einsum("ntksj,nsj->ntkj", turned, f).square().sum(1)
    np.testing.assert_allclose(found.strength, brute.mean(0), atol=1e-10 * float(brute.max()))
    error = brute.std(0, correction=1) / len(x) ** 0.5
    np.testing.assert_allclose(found.standard_error, error, atol=1e-10 * float(brute.max()))
    assert found.quadrature_points == 1


@pytest.mark.parametrize("name", ["attention", "norm", "gelu"])
def test_edges_of_any_section_are_integrals_along_the_path(name):
    network, x, maps, _ = setting(name)
    layers, _ = collect_statistics(network, Inputs.from_data(x), LAYERS, maps, batch_size=7)
    source = rotated_basis(neuron_basis(layers[0].moments), seed=1)
    target = rotated_basis(neuron_basis(layers[1].moments), seed=2)
    found = measure_edges(
        network, maps[0], source, target, Inputs.from_data(x), quadrature_points=2
    )
    rows = rows_of(x)
    mean = rows.new_tensor(source.mean)
    nodes, weights = np.polynomial.legendre.leggauss(2)
    total: Any = 0
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        _, jacobian = whole_jacobian(network, like(mean + node * (rows - mean), x))
        total = total + weight * torch.einsum(
            "ntosd,ok,jd,nsj->ntkj",
            jacobian,
            torch.from_numpy(target.to_basis),
            torch.from_numpy(source.from_basis),
            source.transform(rows),
        )
    brute = total.square().sum(1)
    np.testing.assert_allclose(found.strength, brute.mean(0), atol=1e-10 * float(brute.max()))


def test_quadrature_adds_up_to_the_change_of_the_output():
    network, x, maps, _ = setting("attention")
    mean = x.mean(dim=(0, 1)).expand_as(x)
    errors = []
    for points in (2, 12):
        nodes, weights = np.polynomial.legendre.leggauss(points)
        total = sum(
            weight
            * directional_derivatives(maps[0], mean + node * (x - mean), x, (x - mean)[None])[0]
            for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True)
        )
        errors.append(float((total - (network[1](x) - network[1](mean))).abs().max()))
    assert errors[1] < 1e-8
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_derivatives_along_a_change_are_the_same_forwards_and_backwards(name):
    network, x, maps, _ = setting(name)
    tangents = torch.randn(2, *x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    found = directional_derivatives(maps[0], x, x, tangents)
    _, jacobian = whole_jacobian(network, x)
    for along, tangent in zip(found, tangents, strict=True):
        brute = torch.einsum("ntosd,nsd->nto", jacobian, rows_of(tangent))
        torch.testing.assert_close(along, brute, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(derivatives._double_backward(maps[0], x, x, tangent), brute)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * 2


def test_a_module_without_a_forward_derivative_has_one_all_the_same():
    class Own(nn.Module):
        def forward(self, x):
            return Doubled.apply(x)

    network = nn.Sequential(nn.Identity(), Own())
    x = torch.randn(4, 3, dtype=torch.float64)
    layer_map = layer_maps(network, LAYERS, x)[0]
    found = directional_derivatives(layer_map, x, x, torch.ones_like(x)[None])
    assert (found == 2).all()


def test_random_sources_keep_the_expected_second_moments(monkeypatch):
    monkeypatch.setattr(derivatives, "MAX_GRADIENTS", 4)
    network, x, maps, _ = setting("attention")
    exact = pullback(network, maps[0], Inputs.from_data(x), np.eye(3), batch_size=2)
    many = Inputs.from_data(torch.cat([x] * 40))
    for sources in (1, 4):
        found = pullback(network, maps[0], many, np.eye(3), batch_size=4, gradient_probes=sources)
        assert np.abs(found - exact).max() < 0.25 * np.abs(exact).max()
        assert np.abs(found - exact).max() > 0


def test_random_sources_have_the_variance_that_is_stated(monkeypatch):
    _, x, maps, _ = setting("attention")
    one, many = x[:1], x[:1].repeat(4000, 1, 1)  # every copy draws signs of its own
    every = vector_jacobian_products(maps[0], one, one, np.eye(3))
    gradients_of_one = torch.cat([g.flatten()[None] for g in every])
    monkeypatch.setattr(derivatives, "MAX_GRADIENTS", 4)
    sources = 3
    sums = vector_jacobian_products(maps[0], many, many, np.eye(3), gradient_probes=sources)
    rows = torch.stack([g.flatten(1) for g in sums], dim=1)
    measured = (rows.mT @ rows).var(dim=0)
    exact, squares = gradients_of_one.T @ gradients_of_one, gradients_of_one.square()
    diagonal = exact.diagonal()
    own = 2 * squares.T @ squares
    stated = (torch.outer(diagonal, diagonal) + exact.square() - own) / sources
    torch.testing.assert_close(measured, stated, atol=0.1 * float(stated.max()), rtol=0.1)


def test_what_goes_around_a_layer_is_not_hidden():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.a(x)
            return self.c(self.b(h) + h)

    network = double(Around)
    x = torch.randn(9, 3, dtype=torch.float64)
    maps = layer_maps(network, [Site("a"), Site("b"), Site("c")], x)
    assert maps[0].form is not None
    assert maps[1].description.startswith("the whole network")
    assert not maps[1].depends_only_on_source
    hidden = network.b(network.a(x))
    np.testing.assert_allclose(
        maps[1].run(hidden * 2, x).detach(),
        network.c(hidden * 2 + network.a(x)).detach(),
    )


def test_a_relu_that_no_sample_sees_at_work_is_still_a_relu():
    network: Any = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    network = network.double()
    with torch.no_grad():
        network[1][0].bias.fill_(100)
    layer_map = layer_maps(network, LAYERS, torch.randn(5, 3, dtype=torch.float64))[0]
    assert layer_map.form is not None
    assert layer_map.form.relu


def test_bad_layers_and_bad_numbers_are_named():
    network, x, maps, _ = setting("relu")
    with pytest.raises(SiteError, match="does not depend on layer 1"):
        layer_maps(network, LAYERS[::-1], x)
    bad = x.clone()
    bad[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="Sample 3"):
        Inputs.from_data(bad)
    with torch.no_grad():
        network[1][0].weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="Layer 1 has a NaN or an infinity in samples 0 to"):
        collect_statistics(network, Inputs.from_data(x), LAYERS, maps, batch_size=7)


def test_every_kind_of_basis_has_a_name():
    assert set(BASIS_KINDS) == {"neurons", "pca", "lib", "gib"}


@pytest.mark.parametrize("name", ["relu", "residual", "strided"])
def test_a_stream_goes_on_from_its_state_and_equals_the_whole(name):
    network, x, maps, _ = setting(name)
    half = len(x) // 2
    (_, whole), (fires,) = collect_statistics(
        network, Inputs.from_data(x), LAYERS, maps, batch_size=4
    )
    (_, first), (left,) = collect_statistics(
        network, Inputs.from_data(x[:half]), LAYERS, maps, batch_size=4
    )
    rest = Inputs.from_data(x[half:]).read(network, LAYERS)
    assert fires is not None
    assert left is not None
    first = LayerMoments.from_arrays(first.arrays())
    left = LayerMapFiring.from_arrays(maps[0], left.arrays())
    first.add(rows_of(rest[LAYERS[1]]).flatten(0, 1))
    left.add(rest[maps[0].source])
    np.testing.assert_allclose(
        first.moments.covariance, whole.moments.covariance, rtol=1e-12, atol=1e-12
    )
    if whole.nonnegative:  # of others firing is not counted on
        np.testing.assert_array_equal(first.firing.together, whole.firing.together)
    assert (first.nonnegative, first.has_zeros) == (whole.nonnegative, whole.has_zeros)
    after = np.eye(fires.units.width if name != "residual" else 5)
    np.testing.assert_allclose(left.pullback(after), fires.pullback(after), rtol=1e-12, atol=1e-12)


class Stem(nn.Module):
    """A network with functions between its modules, and a part that a later layer may skip to."""

    def __init__(self, *, around: bool):
        super().__init__()
        self.stem, self.body = ConvReLU(3, 4, 3, padding=1), ConvReLU(4, 4, 3, padding=1)
        self.head, self.around = nn.Linear(4, 2), around

    def forward(self, x):
        h = self.stem(x)
        pooled = torch.nn.functional.max_pool2d(h, 2)
        y = self.body(pooled) + (pooled if self.around else 0)
        return self.head(y.mean(dim=(2, 3)))


@pytest.mark.parametrize("around", [False, True])
def test_what_comes_before_a_layer_is_left_out_only_if_it_makes_no_difference(around):
    network = double(lambda: Stem(around=around))
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    network.stem.register_forward_hook(lambda *_: calls.append(1))
    first, second = layer_maps(network, [Site("stem"), Site("body"), Site("head")], x)
    assert first.depends_only_on_source  # nothing goes around the stem
    assert second.depends_only_on_source is not around  # around the body there may be
    assert first.is_piecewise_linear
    other = torch.rand(5, 4, 6, 6, dtype=torch.float64)
    whole = network.body(torch.nn.functional.max_pool2d(other, 2))
    torch.testing.assert_close(first.run(other, x[:5]), whole)
    calls.clear()
    body = network.body(torch.rand(6, 4, 3, 3, dtype=torch.float64))
    skipped = torch.nn.functional.max_pool2d(network.stem(x), 2) if around else 0
    wanted = network.head((body + skipped).mean(dim=(2, 3)))
    torch.testing.assert_close(second.run(body, x), wanted)
    assert "forward" not in vars(network.stem)
    torch.testing.assert_close(network(x), network(x.clone()))


def test_edges_through_many_modules_are_gradient_times_coordinate():
    """Forwards, where there are few source coordinates, and backwards, where outputs are few."""
    network = double(lambda: Stem(around=False))
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layers = [Site("stem"), Site("body"), Site("head")]
    maps = layer_maps(network, layers, x)
    moments, _ = collect_statistics(network, Inputs.from_data(x), layers, maps, batch_size=6)
    made = [rotated_basis(neuron_basis(layer.moments), seed=i) for i, layer in enumerate(moments)]
    found = read_activations(network, x, layers)
    for number, layer_map in enumerate(maps):
        source, target = made[number : number + 2]
        edges = measure_edges(network, layer_map, source, target, Inputs.from_data(x))
        assert edges.quadrature_points == 1
        start = found[layer_map.source].detach()
        f = source.transform(rows_of(start))
        jacobian = torch.func.jacrev(lambda a, s=layer_map: rows_of(s.run(a, x)).sum(0))(start)
        jacobian = jacobian.movedim(-3, -1).flatten(-3, -2)  # (t, o, n, s, d)
        turned = torch.einsum(
            "tonsd,ok,jd->ntksj",
            jacobian,
            torch.from_numpy(target.to_basis),
            torch.from_numpy(source.from_basis),
        )
        brute = torch.einsum("ntksj,nsj->ntkj", turned, f).square().sum(1).mean(0)
        np.testing.assert_allclose(edges.strength, brute, atol=1e-10 * float(brute.max()))
