"""Features with known stabilizers, families and poses.

A family is a function on the cosets of a subgroup H with vectors as values: T_g = t[gH], so that
T_gh = T_g just for h in H. Its members are T_gp for elements p.
"""

import dataclasses

import numpy as np

from mechatlas.maths.groups import Group

NOISE = {"low": 0.1, "middle": 0.5, "high": 1.5}
"""Standard deviation of the noise of a half, over that of the blocks."""


@dataclasses.dataclass
class Planted:
    group: Group
    clean: np.ndarray
    stabilizers: list[frozenset[int]]
    families: np.ndarray
    """Decoys have families of their own."""
    poses: np.ndarray
    decoy: np.ndarray

    def measured(self, noise, *, seed=0, uneven=0.0):
        """Blocks and two halves; the noise of features and channels may be uneven."""
        random = np.random.default_rng([seed, 5])
        n, _, d = self.clean.shape
        # Own blocks have mean square 1; what they share is no part of the scale of the noise.
        scale = (noise * np.exp(uneven * random.standard_normal((n, 1, d)))).astype(np.float32)
        noises = [scale * random.standard_normal(self.clean.shape, np.float32) for _ in range(2)]
        halves = np.stack([self.clean + each for each in noises])
        return halves.mean(axis=0), halves


def unit(t):
    return t / np.sqrt(np.square(t).mean())


def function_on_cosets(group, subgroup, d, random):
    cosets = group.left_cosets(subgroup)
    block = np.empty((group.order, d))
    values = random.standard_normal((len(cosets), d))
    for coset, value in zip(cosets, values, strict=True):
        block[coset] = value
    return unit(block)


def plant(
    group,
    subgroups,
    *,
    d=32,
    families_each=2,
    members=6,
    decoys=40,
    overlap=0.0,
    common=0.0,
    near=0.0,
    seed=0,
):
    """Families for each subgroup, and random decoys.

    `overlap` is the cosine between families in the same pose (they share a function on the
    group, with the stabilizer of each), `common` the length of a vector that all blocks share,
    `near` how alike decoys are to themselves shifted by a subgroup.
    """
    random = np.random.default_rng([seed, 3])
    clean, stabilizers, label, poses = [], [], [], []
    shared = unit(random.standard_normal((group.order, d)))
    for subgroup in subgroups:
        for _ in range(families_each):
            own = function_on_cosets(group, subgroup, d, random)
            part = np.mean([shared[group.table[:, h]] for h in sorted(subgroup)], axis=0)
            template = unit(np.sqrt(1 - overlap) * own + np.sqrt(overlap) * unit(part))
            number = len(set(label))
            for pose in random.integers(0, group.order, members):
                clean.append(template[group.table[:, pose]].astype(np.float32))
                back = group.inverses[pose]
                # D_g = T_gp, so s leaves D unchanged just if p^-1 s p leaves T unchanged.
                stabilizers.append(
                    frozenset(int(group.table[group.table[pose, h], back]) for h in subgroup)
                )
                label.append(number)
                poses.append(pose)
    first_decoy = len(clean)
    larger = [each for each in subgroups if len(each) > 1]
    for k in range(decoys):
        decoy = unit(random.standard_normal((group.order, d)))
        if near:
            own = function_on_cosets(group, larger[k % len(larger)], d, random)
            decoy = unit(np.sqrt(near) * own + np.sqrt(1 - near) * decoy)
        clean.append(decoy.astype(np.float32))
        stabilizers.append(frozenset({group.identity}))
        label.append(len(set(label)))
        poses.append(group.identity)
    blocks = np.array(clean, np.float32)
    blocks += (common * unit(random.standard_normal(d))).astype(np.float32)
    order = random.permutation(len(blocks))
    return Planted(
        group,
        blocks[order],
        [stabilizers[i] for i in order],
        np.array(label)[order],
        np.array(poses)[order],
        order >= first_decoy,
    )


def macro_f1(true, predicted):
    scores = []
    for kind in set(true) | set(predicted):
        both = sum(t == kind and s == kind for t, s in zip(true, predicted, strict=True))
        either = sum(t == kind for t in true) + sum(s == kind for s in predicted)
        scores.append(2 * both / either)
    return float(np.mean(scores))


def adjusted_rand(a, b):
    def pairs(x):
        return float((x * (x - 1) / 2).sum())

    _, a = np.unique(a, return_inverse=True)
    _, b = np.unique(b, return_inverse=True)
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    both, first, other = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = first * other / pairs(np.array([len(a)], float))
    highest = (first + other) / 2
    return 1.0 if highest == expected else (both - expected) / (highest - expected)


def score(planted, symmetries):
    group = planted.group
    class_of = group.lattice().class_of
    claimed = symmetries.q_values <= symmetries.fdr
    false = [
        not symmetries.stabilizers[i] <= planted.stabilizers[i] for i in np.flatnonzero(claimed)
    ]
    right = []
    for i in np.flatnonzero(~planted.decoy):
        r = symmetries.references[i]
        if r == i or planted.families[r] != planted.families[i]:
            continue
        # D^r_gh = T_g h p_r must be D^i_g = T_g p_i: h p_r and p_i lie in one coset of Stab(T).
        h = int(group.table[symmetries.poses[i], planted.poses[r]])
        back = int(group.table[group.inverses[planted.poses[i]], h])
        p = planted.poses[i]
        inverse = group.inverses[p]
        stabilizer = {int(group.table[group.table[inverse, s], p]) for s in planted.stabilizers[i]}
        right.append(back in stabilizer)
    return {
        "f1": macro_f1(
            [class_of(s) for s in planted.stabilizers],
            [class_of(s) for s in symmetries.stabilizers],
        ),
        "exact": float(
            np.mean(
                [a == b for a, b in zip(planted.stabilizers, symmetries.stabilizers, strict=True)]
            )
        ),
        "fdr": float(np.mean(false)) if false else 0.0,
        "claimed": int(claimed.sum()),
        "ari": adjusted_rand(planted.families, symmetries.families),
        "poses": float(np.mean(right)) if right else 1.0,
        "posed": len(right),
        "reliable": float(symmetries.reliable.mean()),
    }
