"""Faults of finding runs in a model and rewriting it."""

from __future__ import annotations

from mutation.fault import Fault

_PACKAGE = "resnet_fused/"
_GRAPH = _PACKAGE + "graph/"
_STATE = "tests/test_fuse_state.py::"
_WHOLE = ("tests/test_whole_network.py::test_a_change_to_a_part_is_seen",)


def zoo(*names: str, trains: bool = True) -> tuple[str, ...]:
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
        zoo("conv_read_twice", "bn_read_twice", "sum_read_twice"),
        "a run fused although its value has a second reader",
    ),
    Fault(
        "value_is_its_own_residual",
        _GRAPH + "match.py",
        "if reader is None or add is None or add.left is add.right:",
        "if reader is None or add is None:",
        zoo("add_itself"),
        "x + x taken for the addition of a residual",
    ),
    Fault(
        "addition_into_the_shortcut",
        _GRAPH + "match.py",
        "if add.inplace and add.left is not run.last:",
        "if add.inplace and add.left is None:",
        zoo("in_place_on_the_input", trains=False),
        "a write into the other operand lost",
    ),
    Fault(
        "residual_changed_in_between",
        _GRAPH + "match.py",
        "if targets & self._memory([residual]):",
        "if targets & self._memory([residual]) and residual is None:",
        zoo("shortcut_changed_in_between", "shortcut_changed_before"),
        "residual read after somebody has written to it",
    ),
    Fault(
        "input_changed_in_between",
        _GRAPH + "match.py",
        "if self.order[node] > start and targets & self._memory([run.input]):",
        "if self.order[node] < start and targets & self._memory([run.input]):",
        zoo("conv_input_changed_after", trains=False),
        "input read after somebody has written to it",
    ),
    Fault(
        "module_called_twice_is_fused",
        _GRAPH + "match.py",
        "if sum(self.module(n) is module for n in self.graph.nodes) > 1:",
        "if sum(self.module(n) is module for n in self.graph.nodes) > 2:",
        zoo("conv_used_twice", "bn_used_twice"),
        "a module used at two places fused at one",
    ),
    Fault(
        "any_hardtanh_is_relu6",
        _GRAPH + "patterns.py",
        'return Activation("relu6") if (module.min_val, module.max_val) == (0, 6) else None',
        'return Activation("relu6")',
        zoo("act_hardtanh", "act_hardtanh_6"),
        "an activation's limits ignored",
    ),
    Fault(
        "alpha_of_an_addition_is_ignored",
        _GRAPH + "patterns.py",
        'if not (method or function) or node.kwargs.get("alpha", 1) != 1:',
        "if not (method or function):",
        zoo("scaled_add"),
        "x + alpha y taken for x + y",
    ),
    Fault(
        "slope_of_a_function_is_ignored",
        _GRAPH + "patterns.py",
        'return _leaky(options.get("negative_slope", 0.01))',
        "return _leaky(0.01)",
        zoo("leaky_function"),
        "negative_slope ignored",
    ),
    Fault(
        "pre_hooks_are_no_hooks",
        _GRAPH + "trace.py",
        "        or module._forward_pre_hooks\n",
        "",
        zoo("pre_hook_on_conv"),
        "a hook from before fusing ignored",
    ),
    Fault(
        "forward_that_writes_is_fused",
        _GRAPH + "trace.py",
        """    if written:
        raise""",
        """    if not written and before is None:
        raise""",
        zoo("stores_an_attribute", "counts_its_calls"),
        "side effects of forward lost",
    ),
    Fault(
        "forward_that_draws_is_fused",
        _GRAPH + "trace.py",
        "        if _equal(before, ends[-1]):\n",
        "        if ends:\n",
        zoo("scaled_by_a_draw"),
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
        zoo("padding_reflect"),
        "reflecting padding run as zeros",
    ),
    Fault(
        "subclasses_of_conv_are_fused",
        _GRAPH + "plan.py",
        "if type(module) is not nn.Conv2d:",
        "if not isinstance(module, nn.Conv2d):",
        zoo("conv_subclass", "plain_subclass"),
        "an overridden forward lost",
    ),
    Fault(
        "shared_convolutions_are_fused",
        _GRAPH + "analyse.py",
        "        if len(names) > 1\n",
        "        if len(names) > 9\n",
        zoo("shared_conv", "conv_of_two_blocks"),
        "a module at several places fused",
    ),
    Fault(
        "tied_weights_are_fused",
        _GRAPH + "analyse.py",
        "            if others:\n",
        "            if not others:\n",
        zoo("tied_weights"),
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
        zoo("inner_value_read_outside"),
        "an inner value with a reader outside of its block",
    ),
    Fault(
        "block_without_its_residual",
        _GRAPH + "group.py",
        "place[n.args[3]] if len(n.args) > 3 else -1)",
        "place[n.args[3]] if len(n.args) > 4 else -1)",
        zoo("biased_block", "sequential_bottleneck"),
        "residual missing in a block",
    ),
    Fault(
        "stem_swallows_a_value_that_is_read_twice",
        _GRAPH + "group.py",
        "            and set(node.users) == {reader}\n",
        "            and reader in node.users\n",
        zoo("stem_read_twice"),
        "an activation that others read besides the pool",
    ),
    Fault(
        "chain_of_any_order",
        _GRAPH + "group.py",
        "if set(node.users) != {reader} or reader.args[0] is not node:",
        "if reader is None or reader.args[0] is None:",
        zoo("fork"),
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
)
