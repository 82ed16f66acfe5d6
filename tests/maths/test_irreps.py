import numpy as np
import pytest
from hypothesis import given, settings

from mechatlas.maths.groups import Group
from mechatlas.maths.irreps import energies, fourier
from mechatlas.maths.named_groups import group
from tests.maths.group_strategies import build, relabelled, seeds, specs

quick = settings(max_examples=25)

# Dimension and type (r, c, q) of the irreps over the reals.
IRREPS = {
    "C1": "1r",
    "C2": "1r 1r",
    "C3": "1r 2c",
    "C12": "1r 1r 2c 2c 2c 2c 2c",
    "C2xC4": "1r 1r 1r 1r 2c 2c",
    "D8": "1r 1r 1r 1r 2r 2r 2r",
    "Q8": "1r 1r 1r 1r 4q",
    "Q12": "1r 1r 2r 2c 4q",
    "A4": "1r 2c 3r",
    "S4": "1r 1r 2r 3r 3r",
    "A5": "1r 3r 3r 4r 5r",
    "S5": "1r 1r 4r 4r 5r 5r 6r",
    "PSL(2,7)": "1r 6r 6c 7r 8r",
    "PSL(2,8)": "1r 7r 7r 7r 7r 8r 9r 9r 9r",
    "Q8xC3": "1r 1r 1r 1r 2c 2c 2c 2c 4c 4q",
    "Q8xQ8": " ".join(["1r"] * 16 + ["4r"] + ["4q"] * 8),
    "Q8xS3": " ".join(["1r"] * 8 + ["2r"] * 4 + ["4q"] * 2 + ["8q"]),
}


@pytest.mark.parametrize("name", IRREPS)
def test_dimensions_and_types_are_the_known_ones(name):
    found = [f"{each.dimension}{each.type[0]}" for each in group(name).irreps()]
    assert " ".join(found) == IRREPS[name]


@quick
@given(specs(64))
def test_matrices_multiply_as_the_group_does(spec):
    each = build(spec)
    for irrep in each.irreps():
        m = irrep.matrices
        products = m[:, None] @ m[None, :]
        error = np.sqrt(np.square(products - m[each.table]).sum(axis=(2, 3))).max()
        assert error <= irrep.error + 1e-14
        assert irrep.error < 1e-10
        unit = np.broadcast_to(np.eye(irrep.dimension), m.shape)
        np.testing.assert_allclose(m @ m.transpose(0, 2, 1), unit, atol=1e-11)
        np.testing.assert_allclose(m[each.identity], unit[0], atol=1e-15)
        np.testing.assert_allclose(np.trace(m, axis1=1, axis2=2), irrep.character, atol=1e-10)


@pytest.mark.parametrize("name", ["S5", "D59", "C113", "PSL(2,7)", "Q8xC15"])
def test_matrices_multiply_as_larger_groups_do(name):
    each = group(name)
    for irrep in each.irreps():
        m = irrep.matrices
        for x in range(0, each.order, 7):
            assert np.abs(m[x] @ m - m[each.table[x]]).max() < 1e-10
        assert irrep.error < 1e-11


@quick
@given(specs(48))
def test_matrix_elements_are_orthogonal_as_schur_says(spec):
    each = build(spec)
    irreps = each.irreps()
    for i, one in enumerate(irreps):
        flat = one.matrices.reshape(each.order, -1)
        for other in irreps[:i]:
            assert np.abs(flat.T @ other.matrices.reshape(each.order, -1)).max() < 1e-9
        # The average of rho x rho projects onto the matrices that commute with rho; their
        # space has the dimension of the type.
        mean = flat.T @ flat / each.order
        d, c = one.dimension, one.commutant
        singular = np.linalg.svd(mean, compute_uv=False)
        expected = np.r_[np.full(d * d // c, c / d), np.zeros(d * d - d * d // c)]
        np.testing.assert_allclose(singular, expected, atol=1e-10)
        assert np.square(one.character).mean() == pytest.approx(c)


@quick
@given(specs(120))
def test_multiplicities_add_up_to_the_regular_representation(spec):
    each = build(spec)
    irreps = each.irreps()
    assert sum(i.dimension**2 // i.commutant for i in irreps) == each.order
    regular = sum(i.multiplicity * i.character for i in irreps)
    delta = each.order * (np.arange(each.order) == each.identity)
    np.testing.assert_allclose(regular, delta, atol=1e-9)
    assert len({i.name for i in irreps}) == len(irreps)
    assert (irreps[0].character == 1).all()
    ranks = [(i.dimension, ("real", "complex", "quaternionic").index(i.type)) for i in irreps]
    assert ranks == sorted(ranks)


@quick
@given(specs(48), seeds)
def test_irreps_do_not_depend_on_labels(spec, seed):
    original, renamed, label = relabelled(spec, seed)

    def summary(each: Group, order: np.ndarray) -> list[tuple[str, tuple[float, ...]]]:
        rounded = [(i.type, tuple(np.round(i.character[order], 8) + 0)) for i in each.irreps()]
        return sorted(rounded)

    assert summary(renamed, label) == summary(original, np.arange(original.order))


@pytest.mark.parametrize("name", ["S4", "Q8xC3", "D5"])
def test_irreps_are_the_same_bytes_each_time(name):
    table = group(name).table
    one, other = Group(table).irreps(), Group(table).irreps()
    assert [i.matrices.tobytes() for i in one] == [i.matrices.tobytes() for i in other]
    assert [i.name for i in one] == [i.name for i in other]
    assert not one[0].matrices.flags.writeable


def inverse_fourier(transform, irreps):
    """Function with a Fourier transform; of some irreps only, its part that belongs to them."""
    parts = [
        np.tensordot(each, irrep.matrices, axes=((-2, -1), (1, 2))) * irrep.multiplicity
        for each, irrep in zip(transform, irreps, strict=True)
    ]
    return np.sum(parts, axis=0) / len(irreps[0].character)


@quick
@given(specs(120), seeds)
def test_the_fourier_transform_can_be_undone_and_keeps_norms(spec, seed):
    each, rng = build(spec), np.random.default_rng(seed)
    irreps = each.irreps()
    f = rng.normal(size=(2, 3, each.order))
    transform = fourier(f, irreps)
    assert [t.shape for t in transform] == [(2, 3, i.dimension, i.dimension) for i in irreps]
    np.testing.assert_allclose(inverse_fourier(transform, irreps), f, atol=1e-9)
    norms = energies(f, irreps)
    assert norms.shape == (2, 3, len(irreps))
    np.testing.assert_allclose(norms.sum(axis=-1), np.square(f).sum(axis=-1), rtol=1e-9)


@quick
@given(specs(60), seeds)
def test_convolutions_become_products(spec, seed):
    each, rng = build(spec), np.random.default_rng(seed)
    f, h = rng.normal(size=(2, each.order))
    convolved = np.zeros(each.order)
    for y in range(each.order):
        convolved[each.table[y]] += f[y] * h
    irreps = each.irreps()
    transforms = zip(*(fourier(x, irreps) for x in (convolved, f, h)), strict=True)
    for product, left, right in transforms:
        np.testing.assert_allclose(product, left @ right, atol=1e-8)


def isotypic_part(f, irrep):
    return inverse_fourier(fourier(f, [irrep]), [irrep])


@quick
@given(specs(60), seeds)
def test_isotypic_parts_are_orthogonal_and_move_with_translations(spec, seed):
    each, rng = build(spec), np.random.default_rng(seed)
    irreps = each.irreps()
    f = rng.normal(size=each.order)
    parts = np.array([isotypic_part(f, irrep) for irrep in irreps])
    np.testing.assert_allclose(parts.sum(axis=0), f, atol=1e-9)
    np.testing.assert_allclose(parts @ parts.T, np.diag(energies(f, irreps)), atol=1e-8)
    x = int(rng.integers(each.order))
    for irrep, part in zip(irreps, parts, strict=True):
        np.testing.assert_allclose(isotypic_part(part, irrep), part, atol=1e-9)
        for moved in (each.table[x], each.table[:, x]):
            moved_part = isotypic_part(f[moved], irrep)
            np.testing.assert_allclose(moved_part, part[moved], atol=1e-9)


@pytest.mark.parametrize("name", ["A5", "C113", "D59", "S5", "S6"])
def test_the_tables_of_trained_networks_have_the_irreps_of_their_groups(name, data):
    taken = Group(np.load(data(f"group_nets/{name}_table.npy")))
    expected = [(i.dimension, i.type) for i in group(name).irreps()]
    assert [(i.dimension, i.type) for i in taken.irreps()] == expected
    assert max(i.error for i in taken.irreps()) < 1e-10
