"""Rules of the rarer families: shuffles, windows, recurrent layers, weight norm, distances, complex numbers."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightslim.graph.axes import Axis, freeze, product, unify
from lightslim.graph.rules import fixed, unify_all

if TYPE_CHECKING:
    from lightslim.graph.record import Recorder


def pixel_shuffle(book: "Recorder", out: Tensor, self: Tensor, **_: Any) -> None:
    """Channels are output channels x r x r."""
    channels, ratio = Axis(out.shape[-3]), self.shape[-3] // out.shape[-3]
    unify(book[self][-3], product((channels, fixed(ratio, "pixels of a shuffle"))))
    space = [fixed(size, "a spatial dimension") for size in out.shape[-2:]]
    book[out] = [*book[self][:-3], channels, *space]


def pixel_unshuffle(book: "Recorder", out: Tensor, self: Tensor, **_: Any) -> None:
    """The way back: output channels are channels x r x r."""
    ratio = out.shape[-3] // self.shape[-3]
    space = [fixed(size, "a spatial dimension") for size in out.shape[-2:]]
    book[out] = [*book[self][:-3], product((book[self][-3], fixed(ratio, "pixels of a shuffle"))), *space]


def channel_shuffle(book: "Recorder", out: Tensor, self: Tensor, groups: int, **_: Any) -> None:
    """Groups x rest becomes rest x groups."""
    group, rest = fixed(groups, "the number of shuffled groups"), Axis(self.shape[1] // groups)
    unify(book[self][1], product((group, rest)))
    book[out] = [book[self][0], product((rest, group)), *book[self][2:]]


def unfold(book: "Recorder", out: Tensor, self: Tensor, kernel_size: Sequence[int], **_: Any) -> None:
    """``im2col``: channels x kernel positions, by windows."""
    positions = fixed(math.prod(kernel_size), "kernel positions")
    lead = out.ndim - 2
    book[out] = [*book[self][:lead], product((book[self][lead], positions)), fixed(out.shape[-1], "windows")]


def recurrent(
    book: "Recorder", out: Any, input: Tensor, weight0: Tensor, weight1: Tensor, hx_: Tensor, cx_: Tensor, **rest: Any
) -> None:
    """One layer of an LSTM or GRU: every gate has the same hidden units, which the layer reads again."""
    hidden = Axis(weight1.shape[1])
    gates = product((fixed(weight1.shape[0] // hidden.size, "the gates of a recurrent layer"), hidden))
    for tensor in (weight0, weight1, rest["weight2"], rest["weight3"]):
        if tensor.ndim and tensor.shape[0] == gates.size:
            unify(book[tensor][0], gates)
    unify_all([(book[weight1][1], hidden), (book[input][-1], book[weight0][1])])
    unify_all((book[state][-1], hidden) for state in (hx_, cx_) if state.ndim and state.shape[-1] == hidden.size)
    book.contract(weight0, book[weight0][1])
    book.contract(weight1, hidden)
    book[out[0]] = [*book[input][:-1], hidden]
    for state, before in zip(out[1:3], (hx_, cx_), strict=True):
        if state.shape == before.shape:
            book[state] = book[before]


def weight_norm(book: "Recorder", out: Any, v: Tensor, g: Tensor, **_: Any) -> None:
    """A weight and the norms of its slices; units that are gone count in a norm as zeros do."""
    unify_all((a, b) for a, b in zip(book[g], book[v], strict=True) if a.size == b.size)
    book[out[0]] = book[v]
    book[out[1]] = book[g]


def embedding_bag(book: "Recorder", out: Any, weight: Tensor, **_: Any) -> None:
    """Rows are chosen by number and summed by bag; the width is an axis."""
    freeze(book[weight][0], "rows read by index")
    book[out[0]] = [fixed(out[0].shape[0], "bags"), book[weight][1]]


def distance(book: "Recorder", out: Tensor, x1: Tensor, x2: Tensor, **_: Any) -> None:
    """Distances between rows: a sum over features."""
    unify(book[x1][-1], book[x2][-1])
    unify_all(zip(book[x1][:-2], book[x2][:-2], strict=False))
    book[out] = [*book[x1][:-1], book[x2][-2]]


def dot(book: "Recorder", out: Tensor, self: Tensor, vec: Tensor | None = None, **rest: Any) -> None:
    """Matrix times vector, vector times vector."""
    other = next(value for value in (vec, *rest.values()) if isinstance(value, Tensor))
    unify(book[self][-1], book[other][0])
    book[out] = book[self][:-1]


def mixed(book: "Recorder", out: Any, func: Any, **arguments: Any) -> None:
    """Ops that combine everything with everything: all that they read stays."""
    for tensor in arguments.values():
        for axis in book[tensor] if isinstance(tensor, Tensor) else ():
            freeze(axis, f"its positions are mixed by {func.overloadpacket.__name__}")


def windows(book: "Recorder", out: Tensor, self: Tensor, dimension: int, **_: Any) -> None:
    """``Tensor.unfold``: one dimension becomes windows and positions in them."""
    d = dimension % self.ndim
    freeze(book[self][d], "cut into windows")
    shape = [axis if i != d else fixed(out.shape[d], "windows") for i, axis in enumerate(book[self])]
    book[out] = [*shape, fixed(out.shape[-1], "positions in a window")]


def fold(book: "Recorder", out: Tensor, self: Tensor, kernel_size: Sequence[int], **_: Any) -> None:
    """``col2im``: channels x kernel positions, by windows, back to images."""
    channels = Axis(out.shape[-3])
    unify(book[self][-2], product((channels, fixed(math.prod(kernel_size), "kernel positions"))))
    book[out] = [*book[self][:-2], channels, *(fixed(size, "a spatial dimension") for size in out.shape[-2:])]


def complex_parts(book: "Recorder", out: Tensor, self: Tensor, **_: Any) -> None:
    """``view_as_real`` adds a last dimension of two, ``view_as_complex`` takes it away."""
    if out.ndim > self.ndim:
        book[out] = [*book[self], fixed(2, "real and imaginary part")]
    else:
        freeze(book[self][-1], "real and imaginary part")
        book[out] = book[self][:-1]
