"""Faults of modules, operators and folding."""

from __future__ import annotations

from mutation.fault import Fault
from mutation.graph import zoo

_PACKAGE = "resnet_fused/"
_MODULES, _OPS = _PACKAGE + "modules/", _PACKAGE + "ops/"
_STATE = "tests/test_fuse_state.py::"
_BLOCK = ("tests/test_train_block.py",)
_RUNNING = ("tests/test_running_statistics.py",)
_DISTRIBUTED = ("tests/test_distributed.py::test_a_process_without_images_takes_part",)

FAULTS = (
    Fault(
        "fold_with_eps_outside_the_root",
        _PACKAGE + "fold.py",
        "scale = (var.double() + eps).rsqrt()",
        "scale = 1.0 / (var.double().sqrt() + eps)",
        zoo("momentum_0.9"),
        "eps added to the deviation instead of the variance",
    ),
    Fault(
        "fold_forgets_the_bias",
        _PACKAGE + "fold.py",
        "offset = -mean.double() if conv_bias is None else conv_bias.double() - mean.double()",
        "offset = -mean.double()",
        zoo("biased_block"),
        "the convolution's own bias lost",
    ),
    Fault(
        "same_padding_is_even",
        _PACKAGE + "packing.py",
        "return None if any(t % 2 for t in total) else [t // 2 for t in total]",
        "return [t // 2 for t in total]",
        zoo("padding_same_even"),
        "padding on the wrong side of an even kernel",
    ),
    Fault(
        "untracked_statistics_in_evaluation",
        _MODULES + "batch_norm.py",
        'bn.training or (buffers["running_mean"] is None and buffers["running_var"] is None)',
        "bn.training",
        zoo("no_statistics"),
        "batch norm without statistics run as if it had some",
    ),
    Fault(
        "recomputing_counts_the_batch_twice",
        _MODULES + "batch_norm.py",
        """    if torch._C._current_graph_task_id() != -1:
        return  # gradient checkpointing runs the forward again
""",
        "",
        (_STATE + "test_gradient_checkpointing",),
        "running statistics updated twice",
    ),
    Fault(
        "fallback_forgets_the_running_statistics",
        _MODULES + "batch_norm.py",
        "                _update(bn, statistics[2 * i], statistics[2 * i + 1], counts[i])\n",
        "                pass\n",
        _RUNNING,
        "running statistics not updated in a fallback",
    ),
    Fault(
        "momentum_is_turned_round",
        _MODULES + "batch_norm.py",
        "running.mul_(1 - momentum).add_(batch, alpha=momentum)",
        "running.mul_(momentum).add_(batch, alpha=1 - momentum)",
        zoo("cumulative", "momentum_0.9"),
        "momentum and its complement swapped",
    ),
    Fault(
        "one_momentum_for_all",
        _MODULES + "batch_norm.py",
        "bn.training and bn.track_running_stats and bn.momentum == momentum for bn in norms",
        "bn.training and bn.track_running_stats for bn in norms",
        _RUNNING,
        "the first norm's momentum taken for all of a block",
    ),
    Fault(
        "fallback_variance_is_biased",
        _MODULES + "batch_norm.py",
        "unbiased = var * (count / max(count - 1, 1))",
        "unbiased = var * (count / max(count, 1))",
        zoo("cumulative", "momentum_0.9"),
        "biased instead of unbiased variance, in a fallback",
    ),
    Fault(
        "one_norm_decides_for_a_block",
        _MODULES + "train.py",
        "if any(bn is None or not uses_batch_statistics(bn) for bn in norms):",
        "if all(bn is None or not uses_batch_statistics(bn) for bn in norms):",
        (*_RUNNING, _STATE + "test_a_run_frozen_in_parts"),
        "a frozen norm trained with the rest of its block",
    ),
    Fault(
        "frozen_norm_has_no_gradient",
        _MODULES + "conv_bn_act.py",
        "        tensors += [bn.weight, bn.bias]\n",
        "        tensors += []\n",
        (_STATE + "test_a_frozen_norm_alone_learns",),
        "gradients of a frozen batch norm's weight lost",
    ),
    Fault(
        "frozen_norm_is_overwritten_under_autograd",
        _MODULES + "bn_act.py",
        "overwrites = overwrite and input.is_cpu and not torch.is_grad_enabled()",
        "overwrites = overwrite and input.is_cpu",
        zoo("frozen_statistics", "no_act"),
        "a step in place that autograd does not see",
    ),
    Fault(
        "residual_of_another_dtype",
        _MODULES + "bn_act.py",
        "        and residual.dtype == output.dtype\n",
        "",
        zoo("sum_of_two_dtypes"),
        "type promotion of an addition lost",
    ),
    Fault(
        "autocast_is_ignored_by_a_chain",
        _MODULES + "conv_chain.py",
        '            or torch.is_autocast_enabled("cpu")\n',
        "",
        ("tests/test_whole_network.py::test_autocast_is_obeyed",),
        "float32 where autocast wants bfloat16",
    ),
    Fault(
        "ceil_mode_is_ignored",
        _MODULES + "max_pool.py",
        "            or pool.ceil_mode\n",
        "",
        ("tests/test_max_pool.py",),
        "a pool that rounds its size up run as one that does not",
    ),
    Fault(
        "second_gradient_of_a_residual_replaces_the_first",
        _OPS + "train_block.py",
        "grads[step.residual] = grad if known is None else known + grad",
        "grads[step.residual] = grad",
        _BLOCK,
        "gradient of a value that several read",
    ),
    Fault(
        "recomputed_output_takes_the_first_input",
        _OPS + "train_block.py",
        "values.source(block.steps[last].input), values.conv(last))",
        "values.source(block.steps[0].input), values.conv(last))",
        _BLOCK,
        "memory='low' computes again from the wrong value",
    ),
    Fault(
        "library_gradient_without_the_residual",
        _OPS + "train_conv.py",
        "grad_input = by_library[0] if residual is None else by_library[0] + residual",
        "grad_input = by_library[0]",
        _BLOCK,
        "residual's gradient missing in one of two branches",
    ),
    Fault(
        "processes_weigh_the_same",
        _OPS + "synchronise.py",
        "exact = (counts * means).sum(0) / total",
        "exact = means.mean(0)",
        _DISTRIBUTED,
        "mean over processes with different numbers of images",
    ),
    Fault(
        "derivative_without_the_residual",
        _OPS + "autograd.py",
        """    if residual is not None:
        argument = argument + residual.to(dtype)
""",
        "",
        (
            "tests/test_functional.py::test_scale_shift",
            "tests/test_functional.py::test_conv_backward",
        ),
        "derivative taken where the residual was not added yet",
    ),
    Fault(
        "onednn_relu_drops_nan",
        _PACKAGE + "backends/onednn.py",
        "        fits = bound < _SAFE_BOUND\n",
        "        fits = True\n",
        (
            "tests/test_functional.py::test_odd_pixels_through_every_operator",
            _STATE + "test_one_odd_pixel_spreads_as_in_eager",
        ),
        "a maximum that drops NaN, in oneDNN",
    ),
)
