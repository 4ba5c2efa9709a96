"""The axis algebra against brute force: every position of every tensor carried along as a label."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightslim.graph.axes import Axis, count, freeze, leaves, mask, product, total, unify, units
from lightslim.graph.rules import regroup


def kept_of(axis: Axis, masks: dict[Axis, torch.Tensor]) -> list[bool]:
    return mask(axis, masks).tolist()


def test_a_leaf_takes_the_structure_of_what_it_meets():
    flat, a, b = Axis(12), Axis(3), Axis(4)
    unify(flat, product((a, b)))
    keep = torch.tensor([True, False, True])
    assert kept_of(flat, {a: keep}) == keep.repeat_interleave(4).tolist()
    assert units(flat, b).tolist() == [0, 1, 2, 3] * 3


def test_products_refine_to_common_factors():
    a, b = product((Axis(4), Axis(6))), product((Axis(8), Axis(3)))
    unify(a, b)
    assert [leaf.size for leaf in leaves(a)] == [leaf.size for leaf in leaves(b)] == [4, 2, 3]
    assert leaves(a) == leaves(b)


def test_sums_refine_to_common_boundaries():
    a, b = total((Axis(4), Axis(6))), total((Axis(6), Axis(4)))
    unify(a, b)
    assert [leaf.size for leaf in leaves(a)] == [4, 2, 4]
    assert leaves(a) == leaves(b)


def test_equal_chunks_that_meet_a_product_lose_the_same_units():
    chunks = [Axis(5), Axis(5), Axis(5)]
    unify(total(chunks), product((Axis(3, "three of them"), Axis(5))))
    assert leaves(chunks[0]) == leaves(chunks[1]) == leaves(chunks[2])
    assert leaves(chunks[0])[0].frozen is None


def test_what_cannot_be_refined_is_frozen_with_the_reason():
    a, b = product((Axis(4), Axis(6))), product((Axis(3), Axis(8)))
    unify(a, b)
    assert all("no common factors" in leaf.frozen for leaf in leaves(a) + leaves(b))


def test_frozen_travels_through_every_later_union():
    leaf, whole = Axis(6, "an input"), total((Axis(2), Axis(4)))
    unify(leaf, whole)
    assert {part.frozen for part in leaves(whole)} == {"an input"}
    halves = product((Axis(2), Axis(2)))
    unify(leaves(whole)[1], halves)
    assert {part.frozen for part in leaves(halves)} == {"an input"}


def test_splitting_a_sum_again_at_its_own_boundary_is_no_conflict():
    whole = Axis(12)
    unify(whole, product((Axis(3), Axis(4))))
    unify(whole, total((Axis(4), Axis(8))))
    unify(whole, total((Axis(4), Axis(4), Axis(4))))
    assert not any(leaf.frozen for leaf in leaves(whole))
    assert sum(leaf.size for leaf in leaves(whole) if leaf.size > 1) >= 4


@given(st.data())
def test_reshaping_back_and_forth_agrees_with_labels(data):
    """However a shape is regrouped, removing units of a leaf removes the same elements from both views."""
    factors = data.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=5))
    size = math.prod(factors)
    axes = [Axis(f) for f in factors]
    divisors = st.sampled_from([d for d in range(1, size + 1) if size % d == 0])
    rows = data.draw(divisors)
    new = regroup(axes, (rows, size // rows))
    free = [leaf for leaf in dict.fromkeys(leaf for axis in [*axes, *new] for leaf in leaves(axis)) if leaf.size > 1]
    if not free:
        return
    leaf = data.draw(st.sampled_from(free))
    if leaf.frozen:
        return
    keep = torch.arange(leaf.size) % 2 == 0
    before = torch.ones(1, dtype=torch.bool)
    for axis in axes:
        before = (before[:, None] & mask(axis, {leaf: keep})).flatten()
    after = torch.ones(1, dtype=torch.bool)
    for axis in new:
        after = (after[:, None] & mask(axis, {leaf: keep})).flatten()
    assert before.tolist() == after.tolist()
    assert count(product(axes), {leaf: int(keep.sum())}) == int(before.sum())


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_unified_sums_always_have_one_mask(left, right):
    size = max(sum(left), sum(right))
    left.append(size - sum(left))
    right.append(size - sum(right))
    a, b = total(Axis(s) for s in left), total(Axis(s) for s in right)
    unify(a, b)
    for leaf in leaves(a):
        keep = {leaf: torch.arange(leaf.size) % 2 == 0}
        assert kept_of(a, keep) == kept_of(b, keep)


def test_freeze_keeps_the_first_reason():
    axis = Axis(3)
    freeze(axis, "first")
    freeze(axis, "second")
    assert axis.frozen == "first"
