"""What is known of dimensions: products, sums, and how both are refined."""

import pytest

from compax.analysis.atoms import Atoms, Factors, Tangle, size_of


def sizes(atoms: Atoms, factors: Factors) -> tuple[int, ...]:
    return tuple(atom.size for atom in atoms.expand(factors))


def test_size_one_has_no_factors() -> None:
    assert Atoms().fresh(1) == ()


def test_unifying_refines_wherever_an_atom_occurs() -> None:
    atoms = Atoms()
    model, (heads, size) = atoms.fresh(12), (atoms.fresh(3), atoms.fresh(4))
    kept = model
    atoms.unify(model, (*heads, *size))
    assert atoms.expand(kept) == atoms.expand((*heads, *size))
    assert sizes(atoms, kept) == (3, 4)


def test_a_reshape_splits_at_its_borders() -> None:
    atoms = Atoms()
    left, right = atoms.partition((*atoms.fresh(6), *atoms.fresh(4)), (3, 8))
    assert sizes(atoms, left) == (3,)
    assert sizes(atoms, right) == (2, 4)


def test_what_does_not_line_up_is_a_tangle() -> None:
    atoms = Atoms()
    with pytest.raises(Tangle):
        atoms.partition((*atoms.fresh(6), *atoms.fresh(4)), (4, 6))
    with pytest.raises(Tangle):
        atoms.unify((*atoms.fresh(2), *atoms.fresh(3)), (*atoms.fresh(3), *atoms.fresh(2)))


def test_cuts_make_sums_and_equal_cuts_give_the_same_parts() -> None:
    atoms = Atoms()
    fused = atoms.fresh(9)
    first = atoms.cut(fused, 0, 3)
    assert atoms.expand(first) == atoms.expand(atoms.cut(fused, 0, 3))
    assert sizes(atoms, atoms.cut(fused, 3, 9)) == (6,)
    assert atoms.leaves(fused) == [*atoms.expand(first), *atoms.expand(atoms.cut(fused, 3, 9))]


def test_sums_of_the_same_parts_are_one() -> None:
    atoms = Atoms()
    half = atoms.fresh(4)
    assert atoms.join([half, half]) == atoms.join([half, half])
    one, other = atoms.fresh(8), atoms.fresh(8)
    for whole in (one, other):
        atoms.unify(atoms.cut(whole, 0, 4), half)
        atoms.unify(atoms.cut(whole, 4, 8), half)
    assert atoms.close() == []
    assert atoms.expand(one) == atoms.expand(other)


def test_sums_cut_in_two_ways_are_cut_in_both() -> None:
    atoms = Atoms()
    one, other = atoms.fresh(10), atoms.fresh(10)
    atoms.cut(one, 0, 4)
    atoms.cut(other, 0, 7)
    atoms.unify(one, other)
    assert [size_of(segment) for segment in atoms.expand(one)[0].segments] == [4, 3, 3]


def test_a_sum_of_products_is_a_product_of_a_sum() -> None:
    atoms = Atoms()
    fused = atoms.fresh(20)
    queries = atoms.cut(fused, 0, 12)
    atoms.cut(fused, 12, 20)
    heads, size = atoms.partition(fused, (5, 4))
    assert sizes(atoms, size) == (4,)
    assert [size_of(segment) for segment in atoms.expand(heads)[0].segments] == [3, 2]
    assert sizes(atoms, queries) == (3, 4)


def test_tables_stay_apart() -> None:
    atoms = Atoms()
    table, one, other = atoms.fresh(6, table=True), atoms.fresh(6), atoms.fresh(6)
    atoms.unify(table, one)
    atoms.unify(table, other)
    assert atoms.expand(one) != atoms.expand(other)


def test_freezing_reaches_what_a_dimension_is_made_of() -> None:
    atoms = Atoms()
    fused = atoms.fresh(6)
    part = atoms.cut(fused, 0, 2)
    atoms.freeze(fused, "ordered")
    assert list(part[0].reasons) == ["ordered"]


def test_a_sum_set_beside_itself_shifted_stays_whole_and_fixed() -> None:
    atoms = Atoms()
    whole = atoms.fresh(4097)
    before, after = atoms.cut(whole, 0, 4096), atoms.cut(whole, 1, 4097)
    atoms.unify(before, after)
    (atom,) = atoms.expand(before)
    assert atoms.expand(after) == (atom,)
    assert atom.size == 4096
    assert not atom.segments
    assert "set beside itself, shifted" in atom.reasons
