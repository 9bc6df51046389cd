"""Faults of the Python between a model and its kernels: graphs, modules, operators."""

from __future__ import annotations

from mutation.fault import Fault

_PACKAGE = "resnet_fused/"
_GRAPH, _MODULES, _OPS = _PACKAGE + "graph/", _PACKAGE + "modules/", _PACKAGE + "ops/"
_STATE = "tests/test_fuse_state.py::"
_WHOLE = ("tests/test_whole_network.py::test_a_change_to_a_part_is_seen",)
_BLOCK = ("tests/test_train_block.py",)
_RUNNING = ("tests/test_running_statistics.py",)
_DISTRIBUTED = ("tests/test_distributed.py::test_a_process_without_images_takes_part",)


def _zoo(*names: str, trains: bool = True) -> tuple[str, ...]:
    """What tests/test_graph.py asks of some blocks of block_zoo.py."""
    asked = ["finds_what_is_expected[{}]"]
    for what in ("evaluation", "training")[: 1 + trains]:
        asked += [f"{what}_is_eagers[{{}}-{layout}]" for layout in ("nchw", "nhwc")]
    return tuple(f"tests/test_graph.py::test_{a.format(name)}" for a in asked for name in names)


FAULTS = (
    Fault(
        "value_with_two_readers_is_fused",
        _GRAPH + "match.py",
        "return readers[0] if len(readers) == 1 and readers[0] not in self.taken else None",
        "return readers[0] if readers and readers[0] not in self.taken else None",
        _zoo("conv_read_twice", "bn_read_twice", "sum_read_twice"),
        "a run fused although its value has a second reader",
    ),
    Fault(
        "value_is_its_own_residual",
        _GRAPH + "match.py",
        "if reader is None or add is None or add.left is add.right:",
        "if reader is None or add is None:",
        _zoo("add_itself"),
        "x + x taken for the addition of a residual",
    ),
    Fault(
        "addition_into_the_shortcut",
        _GRAPH + "match.py",
        "if add.inplace and add.left is not run.last:",
        "if add.inplace and add.left is None:",
        _zoo("in_place_on_the_input", trains=False),
        "a write into the other operand lost",
    ),
    Fault(
        "residual_changed_in_between",
        _GRAPH + "match.py",
        "if targets & self._memory([residual]):",
        "if targets & self._memory([residual]) and residual is None:",
        _zoo("shortcut_changed_in_between", "shortcut_changed_before"),
        "residual read after somebody has written to it",
    ),
    Fault(
        "input_changed_in_between",
        _GRAPH + "match.py",
        "if self.order[node] > start and targets & self._memory([run.input]):",
        "if self.order[node] < start and targets & self._memory([run.input]):",
        _zoo("conv_input_changed_after", trains=False),
        "input read after somebody has written to it",
    ),
    Fault(
        "module_called_twice_is_fused",
        _GRAPH + "match.py",
        "if sum(self.module(n) is module for n in self.graph.nodes) > 1:",
        "if sum(self.module(n) is module for n in self.graph.nodes) > 2:",
        _zoo("conv_used_twice", "bn_used_twice"),
        "a module used at two places fused at one",
    ),
    Fault(
        "any_hardtanh_is_relu6",
        _GRAPH + "patterns.py",
        'return Activation("relu6") if (module.min_val, module.max_val) == (0, 6) else None',
        'return Activation("relu6")',
        _zoo("act_hardtanh", "act_hardtanh_6"),
        "an activation's limits ignored",
    ),
    Fault(
        "alpha_of_an_addition_is_ignored",
        _GRAPH + "patterns.py",
        'if not (method or function) or node.kwargs.get("alpha", 1) != 1:',
        "if not (method or function):",
        _zoo("scaled_add"),
        "x + alpha y taken for x + y",
    ),
    Fault(
        "slope_of_a_function_is_ignored",
        _GRAPH + "patterns.py",
        'return _leaky(options.get("negative_slope", 0.01))',
        "return _leaky(0.01)",
        _zoo("leaky_function"),
        "negative_slope ignored",
    ),
    Fault(
        "pre_hooks_are_no_hooks",
        _GRAPH + "trace.py",
        "        or module._forward_pre_hooks\n",
        "",
        _zoo("pre_hook_on_conv"),
        "a hook from before fusing ignored",
    ),
    Fault(
        "forward_that_writes_is_fused",
        _GRAPH + "trace.py",
        """    if written:
        raise""",
        """    if not written and before is None:
        raise""",
        _zoo("stores_an_attribute", "counts_its_calls"),
        "side effects of forward lost",
    ),
    Fault(
        "forward_that_draws_is_fused",
        _GRAPH + "trace.py",
        "        if _equal(start, ends[-1]):\n",
        "        if ends:\n",
        _zoo("scaled_by_a_draw"),
        "a random branch frozen",
    ),
    Fault(
        "hooks_registered_later_are_ignored",
        _GRAPH + "plan.py",
        """                or own["_forward_hooks"]
""",
        "",
        (_STATE + "test_a_hook_registered_after_fuse_fires", *_WHOLE),
        "a hook registered after fusing ignored",
    ),
    Fault(
        "replaced_children_are_ignored",
        _GRAPH + "plan.py",
        "type(child) is not kind\n",
        "False\n",
        ("tests/test_graph.py::test_submodules_changed_after_fuse_are_seen",),
        "a child of another class run as the one before",
    ),
    Fault(
        "attributes_are_frozen",
        _GRAPH + "plan.py",
        "                if own.get(name) != value:\n",
        "                if own.get(name, value) is None:\n",
        ("tests/test_graph.py::test_attribute_changed_after_fuse_is_seen", *_WHOLE),
        "a number that forward reads taken as it was",
    ),
    Fault(
        "padding_mode_is_ignored",
        _GRAPH + "plan.py",
        'if module.padding_mode != "zeros":',
        'if module.padding_mode == "":',
        _zoo("padding_reflect"),
        "reflecting padding run as zeros",
    ),
    Fault(
        "subclasses_of_conv_are_fused",
        _GRAPH + "plan.py",
        "if type(module) is not nn.Conv2d:",
        "if not isinstance(module, nn.Conv2d):",
        _zoo("conv_subclass", "plain_subclass"),
        "an overridden forward lost",
    ),
    Fault(
        "shared_convolutions_are_fused",
        _GRAPH + "analyse.py",
        "        if len(names) > 1\n",
        "        if len(names) > 9\n",
        _zoo("shared_conv", "conv_of_two_blocks"),
        "a module at several places fused",
    ),
    Fault(
        "tied_weights_are_fused",
        _GRAPH + "analyse.py",
        "            if others:\n",
        "            if not others:\n",
        _zoo("tied_weights"),
        "a parameter of two modules taken for one's own",
    ),
    Fault(
        "filter_is_asked_and_ignored",
        _GRAPH + "analyse.py",
        "            while declined := self._declined(plan, module, name):\n",
        "            while (declined := self._declined(plan, module, name)) is None:\n",
        ("tests/test_graph.py::test_filter_decides_each_run",),
        "what the caller declined is fused",
    ),
    Fault(
        "block_swallows_a_value_that_is_read_outside",
        _GRAPH + "group.py",
        "while len(group) > 1 and not all(set(n.users) <= set(group) for n in group[:-1]):",
        "while len(group) > 9 and not all(set(n.users) <= set(group) for n in group[:-1]):",
        _zoo("inner_value_read_outside"),
        "an inner value with a reader outside of its block",
    ),
    Fault(
        "block_without_its_residual",
        _GRAPH + "group.py",
        "place[n.args[3]] if len(n.args) > 3 else -1)",
        "place[n.args[3]] if len(n.args) > 4 else -1)",
        _zoo("biased_block", "sequential_bottleneck"),
        "residual missing in a block",
    ),
    Fault(
        "stem_swallows_a_value_that_is_read_twice",
        _GRAPH + "group.py",
        "            and set(node.users) == {reader}\n",
        "            and reader in node.users\n",
        _zoo("stem_read_twice"),
        "an activation that others read besides the pool",
    ),
    Fault(
        "chain_of_any_order",
        _GRAPH + "group.py",
        "if set(node.users) != {reader} or reader.args[0] is not node:",
        "if reader is None or reader.args[0] is None:",
        _zoo("fork"),
        "blocks joined that read something else",
    ),
    Fault(
        "head_of_several_pixels",
        _GRAPH + "head.py",
        "if isinstance(called, nn.AdaptiveAvgPool2d) and called.output_size not in (1, (1, 1)):",
        "if isinstance(called, nn.AdaptiveAvgPool2d) and called.output_size is None:",
        ("tests/test_head.py",),
        "a pool to more pixels taken for a global one",
    ),
    Fault(
        "failed_fuse_leaves_a_part",
        _GRAPH + "rewrite.py",
        """                _attach(module, open_children(module, plans[module][0]))
        except BaseException:
            _put_back(before)
            raise""",
        """                _attach(module, open_children(module, plans[module][0]))
        except BaseException:
            raise""",
        (_STATE + "test_an_exception_while_plans_are_applied",),
        "a model changed in part by an exception",
    ),
    Fault(
        "copies_forget_what_was_excluded",
        _GRAPH + "rewrite.py",
        'return dict(own.get("_fused_excluded", {})), bool(own.get("_fused_low_memory", False))',
        'return {}, bool(own.get("_fused_low_memory", False))',
        (_STATE + "test_duplicates_leave_out_what_was_declined",),
        "a copy that fuses what the caller had declined",
    ),
    Fault(
        "training_flag_of_a_child_is_ignored",
        _GRAPH + "whole.py",
        'attributes = {**attributes, "training": False}',
        "attributes = dict(attributes)",
        ("tests/test_whole_network.py::test_a_block_that_behaves_otherwise_in_training",),
        "a part in training run as in evaluation",
    ),
    Fault(
        "fuse_changes_the_original",
        _PACKAGE + "api.py",
        """    target = model if inplace else copy.deepcopy(model)
    analysis = analyse(""",
        """    target = model if inplace else copy.copy(model)
    analysis = analyse(""",
        (
            _STATE + "test_copy_leaves_the_original_alone",
            _STATE + "test_in_place_keeps_every_parameter",
        ),
        "a copy that shares the modules",
    ),
    Fault(
        "strict_is_asked_too_late",
        _PACKAGE + "api.py",
        """    left = [c for c in analysis.candidates if c.reason]
""",
        """    left = [c for c in analysis.candidates if c.reason]
    apply(analysis.plans)
""",
        (_STATE + "test_strict_failure_leaves_the_model_as_it_was",),
        "a refused model changed all the same",
    ),
    Fault(
        "fold_with_eps_outside_the_root",
        _PACKAGE + "fold.py",
        "scale = (var.double() + eps).rsqrt()",
        "scale = 1.0 / (var.double().sqrt() + eps)",
        _zoo("momentum_0.9"),
        "eps added to the deviation instead of the variance",
    ),
    Fault(
        "fold_forgets_the_bias",
        _PACKAGE + "fold.py",
        "offset = -mean.double() if conv_bias is None else conv_bias.double() - mean.double()",
        "offset = -mean.double()",
        _zoo("biased_block"),
        "the convolution's own bias lost",
    ),
    Fault(
        "same_padding_is_even",
        _PACKAGE + "packing.py",
        "return None if any(t % 2 for t in total) else [t // 2 for t in total]",
        "return [t // 2 for t in total]",
        _zoo("padding_same_even"),
        "padding on the wrong side of an even kernel",
    ),
    Fault(
        "untracked_statistics_in_evaluation",
        _MODULES + "batch_norm.py",
        'bn.training or (buffers["running_mean"] is None and buffers["running_var"] is None)',
        "bn.training",
        _zoo("no_statistics"),
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
        _zoo("cumulative", "momentum_0.9"),
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
        _zoo("cumulative", "momentum_0.9"),
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
        _zoo("frozen_statistics", "no_act"),
        "a step in place that autograd does not see",
    ),
    Fault(
        "residual_of_another_dtype",
        _MODULES + "bn_act.py",
        "        and residual.dtype == output.dtype\n",
        "",
        _zoo("sum_of_two_dtypes"),
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
