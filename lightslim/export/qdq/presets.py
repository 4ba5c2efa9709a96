"""What the targets of an integer file want: one set of codes, several spellings."""

from dataclasses import dataclass

from lightslim.errors import CompressionError, did_you_mean


@dataclass(frozen=True)
class Encoding:
    """What a target wants.

    Attributes:
        signed: inputs are int8, else uint8.
        moves_zero: an input's zero may have any code; needed for affine ranges.
        clips: how codes that the type has and the grid has not are kept out: on the ``codes``, on the ``values`` before
            they are rounded, or None for not at all (one code too many, below the range).
        weights: ``int8``, or ``fitting`` for uint8 where int8 would overflow on CPUs that add pairs of products in 16
            bits.
        integer_bias: biases are int32 where that lets the whole layer be one integer operation.
    """

    signed: bool
    moves_zero: bool
    clips: str | None
    weights: str
    integer_bias: bool


PRESETS = {
    "exact": Encoding(signed=False, moves_zero=True, clips="codes", weights="fitting", integer_bias=True),
    "x86": Encoding(signed=False, moves_zero=True, clips="codes", weights="int8", integer_bias=True),
    "openvino": Encoding(signed=False, moves_zero=True, clips="values", weights="int8", integer_bias=False),
    "tensorrt": Encoding(signed=True, moves_zero=False, clips=None, weights="int8", integer_bias=False),
    "xnnpack": Encoding(signed=True, moves_zero=True, clips=None, weights="int8", integer_bias=True),
}


def encoding_for(deploy: str) -> Encoding:
    """The encoding of a preset.

    Raises:
        CompressionError: there is no such preset.
    """
    if deploy not in PRESETS:
        raise CompressionError(f"deploy is {deploy!r}; {did_you_mean(str(deploy), PRESETS)}")
    return PRESETS[deploy]
