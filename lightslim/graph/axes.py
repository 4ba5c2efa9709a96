"""The algebra of tensor dimensions: which of them are one and the same thing.

An :class:`Axis` is a dimension of some tensor. It is a *leaf* of ``size`` units, a *product* of axes (what ``view``
makes of several dimensions, row-major) or a *sum* of axes (what ``cat`` makes). :func:`unify` states that two axes
always have the same units in the same order; composite axes are cut at their common boundaries until leaf meets leaf.
What cannot be brought together is frozen, with the reason. Leaves that stay unfrozen can lose units.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

LEAF, PRODUCT, SUM = "leaf", "product", "sum"


class Axis:
    """One dimension; a node of a union-find whose root says what the dimension is made of.

    Args:
        size: how many positions it has.
        frozen: why no position may be removed; None when one may.
    """

    __slots__ = ("frozen", "kind", "link", "parts", "size")

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.kind = LEAF
        self.parts: tuple[Axis, ...] = ()
        self.link: Axis | None = None

    def __repr__(self) -> str:
        root = find(self)
        if root.kind == LEAF:
            return f"{root.size}" + ("!" if root.frozen else "")
        return "(" + {PRODUCT: "*", SUM: "+"}[root.kind].join(map(repr, root.parts)) + ")"


def find(axis: Axis) -> Axis:
    """The representative of everything that ``axis`` is equal to."""
    root = axis
    while root.link is not None:
        root = root.link
    while axis.link is not None:
        axis.link, axis = root, axis.link
    return root


def product(parts: Iterable[Axis]) -> Axis:
    """The axis that runs over all combinations of ``parts``, the last one fastest."""
    return _compose(PRODUCT, [part for part in parts if part.size != 1], math.prod, 1)


def total(parts: Iterable[Axis]) -> Axis:
    """The axis that runs over ``parts`` one after the other."""
    return _compose(SUM, [part for part in parts if part.size != 0], sum, 0)


def _compose(kind: str, parts: list[Axis], size: Callable[[Iterable[int]], int], empty: int) -> Axis:
    if len(parts) == 1:
        return parts[0]
    axis = Axis(size(part.size for part in parts) if parts else empty)
    if parts:
        axis.kind, axis.parts = kind, tuple(parts)
    return axis


def leaves(axis: Axis) -> list[Axis]:
    """The leaves that ``axis`` is made of, in order, each as its root."""
    root = find(axis)
    return [root] if root.kind == LEAF else [leaf for part in root.parts for leaf in leaves(part)]


def factors(axis: Axis) -> list[tuple[Axis, ...]]:
    """The factors of every product in ``axis``."""
    root = find(axis)
    inner = [product_ for part in root.parts for product_ in factors(part)]
    return [root.parts, *inner] if root.kind == PRODUCT else inner


def freeze(axis: Axis, reason: str) -> None:
    """Forbid the removal of any unit of ``axis``; the first reason given stays."""
    for leaf in leaves(axis):
        leaf.frozen = leaf.frozen or reason


def unify(a: Axis, b: Axis) -> None:
    """State that ``a`` and ``b`` have the same units in the same order."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        _freeze_both(a, b, f"sizes {a.size} and {b.size} meet")
    elif a.kind == LEAF:
        _become(a, b)
    elif b.kind == LEAF:
        _become(b, a)
    elif a.kind == b.kind == SUM:
        _align_terms(a, b)
    else:
        _align_factors(a, b)


def _become(leaf: Axis, other: Axis) -> None:
    leaf.link = other
    if leaf.frozen:
        freeze(other, leaf.frozen)


def _freeze_both(a: Axis, b: Axis, reason: str) -> None:
    freeze(a, reason)
    freeze(b, reason)


def _pop(stack: list[Axis], kind: str) -> Axis:
    """Take the innermost factor (or the first term) off the stack; any part may have become composite by now."""
    axis = find(stack.pop())
    while axis.kind == kind:
        stack.extend(axis.parts if kind == PRODUCT else axis.parts[::-1])
        axis = find(stack.pop())
    return axis


def _align_factors(a: Axis, b: Axis) -> None:
    """Match two products from the innermost factor outwards, opening whichever factor is the larger."""
    left, right = [a], [b]
    while left and right:
        x, y = _pop(left, PRODUCT), _pop(right, PRODUCT)
        if x.size < y.size:
            left, right, x, y = right, left, y, x
        if x.size != y.size:
            outer = _open(x, y.size)
            if outer is None:
                return _freeze_both(a, b, f"no common factors of {a!r} and {b!r}")
            left.append(outer)
            x = find(x).parts[-1]
        unify(x, y)
    return None


def _open(axis: Axis, inner: int) -> Axis | None:
    """Turn ``axis`` into a product whose last factor has size ``inner``; the other factor, or None if it cannot be."""
    axis = find(axis)
    if axis.kind == SUM and all(term.size % inner == 0 for term in axis.parts):
        return _open_sum(axis, inner)
    if axis.kind != LEAF or axis.size % inner:
        return None
    parts = (Axis(axis.size // inner), Axis(inner))
    _become(axis, _product_of_two(*parts))
    return parts[0]


def _open_sum(axis: Axis, inner: int) -> Axis:
    """A sum of terms that are all multiples of ``inner`` is a sum times ``inner``: chunks of equal size go together."""
    shared, counts = Axis(inner), [Axis(term.size // inner) for term in axis.parts]
    terms = axis.parts
    outer = total(counts)
    axis.kind, axis.parts = PRODUCT, (outer, shared)
    for term, count in zip(terms, counts, strict=True):
        unify(term, product((count, shared)))
    return outer


def _product_of_two(outer: Axis, inner: Axis) -> Axis:
    whole = Axis(outer.size * inner.size)
    whole.kind, whole.parts = PRODUCT, (outer, inner)
    return whole


def _align_terms(a: Axis, b: Axis) -> None:
    """Match two sums from the first term on, splitting whichever term is the larger."""
    left, right = [a], [b]
    while left and right:
        x, y = _pop(left, SUM), _pop(right, SUM)
        if x.size < y.size:
            left, right, x, y = right, left, y, x
        if x.size != y.size:
            split = _split(x, y.size)
            if split is None:
                return _freeze_both(a, b, f"no common boundaries of {a!r} and {b!r}")
            x, rest = split
            left.append(rest)
        unify(x, y)
    return None


def _split(axis: Axis, at: int) -> tuple[Axis, Axis] | None:
    """The first ``at`` positions of ``axis`` and the rest, opening a leaf for it; None if a factor is in the way."""
    axis = find(axis)
    if at in (0, axis.size):
        return (Axis(0), axis) if at == 0 else (axis, Axis(0))
    if axis.kind == LEAF:
        halves = Axis(at), Axis(axis.size - at)
        _become(axis, total(halves))
        return halves
    return _split_product(axis, at) if axis.kind == PRODUCT else _split_sum(axis, at)


def _split_product(axis: Axis, at: int) -> tuple[Axis, Axis] | None:
    outer, *inner = axis.parts
    stride = axis.size // outer.size
    halves = None if at % stride else _split(outer, at // stride)
    return halves and (product((halves[0], *inner)), product((halves[1], *inner)))


def _split_sum(axis: Axis, at: int) -> tuple[Axis, Axis] | None:
    before: list[Axis] = []
    after = list(axis.parts)
    while after and after[0].size <= at:
        at -= after[0].size
        before.append(after.pop(0))
    if at == 0:
        return total(before), total(after)
    halves = _split(after.pop(0), at)
    return halves and (total((*before, halves[0])), total((halves[1], *after)))


def count(axis: Axis, kept: Mapping[Axis, int]) -> int:
    """How many positions of ``axis`` remain when each leaf keeps ``kept[leaf]`` units (all of them if absent)."""
    root = find(axis)
    if root.kind == LEAF:
        return kept.get(root, root.size)
    counts = [count(part, kept) for part in root.parts]
    return math.prod(counts) if root.kind == PRODUCT else sum(counts)


def mask(axis: Axis, kept: Mapping[Axis, Tensor]) -> Tensor:
    """Which positions of ``axis`` remain: bool tensor of its size, from one bool tensor per cut leaf."""
    root = find(axis)
    if root.kind == LEAF:
        return kept[root] if root in kept else torch.ones(root.size, dtype=torch.bool)
    masks = [mask(part, kept) for part in root.parts]
    return torch.cat(masks) if root.kind == SUM else _outer(masks, torch.logical_and)


def units(axis: Axis, leaf: Axis) -> Tensor:
    """Which unit of ``leaf`` each position of ``axis`` belongs to: int64 tensor, -1 where to none."""
    root = find(axis)
    if root.kind == LEAF:
        return torch.arange(root.size) if root is find(leaf) else torch.full((root.size,), -1)
    owners = [units(part, leaf) for part in root.parts]
    return torch.cat(owners) if root.kind == SUM else _outer(owners, torch.maximum)


def _outer(tensors: Sequence[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    result = tensors[0]
    for tensor in tensors[1:]:
        result = combine(result[:, None], tensor).flatten()
    return result
