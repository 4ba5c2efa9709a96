"""What the targets of an integer file want: one set of codes, several spellings."""

from dataclasses import dataclass

from lightslim.errors import CompressionError, did_you_mean


@dataclass(frozen=True)
class Encoding:
    """What a target wants.

    Attributes:
        signed: inputs are int8, else uint8.
        moves_zero: an input's zero may have any code; needed for affine ranges.
        clips: where codes that the type has and the grid has not are kept out: among the ``codes``, among the
            ``values`` before they are rounded, or None for not at all where it is one code below the range.
        rounds_bias: a bias may be counted in steps of its layer, if that lets the layer be one integer operation.
        overflows: a layer may be one integer operation even if 16 bits do not hold the sum of two of its products.
        vnni: the target adds them in 32 bits only with VNNI; else in 16, and without a word if they are more.
        folds: a layer that cannot be one integer operation gets its weight by operations that are worked out once, when
            the file is loaded: ONNX Runtime decodes a DequantizeLinear at each run and packs the weight at each run.
    """

    signed: bool = False
    moves_zero: bool = True
    clips: str | None = "codes"
    rounds_bias: bool = False
    overflows: bool = False
    vnni: bool = False
    folds: bool = False


PRESETS = {
    "exact": Encoding(folds=True),
    "x86": Encoding(rounds_bias=True, overflows=True, vnni=True, folds=True),
    "openvino": Encoding(clips="values", overflows=True, vnni=True),
    "tensorrt": Encoding(signed=True, moves_zero=False, clips=None, overflows=True),
    "xnnpack": Encoding(signed=True, clips=None, rounds_bias=True, overflows=True),
}


def encoding_for(deploy: str) -> Encoding:
    """The encoding of a preset.

    Raises:
        CompressionError: there is no such preset.

    Example:
        >>> encoding_for("tensorrt").signed
        True
    """
    if deploy not in PRESETS:
        raise CompressionError(f"deploy is {deploy!r}; {did_you_mean(str(deploy), PRESETS)}")
    return PRESETS[deploy]
