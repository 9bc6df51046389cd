"""How much rounding the library may trade for speed: a policy that the user can set."""

from __future__ import annotations

from types import TracebackType

POLICIES = ("strict", "default")

_current = "default"


class precision:
    """Set the precision policy; as a context manager, for a block.

    ``"default"`` admits algorithms whose relative error against float64 (root mean square over an
    output) stays below 3e-6 in float32, Winograd F(4×4, 3×3) among them; a ResNet's logits stay
    within twice eager PyTorch's own error. ``"strict"`` admits those only whose error is at most
    1.25 times eager's; training then does without Winograd and without direct convolutions of long
    sums. Neither changes the dtype of data, nor anything in float64.

    ``resnet_fused.precision("strict")`` sets the policy for good,
    ``with resnet_fused.precision("strict"): ...`` until the block ends. It holds for the whole
    process, all threads included, and for calls made from then on.

    Raises:
        ValueError: `policy` is neither "strict" nor "default".
    """

    def __init__(self, policy: str) -> None:
        global _current
        if policy not in POLICIES:
            raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
        self._before = _current
        _current = policy

    def __enter__(self) -> precision:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _current
        _current = self._before


def current() -> str:
    """The policy in force: "strict" or "default"."""
    return _current
