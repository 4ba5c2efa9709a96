"""The one error a user can cause, and the help it gives."""

import difflib
from collections.abc import Iterable


class CompressionError(ValueError):
    """A request that cannot be carried out: says what was asked, what is possible, and the nearest valid name.

    Raised before training starts. The command line prints it as one line and exits with status 2.

    Example:
        >>> raise CompressionError("target_ratio is 1.5; it must lie between 0 and 1")
        Traceback (most recent call last):
            ...
        lightslim.errors.CompressionError: target_ratio is 1.5; it must lie between 0 and 1
    """


def nearest(name: str, choices: Iterable[str], count: int = 5) -> list[str]:
    """The choices most like ``name``, best first; an empty list when nothing comes close.

    Example:
        >>> nearest("target_ratoi", ["target_ratio", "name"])
        ['target_ratio']
    """
    return difflib.get_close_matches(name, list(choices), n=count, cutoff=0.5)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of an error message: the nearest name, else all the choices.

    Example:
        >>> did_you_mean("l1norm", ["l1_norm", "l2_norm"])
        "did you mean 'l1_norm'?"
        >>> did_you_mean("zzz", ["l1_norm", "l2_norm"])
        'choose from: l1_norm, l2_norm'
    """
    choices = sorted(choices)
    near = nearest(name, choices, count=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"choose from: {', '.join(choices)}" if choices else "there are none"
