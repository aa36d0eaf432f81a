"""How a key of a recipe is declared: one line on its dataclass field says all that anybody needs to know of it."""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any

CORE = "???"  # OmegaConf's mark of a value that is missing: a recipe has to give it

POSITIVE, NOT_NEGATIVE = "must be positive", "must not be negative"
SHARE, PROBABILITY = "must lie in [0, 1)", "must lie in [0, 1]"
HOLDS = {
    POSITIVE: lambda x: x > 0,
    NOT_NEGATIVE: lambda x: x >= 0,
    SHARE: lambda x: 0 <= x < 1,
    PROBABILITY: lambda x: 0 <= x <= 1,
}


def key(
    what: str,
    neutral: Any = CORE,
    *,
    limit: str | None = None,
    choices: tuple[str, ...] = (),
    unit: str = "",
    free: bool = False,
) -> Any:
    """A dataclass field for one key of a recipe.

    Args:
        what: what it decides, in a few words, for `lars keys`.
        neutral: what a recipe or a checkpoint without the key means; without one a recipe has to give it.
        limit: one of the limits above.
        choices: the words that it may be.
        free: it never changes the trajectory, so it may change when a run is resumed.
    """
    told = {"what": what, "limit": limit, "choices": choices, "unit": unit, "free": free}
    if isinstance(neutral, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(neutral), metadata=told)
    return field(default=neutral, metadata=told)
