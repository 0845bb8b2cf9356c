"""Which levels of a backbone a method taps where the user names none."""

from __future__ import annotations

from collections.abc import Sequence

from fettle.errors import ConfigError
from fettle.protocols import Level


def spaced_blocks(offered: Sequence[Level], quarters: Sequence[int]) -> tuple[str, ...]:
    """Blocks of a ViT at these quarters of its depth, 4 is its last; none of a pyramid."""
    blocks = [level.name for level in offered if level.name.startswith("block")]
    numbers = {max(len(blocks) * quarter // 4, 1) - 1 for quarter in quarters}
    return tuple(blocks[number] for number in sorted(numbers)) if blocks else ()


def levels_of_strides(offered: Sequence[Level], strides: Sequence[int], spare: int) -> tuple[str, ...]:
    """Levels of a pyramid with these strides; with `spare` besides where it has fewer than two of them.

    Raises:
        ConfigError: it has none of them.
    """
    chosen = [level for level in offered if level.stride in strides]
    if len(chosen) < 2:
        chosen = [level for level in offered if level.stride == spare] + chosen
    if not chosen:
        offers = ", ".join(level.name for level in offered)
        raise ConfigError(f"None of the levels {offers} is tapped by itself.", "Name some with taps.")
    return tuple(level.name for level in chosen)
