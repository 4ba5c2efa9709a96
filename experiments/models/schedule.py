"""A learning rate that leaves room to learn after a cut."""

import math
from collections.abc import Callable, Sequence


def cosine_cycles(
    steps: int, starts: Sequence[int] = (), warmup: float = 0.1, later: float = 1.0
) -> Callable[[int], float]:
    """What to multiply the learning rate with at each step: cosines towards zero, one from each of ``starts`` on.

    A single cycle over the whole run would have the cut meet a base that is half trained, or a rate too small to heal
    it. One cycle for each phase trains the base to its end and then gives the smaller network a whole cycle of its own.

    Args:
        steps: of the whole run.
        starts: steps at which a new cycle begins, each between 0 and ``steps``.
        warmup: share of each cycle in which the rate grows from near zero.
        later: how high the cycles after the first one rise.

    Example:
        >>> factor = cosine_cycles(steps=100, starts=[50])
        >>> [round(factor(step), 2) for step in (0, 4, 27, 49, 54, 99)]
        [0.2, 1.0, 0.5, 0.0, 1.0, 0.0]
    """
    bounds = [0, *sorted(start for start in starts if 0 < start < steps), steps]

    def factor(step: int) -> float:
        begin = max((bound for bound in bounds[:-1] if bound <= step), default=0)
        length = bounds[bounds.index(begin) + 1] - begin
        rising, peak = max(1.0, warmup * length), 1.0 if begin == 0 else later
        done = step - begin + 1
        if done <= rising:
            return peak * done / rising
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - rising) / (length + 1 - rising))))

    return factor
