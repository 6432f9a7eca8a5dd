"""Figures as JSON, which has no numbers that are not finite."""

import json
import math
from typing import Any


def print_json(found: Any) -> None:
    """Prints one JSON value for scripts; numbers that are not finite become null."""
    print(json.dumps(finite(found), allow_nan=False))


def finite(value: Any) -> Any:
    """Nested figures for JSON: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
