"""Training of networks on the table of a group."""

import dataclasses

import numpy as np
import torch

from mechatlas.analysis.proofs.group_training import GroupTrainingConfig, train_group_nets
from mechatlas.analysis.proofs.prove import prove
from mechatlas.maths.named_groups import group

from .planted import true_margins


def test_training_learns_a_group_and_gives_the_same_bytes_again():
    of = group("D3")
    options = GroupTrainingConfig(
        width=40, embedding_width=24, steps=300, batch_size=64, seed=3, n_seeds=2
    )
    short = dataclasses.replace(options, steps=30)
    again = (train_group_nets(np.asarray(of.table), short) for _ in range(2))
    for weights, others in zip(*again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(weights, others, strict=True))
    for weights in train_group_nets(np.asarray(of.table), options):
        assert (true_margins(weights, of.table) > 0).all()
        bound = prove(*weights, of, compute_budget=0.5)
        assert (bound.verification.margins <= true_margins(weights, of.table)).all()


def test_networks_side_by_side_are_those_trained_alone():
    of = group("C5")
    options = GroupTrainingConfig(
        width=12, embedding_width=10, steps=30, batch_size=25, seed=7, n_seeds=3
    )
    together = train_group_nets(np.asarray(of.table), options)
    for i, weights in enumerate(together):
        alone = dataclasses.replace(options, seed=7 + i, n_seeds=1)
        [other] = train_group_nets(np.asarray(of.table), alone)
        for a, b in zip(weights, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_penalty_that_grows_spares_the_first_steps():
    table = np.asarray(group("S3").table)

    def sizes(**changes):
        kept = {}
        settings = GroupTrainingConfig(
            width=8, embedding_width=8, steps=60, batch_size=16, n_checkpoints=2, **changes
        )
        train_group_nets(
            table, settings,
            on_checkpoint=lambda step, nets: kept.update({step: np.abs(nets[0].unembed).sum()}),
        )  # fmt: skip
        return kept[20], kept[60]

    free, grown, whole = (
        sizes(weight_decay=decay, weight_decay_warm_up=warm_up)
        for decay, warm_up in ((0.0, 0.0), (0.1, 1.0), (0.1, 0.0))
    )
    assert abs(grown[0] - free[0]) < 0.3 * abs(whole[0] - free[0])
    assert grown[1] < 0.8 * free[1]


def test_subnormal_numbers_count_again_after_training():
    settings = GroupTrainingConfig(width=4, embedding_width=4, steps=2, batch_size=4)
    train_group_nets(np.asarray(group("C3").table), settings)
    assert float(torch.tensor(1e-40) * 1.0) > 0
