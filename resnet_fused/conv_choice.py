"""Which algorithm runs a convolution on the CPU: what can, and what it is expected to cost.

Costs are multiply-adds at the processor's peak, so that they compare without knowing the machine.
The constants were measured on one Zen 4 (2 cores, AVX-512); the ratios between algorithms are what
matters, and those follow from counting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

NATIVE = (
    "direct", "winograd2", "winograd3", "winograd4", "winograd4_late", "grouped", "strassen",
)  # fmt: skip
"""The library's own algorithms; "onednn" is PyTorch's.

"winograd2" to "winograd4" are F(2x2,3x3) to F(4x4,3x3). Those keep their weights transformed,
16 to 36 numbers for 9; "winograd4_late" transforms them in every call, which pays where there are
few tiles and fetching weights from memory takes longer than multiplying them. Training has it for
smaller tiles too, "winograd2_late" and "winograd3_late", where bfloat16 pairs are multiplied.
"""

_PANEL = 32  # output channels computed together (csrc/cpu/kernel_types.h)
_LEAST_CHANNELS = 16  # per group; with fewer the kernels' vectors are mostly empty
_LEAST_ROUNDED_CHANNELS = 16  # of a group; with fewer rounding Winograd's data to bfloat16 shows
# Where an error is at most 1.25 times eager's, on one thread and on two: with few channels the
# transforms of F(2x2) weigh more than its sums; oneDNN adds up long sums in parts, ours in one.
_STRICT_F2 = range(64, 513)  # channels
_STRICT_LONGEST_SUM = 128  # products of a direct convolution's output
_MOST_F4_CHANNELS = 1024  # with 2048 the error is 3.9e-6, over the default policy's 3e-6
_LEAST_STRASSEN_CHANNELS = 1024  # with fewer its sums take what its products save
_LEAST_STRASSEN_PIXELS = 28  # of an image: with fewer its pairs of tiles are not filled
_MOST_STEP = 2**15 - 1  # of a kernel, stride, padding or dilation (csrc/cpu/conv.h),
_MOST_REACH = 256  # and from a kernel's first tap to its last
_EFFICIENCY = 0.92  # of the peak, of direct convolution: oneDNN's and ours
_GROUPED_EFFICIENCY = 0.75
_ONEDNN_CHANNELS = {False: 20, True: 16}  # of a group, below which oneDNN is as much slower; bf16
_WEIGHT_COST = 19  # multiply-adds in the time that one weight takes from memory (25 GB/s, 235 GF/s)
_CACHED_WEIGHTS = 1 << 18  # floats that stay in L2 from one call to the next
_TRANSFORM_COST = 15  # of a tile's input or output, per channel and point
_PAIR_TRANSFORM_COST = 12  # the same where half as much is written
_LATE_COST = 160  # of a kernel's nine weights becoming 36 in the call
_GATHER_COST = 5  # of a kernel's nine weights being brought together there: products hide it
_PAIRING_COST = 300  # of a kernel's nine weights becoming rounded to pairs in the call,
_PAIRED_COST = 25  # and for each number that they become: 9, 16 or 25
_LATE_PAIR_COST = 18  # for each number of a kernel where that is done beside the products
_LATE_TILES = 14  # for which they are transformed once
_LATE_PAIR_TILES = 64
_BF16_GRAD_COST = 400  # of PyTorch's gradient of a bfloat16 weight, and of a call: its data written
_BF16_GRAD_CALL = 30_000_000
_CALL_COST = 600_000  # a kernel's start and its threads' barrier: 5 microseconds


@dataclass(frozen=True, slots=True)
class ConvProblem:
    """One convolution with everything its speed depends on."""

    batch: int
    channels: int
    size: tuple[int, int]  # of the input image
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    bf16: bool = False  # float32 otherwise

    def key(self, threads: int) -> str:
        """A name for the problem on so many threads, as the cache of measured choices has it."""
        dtype = "bf16" if self.bf16 else "fp32"
        return f"{dtype} {self.geometry} threads {threads}"

    @property
    def geometry(self) -> str:
        """Its sizes in words, without its dtype."""
        pairs = (self.kernel, self.stride, self.padding, self.dilation)
        shape = "x".join(map(str, (self.batch, self.channels, *self.size, self.out_channels)))
        numbers = " ".join("x".join(map(str, pair)) for pair in pairs)
        return f"{shape} {numbers} groups {self.groups}"

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return height, width


def candidates(problem: ConvProblem, policy: str) -> tuple[str, ...]:
    """The library's own algorithms that may run a problem under a precision policy."""
    if not _has_room(problem):
        return ()
    channels = problem.channels // problem.groups
    outputs = problem.out_channels // problem.groups
    strict = policy == "strict" and not problem.bf16
    direct = _direct_is_admitted(problem, policy)
    if problem.groups > 1 and _is_grouped(problem) and direct:
        return ("grouped",)
    if problem.groups > 1 and min(channels, outputs) < _LEAST_CHANNELS:
        return ()
    found = ["direct"] if direct else []
    if problem.kernel == (3, 3) and problem.dilation == (1, 1):
        rounds_well = not problem.bf16 or channels >= _LEAST_ROUNDED_CHANNELS
        if problem.stride == (1, 1) and (
            (policy == "default" and rounds_well) or (strict and channels in _STRICT_F2)
        ):
            found.append("winograd2")
        if (
            problem.stride in ((1, 1), (2, 2))
            and (policy == "default" or problem.bf16)
            and channels <= _MOST_F4_CHANNELS
        ):
            found.append("winograd4")
            if not problem.bf16:  # pairs of bfloat16 numbers come in time
                found.append("winograd4_late")
        if problem.stride == (2, 2) and policy == "default" and problem.bf16 and rounds_well:
            found.append("winograd3")  # with stride 1 it errs twice as much, like F(4x4) with 2
    if policy == "default" and _is_strassen(problem):
        found.append("strassen")
    return tuple(found)


def _direct_is_admitted(problem: ConvProblem, policy: str) -> bool:
    products = problem.kernel[0] * problem.kernel[1] * problem.channels // problem.groups
    return policy == "default" or problem.bf16 or products <= _STRICT_LONGEST_SUM


def _has_room(problem: ConvProblem) -> bool:
    """Whether the library's kernels take a geometry at all (csrc/cpu/conv.h)."""
    pairs = (problem.kernel, problem.stride, problem.padding, problem.dilation)
    reach = (d * (k - 1) for d, k in zip(problem.dilation, problem.kernel, strict=True))
    return max(map(max, pairs)) <= _MOST_STEP and max(reach) <= _MOST_REACH


def _is_grouped(problem: ConvProblem) -> bool:
    """Whether the kernel for narrow groups takes it (csrc/cpu/grouped_conv.cpp)."""
    channels = problem.channels // problem.groups
    return (
        problem.kernel == (3, 3)
        and problem.stride in ((1, 1), (2, 2))
        and problem.dilation == (1, 1)
        and problem.channels == problem.out_channels
        and problem.channels % 16 == 0
        and channels > 1  # a depthwise convolution waits for memory, in oneDNN too
        and 16 % channels == 0
    )


def _is_strassen(problem: ConvProblem) -> bool:
    """Whether seven products in the place of eight are admitted (csrc/cpu/strassen.cpp)."""
    return (
        problem.kernel == (1, 1)
        and problem.padding == (0, 0)
        and problem.groups == 1
        and not problem.bf16  # the sums of blocks would be rounded
        and problem.channels >= _LEAST_STRASSEN_CHANNELS
        and problem.out_size[0] * problem.out_size[1] >= _LEAST_STRASSEN_PIXELS
        and problem.channels % 32 == 0
        and problem.out_channels % 64 == 0
    )


def multiplies_bf16(problem: ConvProblem, algorithm: str) -> bool:
    """Whether an algorithm multiplies bfloat16 numbers, at twice the speed.

    "grouped" does not, as it lives by permuting numbers. F(4x4) does not: rounding its transformed
    data would cost three times eager's error, so it computes bfloat16 data in float32 and is the
    most exact of all.
    """
    return problem.bf16 and algorithm not in ("winograd4", "winograd4_late", "grouped")


def cost(problem: ConvProblem, algorithm: str) -> float:
    """Expected time, in multiply-adds at the peak; for "onednn" too."""
    channels = problem.channels // problem.groups
    outputs = problem.out_channels // problem.groups
    height, width = problem.out_size
    pixels = problem.batch * height * width
    taps = problem.kernel[0] * problem.kernel[1]
    panels = math.ceil(outputs / _PANEL) * _PANEL
    words = channels / 2 if multiplies_bf16(problem, algorithm) else channels
    if algorithm == "onednn":
        words = math.ceil(words)
        narrow = channels / _ONEDNN_CHANNELS[problem.bf16] if problem.groups > 1 else 1.0
        efficiency = _EFFICIENCY * min(1.0, narrow)
        work = pixels * taps * words * outputs * problem.groups / efficiency
        return max(work, _weight_cost(taps * words * outputs * problem.groups)) + _CALL_COST
    if algorithm == "grouped":
        work = pixels * taps * channels * problem.out_channels
        return work / _GROUPED_EFFICIENCY + _CALL_COST
    if algorithm == "direct":
        sums = _words(problem) * panels * problem.groups
        return max(pixels * sums / _EFFICIENCY, _weight_cost(sums)) + _CALL_COST
    if algorithm == "strassen":
        products = pixels * channels * outputs * 7 / 8 / _EFFICIENCY
        sums = pixels * (20 * channels + 8 * outputs)
        return products + sums + _weight_cost(channels * outputs * 7 / 4) / 2 + _CALL_COST
    late, stride = algorithm.endswith("_late"), problem.stride[0]
    largest = int(algorithm.removeprefix("winograd").removesuffix("_late"))
    entries = problem.batch * _entries(height, largest, stride) * _entries(width, largest, stride)
    products = entries * words * panels * problem.groups / _EFFICIENCY
    each = _PAIR_TRANSFORM_COST if multiplies_bf16(problem, algorithm) else _TRANSFORM_COST
    transforms = entries * (channels + panels) * problem.groups * each
    kernels = words * panels * problem.groups
    if late and multiplies_bf16(problem, algorithm):
        made = 2 * kernels * (largest + 2) ** 2
        products += _late_blocks(problem, largest, _LATE_PAIR_TILES) * made * _LATE_PAIR_COST
    elif late:
        products += _late_blocks(problem, 4, _LATE_TILES) * kernels * _LATE_COST
    weights = (9 if late else (largest + 2) ** 2) * kernels
    return max(products, _weight_cost(weights)) + transforms + 2 * _CALL_COST


def choose(
    problem: ConvProblem, policy: str, measured: str | None = None, *, onednn: bool = True
) -> str:
    """The algorithm that runs a problem: one of :data:`NATIVE`, or "onednn".

    Args:
        measured: the one that was the fastest when it was timed, if any was. It is taken if the
            policy admits it; otherwise the one that is expected to be the fastest.
        onednn: whether PyTorch's is admitted; otherwise one of ours has to be.
    """
    admitted = candidates(problem, policy) + (("onednn",) if onednn else ())
    if measured in admitted:
        return measured
    return min(admitted, key=lambda a: cost(problem, a))


LIBRARY = "library"


class TrainingAlgorithms(NamedTuple):
    """What computes a convolution in training and its gradients; :data:`LIBRARY` is PyTorch."""

    output: str
    input: str
    weight: str


def choose_training(problem: ConvProblem, policy: str) -> TrainingAlgorithms:
    """The algorithms that are expected to be the fastest for a step's three convolutions.

    The weights are packed in every call, so only what packs quickly takes part; the gradient of
    the input is a convolution with the kernel turned, for stride 1.
    """
    if problem.groups > 1 or not _has_room(problem):
        return TrainingAlgorithms(LIBRARY, LIBRARY, LIBRARY)
    # Of bfloat16 data ours multiply in float32, at half the speed; PyTorch's take time for weights.
    height, width = problem.out_size
    kernels = problem.channels * problem.out_channels * problem.kernel[0] * problem.kernel[1]
    slower = 0.7 * problem.batch * height * width * kernels
    loses = problem.bf16 and slower > kernels * _BF16_GRAD_COST + _BF16_GRAD_CALL
    gemm = LIBRARY if loses else "gemm"
    if problem.channels < _LEAST_CHANNELS:
        # The gradient of an image is seldom wanted, and not by whom speed matters to.
        output = "direct" if _direct_is_admitted(problem, policy) else LIBRARY
        return TrainingAlgorithms(output, LIBRARY, gemm)
    if problem.bf16 and (problem.channels % 2 or problem.out_channels % 2):
        return TrainingAlgorithms(LIBRARY, LIBRARY, LIBRARY)
    around = turned(problem)
    if problem.stride == (1, 1):
        input = _quick(around, policy)
    else:
        direct = problem.dilation == (1, 1) and "direct" in training_candidates(around, policy)
        input = "direct" if direct else LIBRARY
    reach = (d * (k - 1) for d, k in zip(problem.dilation, problem.kernel, strict=True))
    if any(p > r for p, r in zip(problem.padding, reach, strict=True)):
        input = LIBRARY
    weight = "winograd4" if "winograd4" in training_candidates(problem, policy) else gemm
    return TrainingAlgorithms(_quick(problem, policy), input, weight)


def training_candidates(problem: ConvProblem, policy: str) -> tuple[str, ...]:
    """The library's own algorithms that may make a problem's output in training.

    And those that make its input's gradient, if the problem is :func:`turned`; with another stride
    than 1 that is direct convolution or none.
    """
    found = ["direct"] if _direct_is_admitted(problem, policy) else []
    if (
        policy == "default"
        and problem.kernel == (3, 3)
        and problem.dilation == (1, 1)
        and problem.stride in ((1, 1), (2, 2))
    ):
        found += ["winograd4", "winograd4_late"]
        if problem.bf16 and problem.channels >= _LEAST_ROUNDED_CHANNELS:
            pairs = "winograd2" if problem.stride == (1, 1) else "winograd3"
            found += [pairs, f"{pairs}_late"]
    return tuple(found)


def turned(problem: ConvProblem) -> ConvProblem:
    """The convolution with the kernel turned that gives the input's gradient, for stride 1.

    Its padding is negative where the problem's is larger than the kernel reaches.
    """
    rows, columns = (
        d * (k - 1) - p
        for d, k, p in zip(problem.dilation, problem.kernel, problem.padding, strict=True)
    )
    return replace(
        problem,
        channels=problem.out_channels,
        out_channels=problem.channels,
        size=problem.out_size,
        padding=(rows, columns),
    )


def _quick(problem: ConvProblem, policy: str) -> str:
    admitted = training_candidates(problem, policy)
    costs = {a: cost(problem, a) + _packing_cost(problem, a) for a in admitted}
    return min(costs, key=lambda a: costs[a], default=LIBRARY)


def _packing_cost(problem: ConvProblem, algorithm: str) -> float:
    """What an algorithm costs more in training, where its weights are packed in every call."""
    kernels = problem.channels * math.ceil(problem.out_channels / _PANEL) * _PANEL
    if algorithm == "winograd4_late":
        return _late_blocks(problem, 4, _LATE_TILES) * kernels * _GATHER_COST
    if multiplies_bf16(problem, algorithm) and not algorithm.endswith("_late"):
        taps = problem.kernel[0] * problem.kernel[1]
        numbers = {"winograd2": 16, "winograd3": 25}.get(algorithm, taps)
        return kernels * (_PAIRING_COST * taps / 9 + _PAIRED_COST * numbers)
    if algorithm == "winograd4":
        # What is written to memory is read before, line by line.
        return kernels * _LATE_COST + 2 * _weight_cost(36 * kernels)
    return 0.0


def _late_blocks(problem: ConvProblem, largest: int, tiles: int) -> int:
    """How often weights that are transformed in the call are: once for so many tiles."""
    height, width = problem.out_size
    return math.ceil(
        problem.batch * math.ceil(height / largest) * math.ceil(width / largest) / tiles
    )


def _words(problem: ConvProblem) -> int:
    """Multiply-adds of direct convolution for one output: of numbers, or of pairs in bfloat16."""
    channels, (rows, columns) = problem.channels // problem.groups, problem.kernel
    if not problem.bf16:
        return rows * columns * channels
    if channels % 2 and channels < 16:  # csrc/cpu/direct_conv.h: paired along the kernel's row
        return rows * math.ceil(columns * channels / 2)
    return rows * columns * math.ceil(channels / 2)


def _weight_cost(words: float) -> float:
    return max(0.0, words - _CACHED_WEIGHTS) * _WEIGHT_COST


def _entries(length: int, largest: int, stride: int) -> int:
    """What one dimension is transformed to, by tiles of at most so many outputs."""
    # A tile of m outputs takes m + 2 points, with stride 2 2m + 1 (csrc/cpu/winograd.h).
    size = {m: m + 2 if stride == 1 else 2 * m + 1 for m in (2, 3, 4)}
    whole, rest = divmod(length, largest)
    if rest == 1 and whole and largest > 2:
        return (whole - 1) * size[largest] + size[largest - 1] + size[2]
    return whole * size[largest] + (size[max(rest, 2)] if rest else 0)
