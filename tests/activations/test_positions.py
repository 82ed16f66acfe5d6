import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mechatlas.activations.positions import Positions, skips_first
from mechatlas.base import Site
from tests.networks import Layered, Mixer

rules = st.sampled_from(["norm", "random", "all"])


@given(rules, st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**31))
def test_positions_are_distinct_ascending_and_as_many_as_asked(rule, per_sample, n_positions, seed):
    activations = torch.randn(3, n_positions, 4, generator=torch.Generator().manual_seed(seed))
    chosen = Positions(rule=rule, per_sample=per_sample, seed=seed).draw(activations, [0, 1, 2])
    expected = n_positions if rule == "all" else min(per_sample, n_positions)
    assert chosen.shape == (3, expected)
    assert (chosen.diff(dim=1) > 0).all()
    assert ((chosen >= 0) & (chosen < n_positions)).all()


@given(st.permutations(range(6)))
def test_a_draw_does_not_depend_on_the_rest_of_the_batch(order):
    activations = torch.rand(6, 20, 3, generator=torch.Generator().manual_seed(1))
    positions = Positions(per_sample=4)
    whole = positions.draw(activations, list(range(6)))
    shuffled = positions.draw(activations[order], list(order))
    assert torch.equal(whole[order], shuffled)


def test_long_activations_are_drawn_in_proportion_to_their_length():
    length = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0])
    activations = torch.zeros(1, 5, 2)
    activations[0, :, 0] = length
    draws = [int(Positions(per_sample=1).draw(activations, [s])) for s in range(4000)]
    counts = np.bincount(draws, minlength=5)
    expected = 4000 * (length / length.sum()).numpy()
    assert counts[4] == 0
    assert ((counts[:4] - expected[:4]) ** 2 / expected[:4]).sum() < 16.3  # chi2, 3 df, p = 0.001


def test_silent_samples_still_give_positions():
    chosen = Positions(per_sample=3).draw(torch.zeros(2, 7, 4), [0, 1])
    assert chosen.shape == (2, 3)


def test_none_at_all_is_refused():
    with pytest.raises(ValueError, match="per_sample must be at least 1, got 0"):
        Positions(per_sample=0)


class Sum(nn.Module):
    """Network of one row for all tokens of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.read = nn.Linear(8, 8)

    def forward(self, tokens):
        return self.read(self.embed(tokens).sum(dim=1))


def test_only_rows_of_tokens_that_are_read_in_order_have_a_first_one():
    tokens = torch.arange(6)[None]
    assert skips_first(Layered(), tokens, [Site("layers.1")])
    assert not skips_first(Sum(), tokens, [Site("read")]), "its only row is no first token"
    assert not skips_first(Layered(), tokens.float(), [Site("layers.1")])
    both_ways = nn.Sequential(nn.Embedding(20, 8), Mixer(8, causal=False)).eval()
    assert not skips_first(both_ways, tokens, [Site("1")]), "its rows see later tokens"
