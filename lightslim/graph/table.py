"""Which ATen op belongs to which family of rules. To teach the recorder a new op, add its name to a row."""

from lightslim.graph import rules, rules_more

FAMILIES: dict[rules.Rule, str] = {
    rules.convolution: """
        convolution _convolution cudnn_convolution mkldnn_convolution miopen_convolution
        convolution_overrideable
    """,
    rules.matmul: "mm bmm addmm baddbmm",
    rules.linear: "linear",
    rules.attention: """
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable
    """,
    rules.fresh: "new_empty new_zeros new_ones new_full new_empty_strided",
    rules.embedding: "embedding",
    rules.batch_norm: """
        native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
        miopen_batch_norm _batch_norm_with_update _batch_norm_no_update batch_norm
    """,
    rules.layer_norm: "native_layer_norm _fused_rms_norm rms_norm",
    rules.group_norm: "native_group_norm",
    rules.pointwise: "copy _prelu_kernel hardswish log_sigmoid_forward rrelu_with_noise polar complex",
    rules.loss: """
        mse_loss smooth_l1_loss huber_loss l1_loss kl_div binary_cross_entropy
        binary_cross_entropy_with_logits
    """,
    rules.same: """
        clone _to_copy detach alias lift_fresh contiguous native_dropout _fused_dropout bernoulli zeros_like
        ones_like full_like empty_like rand_like randn_like fill zero normal uniform exponential
    """,
    rules.restrided: "as_strided as_strided_scatter",
    rules.spatial: """
        max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
        _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
        fractional_max_pool2d mkldnn_max_pool2d reflection_pad1d reflection_pad2d reflection_pad3d
        replication_pad1d replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d
        upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
        upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
        _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d grid_sampler_3d
    """,
    rules.reduce: """
        sum mean amax amin max min var std var_mean std_mean prod logsumexp linalg_vector_norm norm any all
        argmax argmin aminmax median nanmean nansum
    """,
    rules.along: """
        _softmax _safe_softmax _log_softmax _fft_r2c _fft_c2r _fft_c2c
        cumsum cumprod cummax cummin logcumsumexp flip roll sort topk index_select
        tril triu
    """,
    rules.indexed: """
        nll_loss_forward nll_loss2d_forward nll_loss gather scatter scatter_add scatter_reduce index_put
        index_add take_along_dim bincount histc _unique2 searchsorted nonzero masked_select one_hot
        multi_margin_loss multilabel_margin_loss_forward cross_entropy_loss _ctc_loss
    """,
    rules.index: "index",
    rules.select_dims: "select unbind",
    rules.view: "view _unsafe_view reshape _reshape_alias",
    rules.permute: "permute",
    rules.transpose: "transpose t",
    rules.squeeze: "squeeze unsqueeze",
    rules.expand: "expand",
    rules.repeat: "repeat",
    rules.cat: "cat",
    rules.stack: "stack",
    rules.glu: "glu",
    rules.split: "split unsafe_split split_with_sizes unsafe_split_with_sizes chunk unsafe_chunk",
    rules.slice_: "slice",
    rules.pad: "constant_pad_nd",
    rules_more.pixel_shuffle: "pixel_shuffle",
    rules_more.pixel_unshuffle: "pixel_unshuffle",
    rules_more.channel_shuffle: "channel_shuffle native_channel_shuffle",
    rules_more.unfold: "im2col",
    rules_more.fold: "col2im",
    rules_more.windows: "unfold",
    rules_more.recurrent: "mkldnn_rnn_layer",
    rules_more.weight_norm: "_weight_norm_interface",
    rules_more.embedding_bag: "_embedding_bag _embedding_bag_forward_only",
    rules_more.distance: "_cdist_forward",
    rules_more.dot: "mv dot vdot",
    rules_more.mixed: "_trilinear",
    rules_more.complex_parts: "view_as_real view_as_complex",
}

RULES: dict[str, rules.Rule] = {name: rule for rule, names in FAMILIES.items() for name in names.split()}
