"""Composed kernels are what an impulse does, and on data what removing a feature does."""

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.sites import read_activations
from mechatlas.analysis.circuits import recording
from mechatlas.analysis.circuits.compose import compose_route
from mechatlas.analysis.circuits.effects import (
    ablate,
    ablation_agreement,
    attribute,
    bootstrap_interval,
    reproduced_variance,
)
from mechatlas.analysis.circuits.recording import record_gates, sample_activations
from mechatlas.analysis.circuits.virtual_weights import (
    compose_responses,
    edge_kernels,
    pair_blocks,
    strongest_edges,
)
from mechatlas.analysis.circuits.wiring import trace_wiring
from mechatlas.base import InputError
from tests.analysis.circuits.small import A, B, Linear, two, without_gates


def images(n: int = 8, side: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)


def maps(network: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [read_activations(network, part, [A])[A] for part in x.split(4)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_with_gates_open_kernels_are_impulse_responses(seed, dtype, tolerance):
    network = two(seed, dtype)
    wiring = trace_wiring(network, A, B, images(1, dtype=dtype))
    a, b = Linear(16, 7, seed=2, dtype=dtype), Linear(18, 6, seed=3, dtype=dtype)
    side = 11
    impulses = torch.zeros(a.n_latents, 16, side, side, dtype=dtype)
    impulses[:, :, 5, 5] = a.W_dec
    with torch.no_grad():
        out = without_gates(network.second, impulses)
    found = compose_responses(wiring, a)
    for route, response in zip(wiring.routes, found, strict=True):
        read_by = torch.zeros_like(b.W_enc)
        read_by[route.channels] = b.W_enc[route.channels]
        expected = torch.einsum("ncyx,ct->ntyx", out, read_by)
        kernel = torch.einsum("knc,ct->knt", response.values, b.W_enc[route.channels])
        for tap, value in zip(response.taps, kernel, strict=True):
            y, x = 5 - tap
            assert (value - expected[:, :, y, x]).abs().max() <= tolerance
            expected[:, :, y, x] = 0
        assert expected.abs().max() <= tolerance, "nothing outside the kernel"


class Turned(nn.Module):
    """A stride, a dilation, groups and a mean between two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.thin = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=3)
        self.wide = nn.Conv2d(6, 8, (3, 2), dilation=2, padding=(2, 1))
        self.last = nn.Conv2d(8, 5, 3, stride=2)
        self.second = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(functional.avg_pool2d(self.thin(self.first(x)), 2, stride=1))
        return self.second(self.last(functional.pad(x, (1, 0, 2, 0))))


def test_strides_dilations_groups_and_pads_compose():
    torch.manual_seed(0)
    network = Turned().double()
    x = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    wiring = trace_wiring(network, A, B, x)
    (route,) = wiring.routes
    response = compose_route(wiring, route, torch.eye(6, dtype=torch.float64))
    with torch.no_grad():
        start = read_activations(network, x, [A])[A]
        still = wiring.run(torch.zeros_like(start))
        for y, x_ in ((16, 16), (17, 20), (19, 15)):
            impulse = torch.zeros(6, 6, 40, 40, dtype=torch.float64)
            impulse[:, :, y, x_] = torch.eye(6, dtype=torch.float64)
            out = wiring.run(impulse) - still
            for tap, values in zip(response.taps, response.values, strict=True):
                q, rest = np.divmod(np.array([y, x_]) - tap, response.stride)
                if not rest.any():
                    assert (out[:, :, q[0], q[1]] - values).abs().max() < 1e-10
                    out[:, :, q[0], q[1]] = 0
            assert out.abs().max() < 1e-10


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_mean_gates_weights_rank_like_ablations(seed):
    network = two(seed, torch.float32)
    x = images(48, 12, torch.float32)
    wiring = trace_wiring(network, A, B, x[:1])
    a, b = Linear(16, 24, seed=4, dtype=torch.float32), Linear(18, 30, seed=5, dtype=torch.float32)
    recording = record_gates(wiring, a, b, maps(network, x[:24]))
    removed = ablate(wiring, a, maps(network, x[24:]), np.arange(24))
    block = next(pair_blocks(wiring, compose_responses(wiring, a, recording.gates), b.W_enc))
    predicted = block.weight.sum(axis=0).T * removed.mean[:, None]
    found = ablation_agreement(predicted, removed.pre_activations(b.W_enc))
    assert found.spearman >= 0.9
    assert found.low > found.null_high
    assert found.null_low < 0 < found.null_high
    # Nothing is left of it when features trade places.
    assert found.other_high < found.low


def test_mean_gates_are_shares_and_those_of_a_maximum_add_up():
    network = two(0, torch.float32)
    wiring = trace_wiring(network, A, B, images(1, dtype=torch.float32))
    a, b = Linear(16, 9, seed=4, dtype=torch.float32), Linear(18, 9, seed=5, dtype=torch.float32)
    recording = record_gates(wiring, a, b, maps(network, images(8, dtype=torch.float32)))
    pooled = recording.gates.means.pop(
        next(p for p in recording.gates.means if p.number == wiring.routes[-1].nodes[0])
    )
    for means in recording.gates.means.values():
        assert 0 <= means.min() < means.max() <= 1
    alone, shared = pooled.sum(dim=1)
    assert (alone <= 1).all()
    assert (shared >= 1).all()


class Strided(nn.Module):
    """A rectifier, a maximum with a stride, a dilation and a frame, and another rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ReLU()
        self.conv = nn.Conv2d(16, 5, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d((3, 2), stride=(2, 1), padding=1, dilation=(1, 2), ceil_mode=True)
        self.last = nn.Conv2d(5, 18, (1, 3))
        self.second = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.last(self.pool(self.conv(self.first(x)).relu())))


@pytest.mark.parametrize("name", ["modules with ties in their maxima", "strides"])
def test_what_a_feature_adds_on_average_is_what_its_faint_removal_takes(name, monkeypatch):
    monkeypatch.setattr(recording, "FOLLOWED", 1000)
    if name == "strides":
        torch.manual_seed(0)
        network = Strided().double()
        x = torch.randn(3, 16, 13, 12, dtype=torch.float64)
    else:
        network = two(0, torch.float64)
        x = images(3, 7)
    wiring = trace_wiring(network, A, B, x[:1])
    a, b = Linear(16, 9, seed=4, dtype=torch.float64), Linear(18, 9, seed=5, dtype=torch.float64)
    x = torch.cat(maps(network, x))
    recorded = record_gates(wiring, a, b, [x[:1], x[1:]])
    assert (x == 0).float().mean() > 0.2
    code = a.encode(x.movedim(1, -1))
    with torch.no_grad():
        whole = wiring.run(x)
    expected = [np.zeros_like(gated_means.sums[:, 3]) for gated_means in recorded.gates.gated_means]
    faint = 1e-7
    for sample, y, x_ in code[..., 3].nonzero().tolist():
        bare = x[sample].clone()
        bare[:, y, x_] -= faint * code[sample, y, x_, 3] * a.W_dec[3]
        with torch.no_grad():
            lost = (whole[sample] - wiring.run(bare[None])[0]) / faint
        for k, (route, response) in enumerate(
            zip(wiring.routes, compose_responses(wiring, a), strict=True)
        ):
            for tap, (dy, dx) in enumerate(response.taps.tolist()):
                (row, left), (column, over) = (
                    divmod(at - d, s)
                    for at, d, s in zip((y, x_), (dy, dx), response.stride, strict=True)
                )
                inside = 0 <= row < lost.shape[1] and 0 <= column < lost.shape[2]
                if not left and not over and inside:
                    expected[k][tap] += lost[route.channels, row, column].numpy()
    for gated_means, own in zip(recorded.gates.gated_means, expected, strict=True):
        np.testing.assert_allclose(gated_means.sums[:, 3], own, rtol=1e-3, atol=1e-4)
        assert np.abs(own).max() > 0.1


def test_activations_that_are_followed_stand_for_all_of_a_feature_in_a_sample():
    random = np.random.default_rng(0)
    dense = random.gamma(0.5, size=(3 * 20, 5)) * (random.random((60, 5)) < [0.1, 0.3, 1, 0, 0.6])
    codes, n = sparse.csr_matrix(dense.astype(np.float32)), 2000
    counted = np.zeros_like(dense)
    for seed in range(n):
        some = sample_activations(codes, (4, 5), np.random.default_rng(seed))
        np.add.at(counted, (some.position, some.latent), some.weight / n)
        sums = np.zeros((3, 5))
        np.add.at(sums, (some.position // 20, some.latent), some.weight)
        np.testing.assert_allclose(sums, dense.reshape(3, 20, 5).sum(axis=1), rtol=1e-5)
        drawn = np.zeros((3, 5), int)
        np.add.at(drawn, (some.position // 20, some.latent), 1)
        active = (dense > 0).reshape(3, 20, 5).sum(axis=1)
        np.testing.assert_array_equal(drawn, np.minimum(active, 8))
    assert np.abs(counted - dense).max() < 0.1 * dense.max()
    assert len(sample_activations(sparse.csr_matrix((20, 5)), (4, 5), random).weight) == 0


def test_a_feature_that_is_rarely_active_is_drawn_towards_mean_gates():
    network = two(0, torch.float32)
    wiring = trace_wiring(network, A, B, images(1, dtype=torch.float32))
    a, b = Linear(16, 9, seed=4, dtype=torch.float32), Linear(18, 9, seed=5, dtype=torch.float32)
    recording = record_gates(wiring, a, b, maps(network, images(8, dtype=torch.float32)))
    gates = recording.gates
    own, shared = (
        compose_responses(wiring, a, gates)[1],
        compose_responses(wiring, a, gates.shared())[1],
    )
    gated_means = gates.gated_means[1]
    active = np.diff(recording.codes_a.tocsc().indptr)
    prior = 16 * recording.codes_a.sum(axis=0) / active
    expected = gated_means.sums + np.asarray(prior).ravel()[:, None] * shared.values.numpy()
    expected /= (gated_means.weights + np.asarray(prior).ravel())[..., None]
    np.testing.assert_allclose(own.values, expected, rtol=1e-4, atol=1e-6)
    gated_means.sums[:, 4], gated_means.weights[:, 4], gates.prior[4] = (
        0,
        0,
        0,
    )  # one that never was
    own = compose_responses(wiring, a, gates)[1]
    torch.testing.assert_close(own.values[:, 4], shared.values[:, 4])


def test_norms_kernels_and_weights_agree_however_small_the_blocks():
    network = two(0, torch.float32)
    x = maps(network, images(16, dtype=torch.float32))
    wiring = trace_wiring(network, A, B, images(1, dtype=torch.float32))
    a, b = Linear(16, 40, seed=4, dtype=torch.float32), Linear(18, 150, seed=5, dtype=torch.float32)
    recording = record_gates(wiring, a, b, x)
    found = compose_responses(wiring, a, recording.gates)
    whole = list(pair_blocks(wiring, found, b.W_enc, recording))
    parts = list(pair_blocks(wiring, found, b.W_enc, recording, block_bytes=1))
    assert len(whole) == 1 < len(parts)
    for name in ("weight", "norm", "contribution"):
        joined = np.concatenate([getattr(part, name) for part in parts], axis=1)
        np.testing.assert_allclose(joined, getattr(whole[0], name), rtol=1e-4, atol=1e-6)
    kept = strongest_edges(wiring, found, b, recording, top_k_sources=5)
    for k, kernel in enumerate(edge_kernels(wiring, found, b.W_enc, kept)):
        own = kept.route == k
        np.testing.assert_allclose(kernel.sum(axis=1), kept.weight[own], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(
            np.linalg.norm(kernel, axis=1), kept.norm[own], rtol=1e-3, atol=1e-6
        )


def test_contributions_are_what_the_kernels_give_around_each_activation():
    network = two(3, torch.float32)
    x = torch.cat(maps(network, images(4, 7, torch.float32)))
    wiring = trace_wiring(network, A, B, images(1, dtype=torch.float32))
    a, b = Linear(16, 5, seed=4, dtype=torch.float32), Linear(18, 4, seed=5, dtype=torch.float32)
    recording = record_gates(wiring, a, b, [x])
    found = compose_responses(wiring, a, recording.gates)
    block = next(pair_blocks(wiring, found, b.W_enc, recording))
    code = a.encode(x.movedim(1, -1).flatten(0, 2)).view(4, 7, 7, 5)
    with torch.no_grad():
        on = b.encode(wiring.run(x).movedim(1, -1).flatten(0, 2)).view(4, 7, 7, 4) > 0
    response, k = found[1], 1
    rows = b.W_enc[response.channels]
    expected = torch.zeros(4, 5)
    for n, y, x_, i in on.nonzero().tolist():
        for tap, values in zip(response.taps, response.values, strict=True):
            at = y + int(tap[0]), x_ + int(tap[1])
            if 0 <= at[0] < 7 and 0 <= at[1] < 7:
                expected[i] += (values @ rows[:, i]) * code[n, at[0], at[1]]
    expected /= on.flatten(0, 2).sum(dim=0)[:, None]
    assert block.contribution is not None
    np.testing.assert_allclose(block.contribution[k], expected.numpy(), rtol=1e-3, atol=1e-5)


def test_attributions_add_up_to_the_drive_and_one_step_is_exact_where_it_is_homogeneous():
    network = two(0, torch.float64)
    for name, parameter in network.second.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    a, b = Linear(16, 16, seed=4, dtype=torch.float64), Linear(18, 9, seed=5, dtype=torch.float64)
    a.W_dec = torch.eye(16, dtype=torch.float64)
    a.encode = lambda x: x.relu()  # rectified channels are all there is: nothing is left over
    x = maps(network, images(4))
    wiring = trace_wiring(network, A, B, images(1))
    parts = [route.channels for route in wiring.routes]
    one = attribute(wiring, a, b, x, np.arange(4), parts, steps=1)
    many = attribute(wiring, a, b, x, np.arange(4), parts, steps=6)
    assert one.gap.max() < 1e-5  # codes are float32
    np.testing.assert_allclose(one.attributed, many.attributed, rtol=1e-5, atol=1e-7)
    biased = two(0, torch.float64)
    wiring, x = trace_wiring(biased, A, B, images(1)), maps(biased, images(4))
    rough = attribute(wiring, a, b, x, np.arange(4), parts, steps=32)
    assert rough.gap.max() < 0.02


def test_ablations_are_the_network_run_without_the_feature():
    network = two(0, torch.float64)
    x = torch.cat(maps(network, images(4)))
    wiring = trace_wiring(network, A, B, images(1))
    a, b = Linear(16, 6, seed=4, dtype=torch.float64), Linear(18, 5, seed=5, dtype=torch.float64)
    removed = ablate(wiring, a, [x[:2], x[2:]], np.array([1, 4]))
    code = a.encode(x.movedim(1, -1))
    for k, j in enumerate((1, 4)):
        bare = x - (code[..., [j]] * a.W_dec[j]).movedim(-1, 1)
        with torch.no_grad():
            full, less = network.second(x).movedim(1, -1), network.second(bare).movedim(1, -1)
        lost = (full - less) @ b.W_enc
        np.testing.assert_allclose(
            removed.pre_activations(b.W_enc)[k], lost.mean(dim=(0, 1, 2)), rtol=1e-4, atol=1e-6
        )
    pre_activations = np.einsum("snc,ct->snt", removed.lost, b.W_enc.numpy())[0].T
    low, high = bootstrap_interval(pre_activations)
    assert (low <= pre_activations.mean(axis=1)).all()
    assert (pre_activations.mean(axis=1) <= high).all()


class Planted(nn.Module):
    """Each of 64 channels feeds one channel of the next map, and all others a little."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.order = torch.randperm(64, generator=random)
        self.first = nn.Identity()
        self.conv = nn.Conv2d(64, 64, 1)
        self.second = nn.ReLU()
        weight = torch.eye(64)[self.order] + 0.02 * torch.randn(64, 64, generator=random)
        self.conv.weight.data = weight[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.first(x * 1.0)))


def test_planted_edges_are_found_and_the_weights_of_other_targets_are_not():
    network = Planted()
    random = torch.Generator().manual_seed(1)
    x = torch.rand(8, 64, 12, 12, generator=random)
    x = x * (torch.rand(x.shape, generator=random) < 0.05)
    wiring = trace_wiring(network, A, B, x[:1])
    one = Linear(64, 64, seed=0, dtype=torch.float32)
    one.W_dec, one.W_enc, one.encode = torch.eye(64), torch.eye(64), lambda x: (x - 0.2).relu()
    recording = record_gates(wiring, one, one, [x])
    found = compose_responses(wiring, one, recording.gates)
    kept = strongest_edges(wiring, found, one, recording)
    discovered = kept.q_value <= 0.05
    planted = kept.source == network.order.numpy()[kept.target]
    assert planted.sum() == 64
    assert discovered[planted].mean() >= 0.95
    assert planted[discovered].mean() >= 0.95
    one.W_enc = torch.eye(64).roll(7, 1)  # the drive of a target is now that of another
    mixed = strongest_edges(wiring, found, one, recording)
    assert mixed.discoveries.max() < 0.001
    assert not (mixed.q_value <= 0.05).any()


def test_composed_kernels_reproduce_a_linear_section_exactly():
    torch.manual_seed(0)
    network = Turned()
    network.forward = lambda x: network.second(network.wide(network.thin(network.first(x))))
    network.thin.padding, network.wide.padding = (0, 0), (0, 0)  # no rim
    x = torch.randn(3, 3, 20, 20)
    wiring = trace_wiring(network, A, B, x)
    a, b = Linear(6, 12, seed=0, dtype=torch.float32), Linear(8, 4, seed=1, dtype=torch.float32)
    a.W_dec, a.W_enc = torch.eye(12)[:, :6] - torch.eye(12)[:, :6].roll(6, 0), a.W_enc
    a.encode = lambda x: torch.cat([x.relu(), (-x).relu()], dim=1)
    with torch.no_grad():
        given = read_activations(network, x, [A])[A]
    share = reproduced_variance(wiring, compose_responses(wiring, a), a, b, [given])
    assert (share > 1 - 1e-5).all()


def test_dictionaries_of_other_widths_are_refused():
    network = two(0, torch.float32)
    wiring = trace_wiring(network, A, B, images(1, dtype=torch.float32))
    a, b = Linear(16, 6, seed=4, dtype=torch.float32), Linear(16, 5, seed=5, dtype=torch.float32)
    with pytest.raises(InputError, match="second has 18 channels, its dictionary reads 16"):
        record_gates(wiring, a, b, maps(network, images(4, dtype=torch.float32)))
