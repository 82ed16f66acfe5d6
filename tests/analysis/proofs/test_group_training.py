"""Training of networks on the table of a group."""

import numpy as np

from mechatlas.analysis.proofs.group_training import GroupTrainingConfig, train_group_net
from mechatlas.analysis.proofs.prove import prove
from mechatlas.maths.named_groups import group

from .planted import true_margins


def test_training_learns_a_group_and_gives_the_same_bytes_again():
    of = group("D3")
    options = GroupTrainingConfig(width=40, steps=300, batch_size=64, seed=3)
    weights = train_group_net(np.asarray(of.table), options)
    again = train_group_net(np.asarray(of.table), options)
    assert all(np.array_equal(a, b) for a, b in zip(weights, again, strict=True))
    assert (true_margins(weights, of.table) > 0).all()
    bound = prove(*weights, of, compute_budget=0.5)
    assert (bound.verification.margins <= true_margins(weights, of.table)).all()
