"""What is printed: JSON for scripts; for people text without markup, because a path may contain ``[bold]``."""

import json
import math
from functools import partial
from typing import Any

from rich.console import Console as RichConsole

Console = partial(RichConsole, markup=False, emoji=False)


def print_json(found: Any) -> None:
    """Prints one JSON value; numbers that are not finite, which JSON does not have, become null."""
    print(json.dumps(finite(found), allow_nan=False))


def finite(value: Any) -> Any:
    """Nested figures for JSON: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
