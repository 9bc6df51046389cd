"""Faults of the CUDA kernels (csrc/cuda), which run on the CPU (tests/cuda_on_cpu)."""

from __future__ import annotations

from mutation.fault import Fault

_CUDA = "csrc/cuda/"
_CONV = "tests/test_cuda_conv.py::"
_EVERY = (_CONV + "test_every_kernel",)
_TRAIN = "tests/test_cuda_train_conv.py::"
_OPS = "tests/test_cuda_ops.py::"
_NORM = (_OPS + "test_norm_shapes", _OPS + "test_more_than_one_step")
_POOL = ("tests/test_cuda_pool.py",)
_PACK = ("tests/test_cuda_pack.py",)
_RUNNING = ("tests/test_cuda_running_statistics.py",)

FAULTS = (
    Fault(
        "cuda_rows_share_no_padding",
        _CUDA + "conv_geometry.h",
        "return std::max(out_size, widest - floor_div(-padding, stride));",
        "return std::max(out_size, widest);",
        _EVERY,
        "halo dropped between rows and images",
    ),
    Fault(
        "cuda_swaps_the_paddings",
        _CUDA + "conv_geometry.h",
        "const int right = tap % o.kernel_w * o.dilation_w - o.padding_w;",
        "const int right = tap % o.kernel_w * o.dilation_w - o.padding_h;",
        _EVERY,
        "vertical padding taken for the horizontal one",
    ),
    Fault(
        "cuda_mma_without_a_barrier",
        _CUDA + "conv_mma.cuh",
        "      sync_block();  // the step's data are there, and nobody reads the slots copied into"
        " next\n",
        "",
        _EVERY,
        "barrier dropped between copying and multiplying",
    ),
    Fault(
        "cuda_mma_waits_for_one_copy_too_few",
        _CUDA + "conv_mma.cuh",
        "cp_async_wait<kAhead - 1>();",
        "cp_async_wait<kAhead>();",
        _EVERY,
        "wait for the stage before",
    ),
    Fault(
        "cuda_wgmma_waits_for_the_other_parity",
        _CUDA + "conv_wgmma.cuh",
        "mbarrier_wait(&barriers->input_full[slot], input.parity);",
        "mbarrier_wait(&barriers->input_full[slot], input.parity ^ 1);",
        _EVERY,
        "wait for the use before",
    ),
    Fault(
        "cuda_wgmma_releases_too_early",
        _CUDA + "conv_wgmma.cuh",
        "            wgmma_wait<1>();\n",
        "",
        _EVERY,
        "slot given back while products read it",
    ),
    Fault(
        "cuda_wgmma_without_a_fence",
        _CUDA + "conv_wgmma.cuh",
        "      fence_async();\n",
        "",
        (*_EVERY, _TRAIN + "test_forward"),
        "proxy fence dropped between writing and wgmma",
    ),
    Fault(
        "cuda_conv_int32_offset",
        _CUDA + "conv_epilogue.cuh",
        "return static_cast<int64_t>(pixel) * out.channels + (column + 32 * block);",
        "return pixel * out.channels + (column + 32 * block);",
        ("tests/test_cuda_conv_far.py",),
        "32-bit offset of an output",
    ),
    Fault(
        "cuda_statistics_without_an_origin",
        _CUDA + "conv_epilogue.cuh",
        "totals.origin[block] = mean - mean == 0 ? mean : 0;",
        "totals.origin[block] = 0 * mean;",
        (_TRAIN + "test_large_means_do_not_cancel",),
        "variance by a difference that cancels",
    ),
    Fault(
        "cuda_padding_is_normalised",
        _CUDA + "conv_arguments.h",
        "for (uint32_t& word : changed.words) word = there ? word : 0;",
        "for (uint32_t& word : changed.words) word = there ? word : word;",
        (_TRAIN + "test_outside_of_the_image_is_zero", _TRAIN + "test_forward"),
        "act(bn(0)) beside the image instead of 0",
    ),
    Fault(
        "cuda_groups_read_the_first_channels",
        _CUDA + "conv_arguments.h",
        "return column_tile * columns / block_out * block_in;",
        "return column_tile * columns / block_out * 0;",
        _EVERY,
        "wrong offset of a group's channels",
    ),
    Fault(
        "cuda_last_tile_is_not_started",
        _CUDA + "conv_launch.cuh",
        "const int64_t tiles = (g.places + rows - 1) / rows * a.column_tiles;",
        "const int64_t tiles = std::max(1, g.places / rows) * a.column_tiles;",
        _EVERY,
        "off by one at the last tile",
    ),
    Fault(
        "cuda_moments_without_what_lies_between",
        _CUDA + "conv_train.cu",
        "b += squares[row * channels] + n * apart * apart;",
        "b += squares[row * channels] + 0 * n * apart * apart;",
        (_TRAIN + "test_forward",),
        "Chan's term missing where parts are combined",
    ),
    Fault(
        "cuda_gradient_is_padded_as_forward",
        _CUDA + "conv_train.cu",
        "turned.push_back(geometry[4 + i] * (weight.size(2 + i) - 1) - geometry[2 + i]);",
        "turned.push_back(geometry[2 + i]);",
        (_TRAIN + "test_gradient_of_the_input",),
        "padding of the turned kernel",
    ),
    Fault(
        "cuda_stem_multiplies_the_next_pixel_by_zero",
        _CUDA + "stem_conv.cuh",
        "if (part == kEights - 1) both &= tail;",
        "if (part == kEights) both &= tail;",
        (_CONV + "test_not_finite",),
        "tail mask missed, which NaN passes",
    ),
    Fault(
        "cuda_weights_of_the_first_group",
        _CUDA + "pack_weights.cu",
        "(chunk * kPlanes + plane) * kPiece - group * a.channels;",
        "(chunk * kPlanes + plane) * kPiece - 0 * group * a.channels;",
        _PACK,
        "wrong offset among groups that share a tile",
    ),
    Fault(
        "cuda_tf32_is_cut_off",
        _CUDA + "pack_weights.cu",
        "numbers[i] = round_tf32(numbers[i]);",
        "numbers[i] = numbers[i];",
        (*_PACK, _CONV + "test_float32_is_rounded_to_the_nearest_tf32"),
        "truncation instead of rounding to the nearest",
    ),
    Fault(
        "cuda_turned_weights_are_not_turned",
        _CUDA + "pack_weights.cu",
        "a.by_row = -a.by_row, a.by_column = -a.by_column;",
        "a.by_row = -a.by_row;",
        _PACK,
        "kernel turned about one axis only",
    ),
    Fault(
        "cuda_eps_outside_the_root",
        _CUDA + "norm.cuh",
        """bias ? bias[channel] : A(0), var ? var[channel] + eps : A(1)};
    c.rstd = A(1) / std::sqrt(c.rstd);
""",
        """bias ? bias[channel] : A(0), var ? var[channel] : A(1)};
    c.rstd = A(1) / (std::sqrt(c.rstd) + (var ? eps : A(0)));
""",
        (_OPS + "test_norm_shapes",),
        "eps added to the deviation instead of the variance",
    ),
    Fault(
        "cuda_variance_about_the_origin",
        _CUDA + "batch_statistics.cu",
        "square / static_cast<double>(count) - rest * rest;",
        "square / static_cast<double>(count) - 0 * rest * rest;",
        _NORM,
        "mean's distance from the origin not taken off",
    ),
    Fault(
        "cuda_statistics_of_infinite_origins",
        _CUDA + "batch_statistics.cu",
        "return origin - origin == A(0) ? origin : A(0);",
        "return origin;",
        (_OPS + "test_an_infinite_channel_has_an_infinite_mean",),
        "infinity minus infinity",
    ),
    Fault(
        "cuda_tree_without_a_barrier",
        _CUDA + "channel_sums.cuh",
        """  for (int half = rows / 2; half > 0; half /= 2) {
    sync_block();
""",
        """  sync_block();
  for (int half = rows / 2; half > 0; half /= 2) {
""",
        _NORM,
        "barrier dropped inside a loop",
    ),
    Fault(
        "cuda_pass_misses_the_last_units",
        _CUDA + "channel_pass.cuh",
        "const int64_t needed = std::max<int64_t>(1, (pass.units + step - 1) / step);",
        "const int64_t needed = std::max<int64_t>(1, pass.units / step);",
        (*_NORM, _OPS + "test_scale_shift_act"),
        "rounding down where the last block is not full",
    ),
    Fault(
        "cuda_int32_rows",
        _CUDA + "channel_pass.cuh",
        "      return unit * pass.channels + channel;\n",
        "      return static_cast<int>(unit) * static_cast<int>(pass.channels) + channel;\n",
        (_OPS + "test_offsets_past_int32",),
        "32-bit offset of a row",
    ),
    Fault(
        "cuda_max_pool_drops_nan",
        _CUDA + "max_pool.cu",
        "const bool wins = v[j] > best[j] || v[j] != v[j] || !any;",
        "const bool wins = v[j] > best[j] || !any;",
        _POOL,
        "a maximum that drops NaN, in a pool",
    ),
    Fault(
        "cuda_pool_compares_before_rounding",
        _CUDA + "max_pool.cu",
        "for (int j = 0; j < n; ++j) v[j] = to_float(narrowed<T>(v[j]));",
        "for (int j = 0; j < 0; ++j) v[j] = to_float(narrowed<T>(v[j]));",
        _POOL,
        "places of maxima that rounding makes equal",
    ),
    Fault(
        "cuda_unpool_misses_a_window",
        _CUDA + "max_pool.cuh",
        "last = behind / stride;",
        "last = (behind - 1) / stride;",
        _POOL,
        "off by one at the last window that holds a pixel",
    ),
    Fault(
        "cuda_batches_are_counted_by_every_block",
        _CUDA + "running_statistics.cu",
        "if (blockIdx.x == 0 && i < vectors.counted)",
        "if (i < vectors.counted)",
        _RUNNING,
        "counter moved more than once",
    ),
    Fault(
        "cuda_running_variance_is_biased",
        _CUDA + "running_statistics.cu",
        "now * keep + batch * scale * move);",
        "now * keep + batch * move + 0 * scale);",
        _RUNNING,
        "biased instead of unbiased variance",
    ),
    Fault(
        "cuda_only_the_first_launch",
        _CUDA + "running_statistics.cu",
        "for (size_t begin = 0; begin < all; begin += kMost) {",
        "for (size_t begin = 0; begin < std::min<size_t>(all, kMost); begin += kMost) {",
        _RUNNING,
        "vectors beyond those of one launch forgotten",
    ),
    Fault(
        "cuda_gradient_without_its_tilt",
        _CUDA + "bn_act_backward.cu",
        "v[j] = scale[c] * (g[j] - mean_grad[c] - (v[j] - mean[c]) * tilt[c]);",
        "v[j] = scale[c] * (g[j] - mean_grad[c] - 0 * (v[j] - mean[c]) * tilt[c]);",
        _NORM,
        "a term of batch norm's gradient missing",
    ),
    Fault(
        "cuda_pooled_gradient_reads_the_last_pixel",
        _CUDA + "train_pool.cu",
        "for (int j = 0; j < n; ++j) x[j] = found[j] == at ? v[j] : x[j];",
        "for (int j = 0; j < n; ++j) x[j] = found[j] <= at ? v[j] : x[j];",
        _POOL,
        "value of another pixel than the one that was chosen",
    ),
)
