"""What each family of ATen ops says about axes: one short rule per family; ``table.py`` says which op is of which.

A rule gets the recorder (``book``), the op's output and its arguments under their schema names. ``book[tensor]`` are
the axes of a tensor. A rule assigns the output's axes and unifies what the op ties together.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightslim.graph.axes import Axis, freeze, product, total, unify

if TYPE_CHECKING:
    from lightslim.graph.record import Recorder

Rule = Callable[..., None]
KERNEL = "the extent of a kernel"


def unify_all(pairs: Iterable[tuple[Axis, Axis]]) -> None:
    """Unify the axes of each pair."""
    for a, b in pairs:
        unify(a, b)


def fixed(size: int, reason: str) -> Axis:
    """A new axis that nothing may be removed from."""
    return Axis(size, reason)


def pointwise(book: "Recorder", out: Any, func: Any, **arguments: Any) -> None:
    """Elementwise with broadcasting: dimensions are aligned from the right, those of size 1 stretch."""
    operands = [book[value] for value in _flat(arguments.values()) if isinstance(value, Tensor)]
    book.meet(operands)
    for result in _flat([out]):
        book[result] = _broadcast(operands, result.shape)


def _flat(values: Iterable[Any]) -> list[Any]:
    return [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]


def _broadcast(operands: Iterable[Sequence[Axis]], shape: Sequence[int]) -> list[Axis]:
    result: list[Axis | None] = [None] * len(shape)
    for axes in operands:
        for i, axis in enumerate(axes, start=len(shape) - len(axes)):
            if i >= 0 and axis.size == shape[i]:
                known = result[i]
                result[i] = axis
                if known is not None:
                    unify(known, axis)
    return [axis or Axis(size) for axis, size in zip(result, shape, strict=True)]


def same(book: "Recorder", out: Any, self: Tensor, **_: Any) -> None:
    """Every output has the input's shape, dimension by dimension."""
    for result in _flat([out]):
        if isinstance(result, Tensor) and result.shape == self.shape:
            book[result] = book[self]


def restrided(book: "Recorder", out: Tensor, self: Tensor, size: Sequence[int], **_: Any) -> None:
    """Other strides in memory; where the shape is another too, nothing is known."""
    if list(self.shape) == list(size):
        book[out] = book[self]
    else:
        for axis in book[self]:
            freeze(axis, "its memory is addressed by strides")


def loss(book: "Recorder", out: Tensor, self: Tensor, target: Tensor, **_: Any) -> None:
    """Prediction and target are compared element by element; the result is reduced or not."""
    compared = _broadcast([book[self], book[target]], self.shape)
    if out.shape == self.shape:
        book[out] = compared


def fresh(book: "Recorder", out: Tensor, **_: Any) -> None:
    """A new tensor whose size says nothing yet: what it meets decides, and the trial checks that it follows."""
    book[out] = [Axis(size) for size in out.shape]


def embedding(book: "Recorder", out: Tensor, weight: Tensor, indices: Tensor, **_: Any) -> None:
    """Rows are chosen by number, so they stay; the width is an axis."""
    freeze(book[weight][0], "rows read by index")
    book[out] = [*book[indices], book[weight][1]]


def convolution(
    book: "Recorder",
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
    groups: int = 1,
    **_: Any,
) -> None:
    """Input channels meet the weight's; both sides are groups x rest, and only a depthwise layer can lose groups."""
    first, second = book[weight][:2]
    depthwise = weight.shape[0] == groups if transposed else weight.shape[1] == 1
    group = Axis(groups, None if depthwise or groups == 1 else "the number of convolution groups")
    rest = Axis(
        first.size // groups, "the channel multiplier of a depthwise layer" if depthwise and groups > 1 else None
    )
    unify(first, product((group, rest)))
    if transposed and depthwise and groups > 1:
        freeze(second, "the channel multiplier of a depthwise layer")
    grouped = product((group, second))
    channels_in, channels_out = (first, grouped) if transposed else (grouped, first)
    lead, space = len(out.shape) - len(weight.shape) + 1, out.shape[-len(weight.shape) + 2 :]
    unify(book[input][lead], channels_in)
    if bias is not None:
        unify(book[bias][0], channels_out)
    for extent in book[weight][2:]:
        freeze(extent, KERNEL)
    book.contract(weight, first if transposed else second)
    book.spend((first, second), weight)
    book[out] = [*book[input][:lead], channels_out, *(fixed(size, "a spatial dimension") for size in space)]


def matmul(book: "Recorder", out: Tensor, func: Any, **arguments: Any) -> None:
    """``mm``, ``bmm`` and their adding forms: rows x inner times inner x columns, batch dimensions in front."""
    *bias, a, b = [value for value in arguments.values() if isinstance(value, Tensor)]
    *batch_a, rows, inner = book[a]
    *batch_b, inner_b, columns = book[b]
    unify_all([*zip(batch_a, batch_b, strict=True), (inner, inner_b)])
    book.contract(b, inner)
    book.contract(a, inner)
    book.parallel += batch_a
    book.spend((*batch_a, rows, inner, columns), b if book.origin(b) else a)
    book[out] = _broadcast([(*batch_a, rows, columns), *(book[tensor] for tensor in bias)], out.shape)


def linear(book: "Recorder", out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> None:
    """``F.linear`` where it reaches us whole."""
    unify(book[input][-1], book[weight][1])
    if bias is not None:
        unify(book[bias][0], book[weight][0])
    book.contract(weight, book[weight][1])
    book.spend((*book[input], book[weight][0]), weight)
    book[out] = [*book[input][:-1], book[weight][0]]


def attention(
    book: "Recorder", out: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, **_: Any
) -> None:
    """Scaled dot product: heads go together, grouped ones by group; the width of a head may set the scale."""
    q, k, v = book[query], book[key], book[value]
    if query.ndim > 3 and query.shape[-3] != key.shape[-3]:
        unify(q[-3], product((k[-3], Axis(query.shape[-3] // key.shape[-3]))))
        unify_all([*zip(q[:-3], k[:-3], strict=True), (k[-3], v[-3]), *zip(q[:-3], v[:-3], strict=True)])
    else:
        unify_all([*zip(q[:-2], k[:-2], strict=True), *zip(q[:-2], v[:-2], strict=True)])
    unify_all([(q[-1], k[-1]), (k[-2], v[-2])])
    if scale is None:
        freeze(q[-1], "the width of an attention head, which sets the scale")
    book.parallel += q[:-2]
    book.spend((*q[:-2], q[-2], k[-2]), query)
    book[_flat([out])[0]] = [*q[:-1], v[-1]]


def batch_norm(book: "Recorder", out: Any, input: Tensor, **arguments: Any) -> None:
    """Scale, shift and running statistics lie along the channels."""
    for vector in arguments.values():
        if isinstance(vector, Tensor) and vector.shape == input.shape[1:2]:
            unify(book[vector][0], book[input][1])
    book[_flat([out])[0]] = book[input]


def layer_norm(book: "Recorder", out: Any, input: Tensor, normalized_shape: Sequence[int], **arguments: Any) -> None:
    """Scale and shift lie along the last dimensions."""
    for weight in (arguments.get("weight"), arguments.get("bias")):
        if weight is not None:
            unify_all(zip(book[weight], book[input][-len(normalized_shape) :], strict=True))
    book[_flat([out])[0]] = book[input]


def group_norm(book: "Recorder", out: Any, input: Tensor, group: int, **arguments: Any) -> None:
    """Channels are groups x rest; the groups stay, so every group keeps the same share of its channels."""
    channels = book[input][1]
    if group < channels.size:  # else each channel is a group of its own, which may go
        unify(channels, product((Axis(group, "the number of normalisation groups"), Axis(channels.size // group))))
    for weight in (arguments.get("weight"), arguments.get("bias")):
        if weight is not None:
            unify(book[weight][0], channels)
    book[_flat([out])[0]] = book[input]


def spatial(book: "Recorder", out: Any, func: Any, **arguments: Any) -> None:
    """Pooling, padding and resizing work inside channels: batch and channels pass, the last n dimensions are new."""
    source = next(value for value in arguments.values() if isinstance(value, Tensor))
    found = re.search(r"(\d)d", func.overloadpacket.__name__)
    lead = source.ndim - int(found[1]) if found else 2
    for result in _flat([out]):
        space = [fixed(size, "a spatial dimension") for size in result.shape[lead:]]
        book[result] = [*book[source][:lead], *space]


_SUMS = {"sum", "linalg_vector_norm"}
_MOMENTS = {"mean", "var", "std", "var_mean", "std_mean"}


def reduce(
    book: "Recorder", out: Any, func: Any, self: Tensor, dim: Any = None, keepdim: bool = False, **_: Any
) -> None:
    """Reduced dimensions vanish. A sum or norm stands the loss of units; for others it would change the meaning."""
    name, axes = func.overloadpacket.__name__, book[self]
    whole = dim is None or dim == [] or not self.ndim
    dims = set(range(self.ndim)) if whole else {d % self.ndim for d in _flat([dim])}
    partial = len(dims) < self.ndim and name not in _SUMS
    moment = partial and keepdim and name in _MOMENTS
    for d in dims if partial and not moment else ():
        freeze(axes[d], f"reduced by {name}")
    left = {d: book.statistic(axes[d], f"reduced by {name}") if moment else Axis(1) for d in dims}
    kept = [left.get(d, axis) for d, axis in enumerate(axes) if keepdim or d not in dims]
    for result in _flat([out]):
        if result.ndim == len(kept):
            book[result] = kept


def along(book: "Recorder", out: Any, func: Any, self: Tensor, **arguments: Any) -> None:
    """Ops that mix or reorder the positions of some dimensions (softmax, sort, flip ...): those dimensions stay."""
    dims = next((arguments[name] for name in ("dim", "dims") if arguments.get(name) not in (None, [])), None)
    fixed_dims = set(range(self.ndim)) if dims is None else {d % self.ndim for d in _flat([dims]) if self.ndim}
    for d in fixed_dims:
        freeze(book[self][d], f"its positions are mixed by {func.overloadpacket.__name__}")
    for result in _flat([out]):
        if isinstance(result, Tensor) and result.ndim == self.ndim:
            pairs = zip(book[self], result.shape, strict=True)
            book[result] = [axis if axis.size == size else fixed(size, "chosen positions") for axis, size in pairs]


def indexed(book: "Recorder", out: Any, func: Any, **arguments: Any) -> None:
    """Positions are looked up by number, so all of them stay."""
    for tensor in _flat(arguments.values()):
        if isinstance(tensor, Tensor):
            for axis in book[tensor]:
                freeze(axis, f"read by index ({func.overloadpacket.__name__})")


def index(book: "Recorder", out: Tensor, self: Tensor, indices: Sequence[Tensor | None], **_: Any) -> None:
    """``x[:, i, mask]``: indexed dimensions stay, the others pass; neighbouring indices stay where they are."""
    used = [d for d, chosen in enumerate(indices) if chosen is not None]
    for d in used:
        freeze(book[self][d], "read by index")
    free = [axis for d, axis in enumerate(book[self]) if d not in used]
    lead = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    inserted = out.ndim - len(free)
    chosen_axes = [fixed(size, "chosen positions") for size in out.shape[lead : lead + inserted]]
    axes = [*free[:lead], *chosen_axes, *free[lead:]]
    if [axis.size for axis in axes] == list(out.shape):
        book[out] = axes


def select_dims(book: "Recorder", out: Any, self: Tensor, dim: int, **_: Any) -> None:
    """``select`` and ``unbind`` take single positions of a dimension: it stays, and is gone from the output."""
    freeze(book[self][dim % self.ndim], "single positions are taken")
    for result in _flat([out]):
        book[result] = [axis for d, axis in enumerate(book[self]) if d != dim % self.ndim]


def view(book: "Recorder", out: Tensor, self: Tensor, **_: Any) -> None:
    """Shapes before and after are cut at their common boundaries; each run of dimensions is a product."""
    book[out] = regroup(book[self], out.shape)


def regroup(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    """The axes of a tensor with ``axes`` after it is reshaped to ``shape``."""
    result = [Axis(size) for size in shape]
    if 0 in shape:
        return result
    left = [axis for axis in axes if axis.size != 1][::-1]
    right = [i for i, size in enumerate(shape) if size != 1][::-1]
    while left:
        ins, outs = [left.pop()], [right.pop()]
        while (whole := math.prod(axis.size for axis in ins)) != (made := math.prod(shape[i] for i in outs)):
            if whole < made:
                ins.append(left.pop())
            else:
                outs.append(right.pop())
        if len(outs) == 1:
            result[outs[0]] = product(ins)
        else:
            unify(product(result[i] for i in outs), product(ins))
    return result


def permute(book: "Recorder", out: Tensor, self: Tensor, dims: Sequence[int], **_: Any) -> None:
    """Dimensions in a new order."""
    book[out] = [book[self][d] for d in dims]


def transpose(book: "Recorder", out: Tensor, self: Tensor, dim0: int = 0, dim1: int = -1, **_: Any) -> None:
    """Two dimensions swapped."""
    axes = list(book[self])
    if axes:
        axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    book[out] = axes


def squeeze(book: "Recorder", out: Tensor, self: Tensor, **_: Any) -> None:
    """Dimensions of size 1 come and go; the others keep their order."""
    real = iter([axis for axis in book[self] if axis.size != 1])
    book[out] = [Axis(1) if size == 1 else next(real) for size in out.shape]


def expand(book: "Recorder", out: Tensor, self: Tensor, **_: Any) -> None:
    """Dimensions of size 1 stretch to any size."""
    book[out] = _broadcast([book[self]], out.shape)


def repeat(book: "Recorder", out: Tensor, self: Tensor, repeats: Sequence[int], **_: Any) -> None:
    """Each dimension is tiled: repeats x itself."""
    axes = [*(Axis(1) for _ in range(len(repeats) - self.ndim)), *book[self]]
    book[out] = [product((fixed(n, "a repeat count"), axis)) for n, axis in zip(repeats, axes, strict=True)]


def cat(book: "Recorder", out: Tensor, tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> None:
    """The joined dimension is a sum, the others are shared."""
    real = [book[tensor] for tensor in tensors if tensor.ndim == out.ndim]
    d = dim % out.ndim
    for axes in real[1:]:
        unify_all((a, b) for i, (a, b) in enumerate(zip(axes, real[0], strict=True)) if i != d)
    joined = total(axes[d] for axes in real)
    book[out] = [joined if i == d else axis for i, axis in enumerate(real[0])]


def stack(book: "Recorder", out: Tensor, tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> None:
    """A new fixed dimension, the others are shared."""
    shared = [book[tensor] for tensor in tensors]
    for axes in shared[1:]:
        unify_all(zip(axes, shared[0], strict=True))
    axes = list(shared[0])
    axes.insert(dim % out.ndim, fixed(len(tensors), "a stack"))
    book[out] = axes


def split(book: "Recorder", out: Sequence[Tensor], self: Tensor, dim: int = 0, **_: Any) -> None:
    """The split dimension is a sum of the parts; equal parts lose the same units, so that they stay equal."""
    d = dim % self.ndim
    parts = [Axis(part.shape[d]) for part in out]
    unify(total(parts), book[self][d])
    if len({part.size for part in parts}) == 1:
        for part in parts[1:]:
            unify(part, parts[0])
    for part, result in zip(parts, out, strict=True):
        book[result] = [part if i == d else axis for i, axis in enumerate(book[self])]


def glu(book: "Recorder", out: Tensor, self: Tensor, dim: int = -1, **_: Any) -> None:
    """The first half gates the second: both lose the same units."""
    d = dim % self.ndim
    half = Axis(out.shape[d])
    unify(total((half, half)), book[self][d])
    book[out] = [half if i == d else axis for i, axis in enumerate(book[self])]


def slice_(
    book: "Recorder", out: Tensor, self: Tensor, dim: int = 0, start: int | None = None, step: int = 1, **_: Any
) -> None:
    """A contiguous piece of a dimension is a term of a sum; a stride takes single positions."""
    d, axes = dim % self.ndim, list(book[self])
    size, piece = axes[d].size, out.shape[d]
    if piece != size and step == 1:
        first = min(max(start + size if (start or 0) < 0 else start or 0, 0), size)  # type: ignore[operator]
        parts = [Axis(first), Axis(piece), Axis(size - first - piece)]
        unify(total(parts), axes[d])
        axes[d] = parts[1]
    elif piece != size:
        freeze(axes[d], "single positions are taken")
        axes[d] = fixed(piece, "single positions")
    book[out] = axes


def pad(book: "Recorder", out: Tensor, self: Tensor, pad: Sequence[int], **_: Any) -> None:
    """Fixed positions before and after; a negative pad takes positions away by number."""
    axes = list(book[self])
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        d = self.ndim - 1 - i
        if min(before, after) < 0:
            freeze(axes[d], "cropped")
            axes[d] = fixed(out.shape[d], "cropped")
        else:
            axes[d] = total([fixed(before, "padding"), axes[d], fixed(after, "padding")])
    book[out] = axes
