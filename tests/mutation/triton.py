"""Faults of the Triton kernels, in Triton's interpreter."""

from __future__ import annotations

from mutation.fault import Fault

_TRITON = "resnet_fused/backends/triton/"
_OPS = "tests/test_triton_ops.py::"
_TRAIN = "tests/test_triton_train.py::"
_NORM = (_OPS + "test_norm_shapes", _OPS + "test_statistics_that_cancel")
_CONV = (_OPS + "test_conv_shapes",)

FAULTS = (
    Fault(
        "triton_relu_drops_nan",
        _TRITON + "activation.py",
        """    if ACT == "relu":
        return tl.where(x < 0, 0.0, x)
""",
        """    if ACT == "relu":
        return tl.where(x > 0, x, 0.0)
""",
        (_OPS + "test_what_is_not_finite",),
        "a maximum that drops NaN",
    ),
    Fault(
        "triton_relu6_gradient_beyond_six",
        _TRITON + "activation.py",
        "return tl.where((x > 0) & (x < 6), grad, 0.0)",
        "return tl.where(x > 0, grad, 0.0)",
        (_OPS + "test_norm_of_large_values",),
        "upper corner of an activation ignored",
    ),
    Fault(
        "triton_slope_ignored",
        _TRITON + "activation.py",
        "return tl.where(x > 0, x, x * tl.cast(slope, tl.float32))",
        "return tl.where(x > 0, x, x * 0.01)",
        (_OPS + "test_scale_shift_act",),
        "negative_slope ignored",
    ),
    Fault(
        "triton_statistics_count_what_is_masked",
        _TRITON + "batch_statistics.py",
        "distance = tl.where(m_r[:, None], b_x - origin[None, :], 0.0)",
        "distance = b_x - origin[None, :]",
        _NORM,
        "mask missed behind the last row",
    ),
    Fault(
        "triton_statistics_without_what_lies_between",
        _TRITON + "batch_statistics.py",
        "        squares += distance * distance * count\n",
        "",
        (_TRAIN + "test_forward", _TRAIN + "test_thousands_of_tiles_are_combined_in_two_levels"),
        "Chan's term missing where parts are combined",
    ),
    Fault(
        "triton_last_chunk_counts_as_a_whole_one",
        _TRITON + "batch_statistics.py",
        "count = tl.minimum(rows - o_r * chunk, chunk).to(tl.float32)[:, None]",
        "count = (o_r * 0 + chunk).to(tl.float32)[:, None]",
        (_TRAIN + "test_forward",),
        "rows of the last chunk miscounted",
    ),
    Fault(
        "triton_second_level_counts_as_the_first",
        _TRITON + "batch_statistics.py",
        "(mean, square), chunk, chunks = merged, chunk * group, parts",
        "(mean, square), chunk, chunks = merged, chunk, parts",
        (_TRAIN + "test_thousands_of_tiles_are_combined_in_two_levels",),
        "rows of a combined chunk miscounted",
    ),
    Fault(
        "triton_row_of_the_right_edge_wraps",
        _TRITON + "conv_kernel.py",
        "m_x = m_x & (left + column >= 0) & (left + column < width)",
        "m_x = m_x & (left + column >= 0)",
        _CONV,
        "halo dropped at the right edge",
    ),
    Fault(
        "triton_padding_is_normalised",
        _TRITON + "conv_kernel.py",
        "b_x = tl.where(m_x, b_a, 0.0).to(b_x.dtype)",
        "b_x = b_a.to(b_x.dtype)",
        (_TRAIN + "test_forward",),
        "act(bn(0)) beside the image instead of 0",
    ),
    Fault(
        "triton_groups_read_the_first_channels",
        _TRITON + "conv_kernel.py",
        "first_channel = i_g * group_channels",
        "first_channel = i_g * 0",
        _CONV,
        "wrong offset of a group's channels",
    ),
    Fault(
        "triton_conv_int32_offset",
        _TRITON + "conv_kernel.py",
        "o_x = ((image.to(tl.int64) * height + top)",
        "o_x = ((image * height + top)",
        (_OPS + "test_conv_offsets_past_int32",),
        "32-bit offset of an image",
    ),
    Fault(
        "triton_conv_adds_after_the_activation",
        _TRITON + "conv_kernel.py",
        """    if p_residual is not None:
        acc += tl.load(p_residual + offsets, mask=mask, other=0.0).to(tl.float32)
    if BEHIND == "affine":
        acc = activate(acc, slope, ACT)
""",
        """    if BEHIND == "affine":
        acc = activate(acc, slope, ACT)
    if p_residual is not None:
        acc += tl.load(p_residual + offsets, mask=mask, other=0.0).to(tl.float32)
""",
        (*_CONV, _OPS + "test_conv_activations"),
        "activation applied before the addition",
    ),
    Fault(
        "triton_conv_rounds_before_the_residual",
        _TRITON + "conv_kernel.py",
        """    if p_residual is not None:
        acc += tl.load""",
        """    if p_residual is not None:
        acc = acc.to(p_y.dtype.element_ty).to(tl.float32)
        acc += tl.load""",
        (_OPS + "test_conv_is_rounded_once",),
        "rounding before the sum instead of after",
    ),
    Fault(
        "triton_gradient_is_padded_as_forward",
        _TRITON + "conv_bn_act.py",
        "turned = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]",
        "turned = [p for d, k, p in zip(dilation, kernel, padding, strict=True)]",
        (_TRAIN + "test_gradient_of_the_input",),
        "padding of the turned kernel",
    ),
    Fault(
        "triton_weights_are_not_turned",
        _TRITON + "conv_bn_act.py",
        "w_source, tap = weight[:, :, -1, -1], -tap",
        "w_source, tap = weight[:, :, 0, 0], tap",
        (_TRAIN + "test_gradient_of_the_input",),
        "gradient by the kernel as it stands",
    ),
    Fault(
        "triton_last_columns_have_no_program",
        _TRITON + "conv_bn_act.py",
        "ceil_div(pixels, config.block_m) * ceil_div(outputs // groups, config.block_n)",
        "ceil_div(pixels, config.block_m) * max(1, outputs // groups // config.block_n)",
        (*_CONV, _OPS + "test_every_tile_size"),
        "off by one at the last tile",
    ),
    Fault(
        "triton_swaps_scale_and_shift",
        _TRITON + "scale_shift_act.py",
        "_run(input, residual, None, None, scale, shift, 0.0,",
        "_run(input, residual, None, None, shift, scale, 0.0,",
        (_OPS + "test_scale_shift_act",),
        "scale and shift swapped",
    ),
    Fault(
        "triton_gradient_over_one_value_too_few",
        _TRITON + "bn_act.py",
        "1.0 / max(count, 1), ACT=act",
        "1.0 / max(count - 1, 1), ACT=act",
        _NORM,
        "unbiased count in batch norm's gradient",
    ),
    Fault(
        "triton_mask_without_the_residual",
        _TRITON + "bn_act.py",
        "argument += tl.load(p_residual + offsets, mask=mask, other=0.0).to(tl.float32)",
        "argument += 0.0",
        (_OPS + "test_norm_activations",),
        "derivative taken where the residual was not added yet",
    ),
    Fault(
        "triton_sums_of_the_first_chunks",
        _TRITON + "bn_act.py",
        "sums += tl.load(p_partial_sum + offsets, mask=mask, other=0.0)",
        "sums = tl.load(p_partial_sum + offsets, mask=mask, other=0.0)",
        (
            *_NORM,
            _TRAIN + "test_gradient_of_the_input",
            _TRAIN + "test_thousands_of_tiles_are_combined_in_two_levels",
        ),
        "sums overwritten instead of added",
    ),
    Fault(
        "triton_eps_outside_the_root",
        _TRITON + "tiles.py",
        "tl.math.rsqrt(channel_vector(p_var, o_c, m_c, 1.0) + tl.cast(eps, tl.float32))",
        "1.0 / (tl.sqrt(channel_vector(p_var, o_c, m_c, 1.0)) + tl.cast(eps, tl.float32))",
        _NORM,
        "eps added to the deviation instead of the variance",
    ),
    Fault(
        "triton_planes_are_counted_in_32_bits",
        _TRITON + "tiles.py",
        """"nchw" if rows < _INT32_ROWS else "nchw_long\"""",
        """"nchw" if rows >= 0 else "nchw_long\"""",
        (_OPS + "test_offsets_past_int32",),
        "32-bit number of a row",
    ),
    Fault(
        "triton_takes_descriptors_for_groups",
        _TRITON + "configs.py",
        "        and problem.groups == 1\n",
        "",
        ("tests/test_gpu_choice.py::test_what_cannot_be_is_not_admitted",),
        "a kernel admitted for what it cannot run",
    ),
    Fault(
        "gpu_program_key_without_the_choices",
        "resnet_fused/modules/conv_chain.py",
        "key = (like, data is input, gpu_choice.state(data.dtype))",
        "key = (like, data is input)",
        (
            "tests/test_triton_models.py::test_what_is_launched",
            "tests/test_triton_models.py::test_several_shapes_are_remembered",
        ),
        "a program of other choices or another precision on a GPU",
    ),
)
