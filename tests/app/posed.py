"""A store of posed activations that are made of planted features, and dictionaries of it."""

from pathlib import Path

import numpy as np
import torch

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network
from mechatlas.activations.posing import PoseConfig
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Images
from mechatlas.activations.store import write_shard
from mechatlas.activations.store_manifest import SCHEMA, Split
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.run_folder import execute
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder
from mechatlas.dictionaries.formats import save
from mechatlas.dictionaries.sparsity import ReLU
from mechatlas.files import write_manifest
from mechatlas.maths.named_groups import group
from tests.analysis.symmetry.planted import function_on_cosets
from tests.analysis.symmetry.test_interchange import true_features
from tests.app.worlds import photographs

D4 = group("D4")
SUBGROUPS = [frozenset({0}), frozenset({0, 2}), frozenset({0, 4}), frozenset(range(4)),
             frozenset(range(8))]  # fmt: skip
D = 36


def features(seed=0):
    """Blocks of every pose of one family for each of five stabilizers, and what is true of them."""
    random = np.random.default_rng(seed)
    blocks, stabilizers, families = [], [], []
    for number, subgroup in enumerate(SUBGROUPS):
        template = function_on_cosets(D4, subgroup, D, random)
        for coset in D4.left_cosets(subgroup):
            blocks.append(template[D4.table[:, coset[0]]])
            stabilizers.append(D4.conjugate(subgroup, coset[0]))
            families.append(number)
    return np.array(blocks, np.float32), stabilizers, np.array(families)


def write_store(root: Path, *, images=60, crops=2, each=40, noise=0.5, mixed=False):
    """Rows of sparse codes times blocks, with noise; `mixed` breaks the pairing of poses."""
    random = np.random.default_rng(1)
    blocks, _, _ = features()
    n = images * crops * each
    codes = random.exponential(size=(n, len(blocks))) * (random.random((n, len(blocks))) < 0.15)
    rows = np.einsum("ni,igk->ngk", codes, blocks)
    if mixed:
        for g in range(1, 8):
            rows[:, g] = rows[random.permutation(n), g]
    # The untransformed block is what the dictionaries read: it has no noise.
    rows[:, 1:] += noise * random.standard_normal((n, 7, D))
    sample = np.repeat(np.arange(images * crops), each)
    where = np.stack([sample, random.integers(0, 9, n), random.integers(0, 9, n)], axis=1)
    held = sample >= (images - 6) * crops
    root.mkdir(parents=True, exist_ok=True)
    shards = []
    splits: list[tuple[Split, np.ndarray]] = [("train", ~held), ("held", held)]
    for split, chosen in splits:
        order = random.permutation(np.flatnonzero(chosen))
        for number, part in enumerate(np.array_split(order, 3)):
            x = torch.from_numpy(rows[part].reshape(len(part), -1)).float()
            place = torch.from_numpy(where[part]).int()
            shards.append(write_shard(root, "layer", split, number, x, place))
    g = D4
    manifest = {
        "schema": SCHEMA,
        "kind": "store",
        "complete": True,
        "recipe": {"samples": {"type": "Images", "source": "none", "crops": crops}},
        "settings": {"paired": True, "dtype": "float32"},
        "n_samples": images,
        "network": "0",
        "sites": {"layer": {"width": 8 * D, "grid": [9, 9], "branches": {"part": [0, 20]}}},
        "shards": [list(shard) for shard in shards],
        "group": {
            "name": g.name,
            "table": g.table.tolist(),
            "elements": list(g.element_names),
            "action": "rotate",
        },
        "skipped": [],
    }
    write_manifest(root / "manifest.json", manifest)
    return root


def plain_dictionary():
    """Reads the codes exactly out of the untransformed block."""
    blocks, _, _ = features()
    made = Autoencoder(d_in=D, n_latents=len(blocks), sparsity=ReLU())
    with torch.no_grad():
        made.W_dec.copy_(torch.from_numpy(blocks[:, 0]))
        made._W_enc.copy_(torch.linalg.pinv(torch.from_numpy(blocks[:, 0])))
    return made


def group_crosscoder(blocks=None, *, zeroed=(), decoupled=()):
    """Reads the same, and writes all blocks.

    Of pairs of a feature and an element, the block is zero; if decoupled, further latents with the
    same code write it.
    """
    blocks = features()[0] if blocks is None else blocks.astype(np.float32)
    d = int(blocks.shape[2])
    encoder = np.linalg.pinv(blocks[:, 0])
    further = np.zeros((len(decoupled), 8, d), np.float32)
    for own, (feature, g) in zip(further, decoupled, strict=True):
        own[g] = blocks[feature, g]
        encoder = np.hstack([encoder, encoder[:, [feature]]])
    for feature, g in (*zeroed, *decoupled):
        blocks[feature, g] = 0
    blocks = np.concatenate([blocks, further])
    made = Crosscoder(
        widths=dict.fromkeys(D4.element_names, d), n_latents=len(blocks), sparsity=ReLU(),
        reads="e",
    )  # fmt: skip
    with torch.no_grad():
        made.W_dec.copy_(torch.from_numpy(blocks.reshape(len(blocks), -1)))
        made._W_enc.copy_(torch.from_numpy(encoder))
    return made


def turning_world(root: Path, name="D4", *, side=11, per_sample=20):
    """Store of a network that sees every pose alike, its features, and their stabilizers."""
    execute(
        CollectConfig(
            network=Network(name="tests.networks:turning"),
            sites=("seen",),
            samples=Images(source=str(photographs(root / "photos.zip")), side=side, crops=4),
            storage=StoreConfig(
                positions=Positions(rule="random", per_sample=per_sample),
                held_out=0.3,
                batch_size=32,
            ),
            group=PoseConfig(name=name),
            out=root / "store",
        )
    )
    blocks, stabilizers = true_features()
    made = Autoencoder(d_in=40, n_latents=len(blocks), sparsity=ReLU())
    with torch.no_grad():
        made.W_dec.copy_(torch.from_numpy(blocks[:, 0]))
        made._W_enc.copy_(torch.linalg.pinv(torch.from_numpy(blocks[:, 0])))
    save(made, root / "plain")
    return blocks, stabilizers
