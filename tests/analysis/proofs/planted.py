"""Networks with a planted circuit, and the truth about any network by brute force."""

import dataclasses
import functools

import numpy as np
from safetensors.numpy import load_file

from mechatlas.analysis.proofs.prove import AccuracyBound, prove
from mechatlas.analysis.proofs.rho_sets import find_rho_sets
from mechatlas.analysis.proofs.verifier.explanation import Explanation, ProofError
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.analysis.proofs.verifier.verify import verify
from mechatlas.maths.groups import Group
from mechatlas.maths.named_groups import group


def planted(of: Group, *, noise: float, seed: int, missing: int = 0) -> Weights:
    """The full grid B x B' of the first irrep that has a small rho-set, and noise."""
    random = np.random.default_rng(seed)
    for irrep in of.irreps():
        if irrep.type != "real" or not 1 < irrep.dimension < 5 or irrep.multiplicity < 2:
            continue
        fixed = [
            np.linalg.eigh(irrep.matrices[g] + irrep.matrices[g].T)[1][:, -1]
            for g in range(of.order)
        ]
        sets = [s for s in find_rho_sets(of, irrep, np.array(fixed)) if len(s.vectors) <= 12]
        if sets and len({m.round(6).tobytes() for m in irrep.matrices}) == of.order:
            break
    else:
        raise ValueError(f"no faithful irrep of {of.name} with a rho-set")
    b = min(sets, key=lambda s: len(s.vectors)).vectors
    a = random.normal(size=b.shape[1])
    left = np.einsum("pd,xde,e->xp", b, irrep.matrices, a)
    right = -np.einsum("d,yde,pe->yp", a, irrep.matrices, b)
    both = np.einsum("pd,zde,qe->pqz", b, irrep.matrices, b)
    k = len(b)
    cells = [(p, q) for p in range(k) for q in range(k)][missing:]
    first, second = (np.array(c) for c in zip(*cells, strict=True))
    arrays = (left[:, first], right[:, second], -20 / k * both[first, second])
    noisy = (w + noise * np.abs(w).max() * random.normal(size=w.shape) for w in arrays)
    return Weights(*(w.astype(np.float32) for w in noisy))


def wide(of: Group, *, noise: float, seed: int, width: int = 128) -> Weights:
    """Full grids of one irrep, each with an a of its own, about `width` neurons together.

    The rho-set is the orbit of a vector that a subgroup of index 3 to 12 fixes.
    """
    random = np.random.default_rng(seed)
    irreps = [r for r in of.irreps() if r.type == "real" and 2 <= r.dimension <= 7]
    while True:
        members = np.array(sorted(of.closure(random.integers(of.order, size=2).tolist())))
        k = of.order // len(members)
        for irrep in irreps:
            fixed = irrep.matrices[members].mean(axis=0)
            if 3 <= k <= 12 and k == irrep.dimension + 1 and round(float(np.trace(fixed))) == 1:
                break
        else:
            continue
        break
    v = fixed @ random.normal(size=len(fixed))
    b = irrep.matrices[of.left_cosets(members.tolist())[:, 0]] @ (v / np.linalg.norm(v))
    copies = max(1, round(width / k**2))
    a = random.normal(size=(copies, irrep.dimension))
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    left = np.einsum("pd,xde,ce->xcp", b, irrep.matrices, a)
    right = -np.einsum("cd,yde,qe->ycq", a, irrep.matrices, b)
    both = np.einsum("pd,zde,qe->pqz", b, irrep.matrices, b)
    n = of.order
    arrays = (
        np.repeat(left[:, :, :, None], k, axis=3).reshape(n, -1),
        np.repeat(right[:, :, None], k, axis=2).reshape(n, -1),
        np.tile(-60 / k / copies * both.reshape(-1, n), (copies, 1)),
    )
    noisy = (w + noise * np.abs(w).max() * random.normal(size=w.shape) for w in arrays)
    return Weights(*(w.astype(np.float32) for w in noisy))


@functools.cache
def proved(name: str, noise: float, seed: int) -> tuple[Group, Weights, AccuracyBound]:
    """A planted network and its bound; made once."""
    of = group(name)
    weights = planted(of, noise=noise, seed=seed)
    return of, weights, prove(*weights, of)


def true_margins(weights: Weights, table: np.ndarray) -> np.ndarray:
    """By definition, in extended precision."""
    left, right, unembed = (w.astype(np.longdouble) for w in weights)
    n = len(table)
    margins = np.empty((n, n), np.longdouble)
    for x in range(n):
        logits = np.maximum(left[x] + right, 0) @ unembed
        mine = logits[np.arange(n), table[x]].copy()
        logits[np.arange(n), table[x]] = -np.inf
        margins[x] = mine - logits.max(axis=1)
    return margins


NETS = [("S4", 0.0, 0), ("S4", 0.02, 1), ("A5", 0.01, 2), ("D5", 0.02, 3), ("S5", 0.002, 4)]


def mutate(e: Explanation, random: np.random.Generator) -> Explanation:
    """Change some part of an explanation, wildly or a little."""
    parts = [e, *e.circuits, *e.grids]
    part = parts[random.integers(len(parts))]
    names = [
        f.name for f in dataclasses.fields(part) if isinstance(getattr(part, f.name), np.ndarray)
    ]
    name = names[random.integers(len(names))]
    array = getattr(part, name).copy()
    kind = random.integers(5)
    if array.size == 0:
        return e
    if array.dtype.kind == "f":
        if kind == 0:
            array *= array.dtype.type(10.0 ** random.integers(-6, 7))
        elif kind == 1:
            array += (random.normal(size=array.shape) * 10.0 ** random.integers(-6, 2)).astype(
                array.dtype
            )
        elif kind == 2:
            array.flat[random.integers(array.size)] = random.choice([np.nan, np.inf, 1e20, -3, 0])
        elif kind == 3:
            array = random.permutation(array)
        else:
            array = -array
    elif kind == 0:
        array.flat[random.integers(array.size)] = (
            random.integers(-3, 30) if array.dtype != bool else True
        )
    elif kind == 1:
        array = random.permutation(array)
    elif kind == 2:
        array = np.roll(array, 1)
    else:
        array = random.permutation(array.ravel()).reshape(array.shape)
    changed = dataclasses.replace(part, **{name: array})
    if part is e:
        return changed
    return dataclasses.replace(
        e,
        circuits=tuple(changed if c is part else c for c in e.circuits),
        grids=tuple(changed if g is part else g for g in e.grids),
    )


def refused_or_true(weights: Weights, of: Group, e: Explanation) -> None:
    """Both verifiers refuse, with the same words, or give bounds that are true."""
    messages = []
    for short in (False, True):
        try:
            verification = verify(*weights, of, e, reference=short)
        except ProofError as error:
            messages.append(str(error))
        else:
            messages.append("")
            assert (verification.margins <= true_margins(weights, of.table)).all()
    assert messages[0] == messages[1]


def load_net(data, name: str) -> tuple[Weights, Group]:
    arrays = load_file(data(f"group_nets/{name}.safetensors"))
    table = np.load(data(f"group_nets/{name.split('_')[0]}_table.npy"))
    return Weights(arrays["left"], arrays["right"], arrays["unembed"]), Group(table)
