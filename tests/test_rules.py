"""Every op that was seen in a zoo of models has a rule, or is one that torch itself calls pointwise."""

import pytest
import torch

from lightslim.graph.record import _rule_for

# Recorded in evaluation and training: 19 torchvision models, and one of each of 213 families of timm.
SEEN = """
_adaptive_avg_pool2d _safe_softmax _scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _unsafe_view
_upsample_bilinear2d_aa adaptive_max_pool2d add add_ addcmul addmm alias amax arange as_strided_ avg_pool2d
bernoulli_ bitwise_not bmm cat clamp clamp_min clone col2im constant_pad_nd convolution copy_ cos cumsum detach div
div_ empty empty_like eq exp expand eye fill_ gelu hardsigmoid hardswish hardswish_ hardtanh hardtanh_ im2col index
leaky_relu leaky_relu_ lift_fresh linalg_vector_norm masked_fill max max_pool2d_with_indices mean mkldnn_rnn_layer
mm mul mul_ native_batch_norm native_group_norm native_layer_norm ne neg new_empty new_zeros permute pow
reflection_pad2d relu relu_ repeat roll rsub select sigmoid silu silu_ sin slice split split_with_sizes squeeze
stack sub sum t tanh transpose unbind unfold unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_nearest2d
view zeros
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", SEEN)
def test_no_op_of_the_zoo_is_unknown(name):
    packet = getattr(torch.ops.aten, name)
    op = getattr(packet, packet.overloads()[0])
    makes_something_of_nothing = not any("Tensor" in str(argument.type) for argument in op._schema.arguments)
    assert makes_something_of_nothing or _rule_for(op) is not None


def test_an_op_that_nobody_has_thought_of_has_no_rule():
    assert _rule_for(torch.ops.aten.linalg_qr.default) is None
