"""Faults of the CPU kernels (csrc/cpu, csrc/common)."""

from __future__ import annotations

from mutation.fault import Fault

_COMMON, _CPU = "csrc/common/", "csrc/cpu/"
_EDGES = (
    "tests/test_packed_conv.py::test_random_cases",
    "tests/test_packed_conv.py::test_every_edge_of_the_image",
    "tests/test_packed_conv.py::test_channel_counts",
    "tests/test_packed_conv.py::test_unequal_height_and_width",
    "tests/test_packed_conv.py::test_a_unit_of_work_ends_with_its_image",
)
_NOT_FINITE = ("tests/test_packed_conv.py::test_values_that_are_not_finite",)
_LONG = (
    "tests/test_packed_conv.py::test_channel_counts",
    "tests/test_packed_conv.py::test_root_mean_square_error",
)
_NARROW = (
    "tests/test_conv_kinds.py::test_narrow_groups",
    "tests/test_conv_kinds.py::test_narrow_groups_with_every_activation",
)
_PASSES = (
    "tests/test_train_conv.py::test_random_steps",
    "tests/test_train_conv.py::test_many_passes",
)
_FUNCTIONAL = "tests/test_functional.py::"
_BN = (
    _FUNCTIONAL + "test_bn_forward",
    _FUNCTIONAL + "test_bn_backward",
    _FUNCTIONAL + "test_bn_shapes",
)
_STATISTICS = (
    _FUNCTIONAL + "test_bn_shapes",
    _FUNCTIONAL + "test_bn_statistics_do_not_cancel",
)
_TRAIN = ("tests/test_train_conv.py::test_random_steps",)
_RUNNING = ("tests/test_running_statistics.py::test_running_statistics",)
_ONE_CALL = ("tests/test_train_call.py::test_one_call_gives_the_bits_of_its_steps",)
_POOL = ("tests/test_max_pool.py", "tests/test_train_pool.py")

FAULTS = (
    Fault(
        "relu_drops_nan",
        _COMMON + "activation.h",
        "return x < A(0) ? A(0) : x;",
        "return x > A(0) ? x : A(0);",
        (_FUNCTIONAL + "test_odd_values_pass_as_in_eager",),
        "a maximum that drops NaN",
    ),
    Fault(
        "leaky_relu_gradient_ignores_its_slope",
        _COMMON + "activation.h",
        "return x > A(0) ? g : g * slope;",
        "return x > A(0) ? g : g * A(0.01);",
        (_FUNCTIONAL + "test_bn_backward",),
        "negative_slope ignored",
    ),
    Fault(
        "conv_relu_drops_nan",
        _CPU + "finish.h",
        "value = value < 0.0f ? Vector{} : value;",
        "value = value > 0.0f ? value : Vector{};",
        _NOT_FINITE,
        "a maximum that drops NaN, in a convolution's registers",
    ),
    Fault(
        "conv_adds_after_the_activation",
        _CPU + "finish.h",
        """  if (finish.residual != nullptr) value += load(finish.residual + offset + column);
  if (finish.act == Activation::relu) value = value < 0.0f ? Vector{} : value;
""",
        """  if (finish.act == Activation::relu) value = value < 0.0f ? Vector{} : value;
  if (finish.residual != nullptr) value += load(finish.residual + offset + column);
""",
        _EDGES,
        "activation applied before the addition",
    ),
    Fault(
        "conv_row_without_its_residual",
        _CPU + "finish.h",
        "Act::forward(sums[c] + finish.shift[c] + residual[c], slope)",
        "Act::forward(sums[c] + finish.shift[c] + 0 * residual[c], slope)",
        _EDGES,
        "residual missing in one of two branches",
    ),
    Fault(
        "conv_rounds_before_the_residual",
        _CPU + "finish.h",
        "  Vector value = sum + load(finish.shift + column);\n",
        """  Vector value = sum + load(finish.shift + column);
  if (finish.residual != nullptr) {
    T early[kLanes];
    store(early, value);
    value = load(early);
  }
""",
        ("tests/test_packed_conv_op.py::test_bfloat16_is_rounded_once",),
        "bfloat16 rounding before the sum instead of after",
        needs="avx512_bf16",
    ),
    Fault(
        "direct_conv_loses_the_last_row",
        _CPU + "direct_conv_kernel.h",
        "if (y < 0 || y >= shape.height) {",
        "if (y < 0 || y + 1 >= shape.height) {",
        _EDGES,
        "halo dropped at the image's lower edge",
    ),
    Fault(
        "direct_conv_swaps_its_paddings",
        _CPU + "direct_conv_kernel.h",
        "const int64_t left = place.x * shape.stride[1] - shape.padding[1];",
        "const int64_t left = place.x * shape.stride[1] - shape.padding[0];",
        _EDGES,
        "vertical padding taken for the horizontal one",
    ),
    Fault(
        "direct_conv_adds_a_part_twice",
        _CPU + "direct_conv_kernel.h",
        """      sums[r][v] = Vector{};
    }
  }
}
""",
        """    }
  }
}
""",
        _LONG,
        "accumulator not reset between the parts of a long sum",
    ),
    Fault(
        "direct_conv_packs_the_first_group",
        _CPU + "direct_conv.cpp",
        "weight + (group * outputs + first + n) * channels * taps;",
        "weight + (first + n) * channels * taps;",
        _EDGES,
        "wrong offset of a group's weights",
    ),
    Fault(
        "direct_conv_runs_into_the_next_image",
        _CPU + "direct_conv.cpp",
        "flat ? last : std::min(last, (first / s.out_height + 1) * s.out_height);",
        "flat ? last : std::min(last, (first / s.out_height + 2) * s.out_height);",
        _EDGES,
        "a unit of work that crosses the border between images",
    ),
    Fault(
        "winograd_forgets_the_last_channels",
        _CPU + "winograd_tiles.h",
        "if (channels % 16 == 0) return;",
        "if (channels % 16 < 8) return;",
        _EDGES,
        "tail of a vector loop missed",
    ),
    Fault(
        "winograd_without_the_first_column",
        _CPU + "winograd_tiles.h",
        "const bool inside = row_inside && x >= 0 && x < shape.width;",
        "const bool inside = row_inside && x > 0 && x < shape.width;",
        _EDGES,
        "off by one at the image's left edge",
    ),
    Fault(
        "winograd_spreads_infinities",
        _CPU + "winograd_kernel.h",
        "return !has_nan(check);",
        "return true;",
        _NOT_FINITE,
        "tiles that are not finite are not computed again",
    ),
    Fault(
        "winograd_keeps_the_last_part",
        _CPU + "winograd_kernel.h",
        "length, mine, adds || k > 0,",
        "length, mine, adds,",
        (*_LONG, *_PASSES),
        "parts of a long sum overwritten instead of added",
    ),
    Fault(
        "winograd_again_without_the_scale",
        _CPU + "winograd_kernel.h",
        "task.plain.scale == nullptr ? sum : sum * task.plain.scale[channel + n];",
        "task.plain.scale == nullptr ? sum : sum;",
        _NOT_FINITE,
        "fallback that forgets the folded batch norm",
    ),
    Fault(
        "grouped_conv_pads_the_other_side",
        _CPU + "grouped_conv_kernel.h",
        "const int64_t x = out_x * kStride - shape.padding[1] + j;",
        "const int64_t x = out_x * kStride - shape.padding[1] + j + (kStride - 1);",
        _NARROW,
        "padding on the wrong side with stride 2",
    ),
    Fault(
        "strassen_reads_the_wrong_image",
        _CPU + "strassen_kernel.h",
        "return input + ((image * s.height + y * s.stride[0]) * s.width",
        "return input + ((image * s.out_height + y * s.stride[0]) * s.width",
        ("tests/test_packed_conv.py::test_random_cases",),
        "images counted in the output's rows with stride 2",
    ),
    Fault(
        "max_pool_drops_nan",
        _CPU + "max_pool_kernel.h",
        "(value > best[i]) | (value != value);",
        "(value > best[i]);",
        _POOL,
        "a maximum that drops NaN, in a pool",
    ),
    Fault(
        "max_pool_begins_with_zero",
        _CPU + "max_pool_kernel.h",
        "best[i] = Value{} - INFINITY, found[i]",
        "best[i] = Value{}, found[i]",
        _POOL,
        "wrong neutral element",
    ),
    Fault(
        "max_unpool_misses_the_last_window",
        _CPU + "max_pool_kernel.h",
        "window < 0 || window >= windows_) continue;",
        "window < 0 || window + 1 >= windows_) continue;",
        _POOL,
        "off by one at the last window",
    ),
    Fault(
        "running_variance_is_biased",
        _CPU + "running_statistics.cpp",
        "to[c] * keep + from[c] * scale * move;",
        "to[c] * keep + from[c] * move;",
        _RUNNING,
        "biased instead of unbiased variance",
    ),
    Fault(
        "batches_are_not_counted",
        _CPU + "running_statistics.cpp",
        "++*static_cast<int64_t*>(counter.mutable_data_ptr());",
        "counter.mutable_data_ptr();",
        _RUNNING,
        "num_batches_tracked forgotten",
    ),
    Fault(
        "bn_adds_after_the_activation",
        _CPU + "normalize_act_kernel.h",
        """        if (has_residual) value += widened(residual[row + j]);
        narrow(Act::forward(value, slope), y[row + j]);
""",
        """        value = Act::forward(value, slope);
        if (has_residual) value += widened(residual[row + j]);
        narrow(value, y[row + j]);
""",
        _BN,
        "activation applied before the addition, in training",
    ),
    Fault(
        "bn_mask_without_the_residual",
        _CPU + "bn_act_backward_kernel.h",
        "if (mask == MaskFrom::residual) argument += widened(auxiliary[i]);",
        "if (mask == MaskFrom::residual) argument += 0 * widened(auxiliary[i]);",
        _BN,
        "derivative taken where the residual was not added yet",
    ),
    Fault(
        "bn_gradient_without_the_mean",
        _CPU + "bn_act_backward_kernel.h",
        "narrow(scale[j] * ((grad - mean_grad[j]) - (sample",
        "narrow(scale[j] * (grad - 0 * mean_grad[j] - (sample",
        _BN,
        "a term of batch norm's gradient missing",
    ),
    Fault(
        "bn_sample_is_counted_twice",
        _CPU + "batch_statistics_kernel.h",
        "deviation[j] = moment[j] = 0;",
        "moment[j] = 0;",
        _STATISTICS,
        "accumulator not reset after the sample",
    ),
    Fault(
        "bn_eps_outside_the_root",
        _CPU + "channel_vectors.h",
        "rstd[c] = 1.0 / std::sqrt(static_cast<double>(var_data[c]) + eps);",
        "rstd[c] = 1.0 / (std::sqrt(static_cast<double>(var_data[c])) + eps);",
        (_FUNCTIONAL + "test_bn_forward",),
        "eps added to the deviation instead of the variance",
    ),
    Fault(
        "bn_loses_the_last_chunk",
        _CPU + "chunks.h",
        "count = (e.outer + size - 1) / size;",
        "count = e.outer < size ? 1 : e.outer / size;",
        _STATISTICS,
        "rounding down where the last chunk is not full",
    ),
    Fault(
        "bn_lanes_lose_the_tail",
        _CPU + "channel_sums.h",
        "add_rows<1>(value, rows * kLanes, 1, tile.columns - rows * kLanes, lanes[0], lanes[1]);",
        "add_rows<1>(value, rows * kLanes, 1, 0, lanes[0], lanes[1]);",
        _STATISTICS,
        "tail of a plane left out of its sums",
    ),
    Fault(
        "bfloat16_is_cut_off",
        _CPU + "simd.h",
        "const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;",
        "const uint32_t rounded = bits >> 16;",
        (_FUNCTIONAL + "test_narrow_results_are_rounded_to_nearest",),
        "truncation instead of rounding to the nearest",
    ),
    Fault(
        "block_adds_the_first_images_residual",
        _CPU + "packed_conv.cpp",
        "residual + first * block.image_bytes(1));",
        "residual);",
        ("tests/test_packed_conv_op.py::test_block_in_one_call_is_the_same_as_its_steps",),
        "second pass of a large batch reads the first one's residual",
    ),
    Fault(
        "training_unpools_the_first_images",
        _CPU + "train_conv.cpp",
        "first * from_.pixels * from_.channels,",
        "0 * from_.pixels * from_.channels,",
        ("tests/test_train_pool.py::test_a_pooled_gradient_in_many_passes",),
        "second pass reads the first one's places",
    ),
    Fault(
        "training_normalises_without_the_slope",
        _CPU + "train_norm.h",
        """                   values->bias.data(), negative_slope},
                  dtype, act);
""",
        """                   values->bias.data(), 0.01},
                  dtype, act);
""",
        _TRAIN,
        "negative_slope ignored before a convolution",
    ),
    Fault(
        "weight_gradient_of_one_thread_is_lost",
        _CPU + "weight_grad.cpp",
        "for (int64_t worker = 1; worker < workers_; ++worker) {",
        "for (int64_t worker = 2; worker < workers_; ++worker) {",
        ("tests/test_train_conv.py::test_sums_of_several_threads",),
        "off by one in adding up the threads' sums",
    ),
    Fault(
        "weight_gradient_forgets_the_pass_before",
        _CPU + "weight_grad.cpp",
        "bool adds = adds_;",
        "bool adds = false;",
        _PASSES,
        "sums of earlier images overwritten",
    ),
    Fault(
        "weight_gradient_keeps_infinities",
        _CPU + "train_conv.cpp",
        "if (needs_weight && !weights->is_finite()) {",
        "if (false && needs_weight && !weights->is_finite()) {",
        ("tests/test_train_conv.py::test_values_that_are_not_finite",),
        "not finite gradients not left to PyTorch",
    ),
    Fault(
        "block_forgets_the_other_reader",
        _CPU + "train_block.cpp",
        "needs_input ? grads[from] : OptionalTensor(),",
        "OptionalTensor(),",
        _ONE_CALL,
        "gradient of a value's other reader not added",
    ),
    Fault(
        "block_keeps_the_activation_behind_a_sum",
        _CPU + "train_block.cpp",
        """        act = "none";
""",
        "",
        _ONE_CALL,
        "activation's derivative applied twice",
    ),
    Fault(
        "pool_hands_memory_out_twice",
        _CPU + "memory_pool.cpp",
        "    idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(best));\n",
        "",
        ("tests/test_build.py::test_pool_keeps_a_dead_output_and_uses_it_again",),
        "a block in use stays among the idle ones",
    ),
    Fault(
        "pool_is_not_bounded",
        _CPU + "memory_pool.cpp",
        "while (idle_bytes_ + block.bytes > limit_) {",
        "while (false && idle_bytes_ + block.bytes > limit_) {",
        ("tests/test_build.py::test_pool_is_bounded",),
        "idle memory without a limit",
    ),
)
