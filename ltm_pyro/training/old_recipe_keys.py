"""Keys of a recipe that have been renamed: an old one is refused by its new name."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ltm_pyro.errors import UsageError

RENAMED = {  # old key -> new key; `init_args` is left out of both
    "model.inference.start": "model.inference.init",
    "model.evaluation.start": "model.evaluation.init",
    "model.decoder.quiet_thoughts": "model.decoder.zero_init_cross_attention",
}


def refuse_old_keys(keys: Iterable[str], run: object = None) -> None:
    """Raises `UsageError` if old keys are among dotted ``keys``; the sentence gives their new names.

    Args:
        run: the run whose recipe has the keys, if it is not one that a user has just written.
    """
    given = [f"{key.replace('.init_args.', '.')}." for key in keys]
    found = {old: new for old, new in RENAMED.items() if any(key.startswith(f"{old}.") for key in given)}
    if not found:
        return
    names = ", ".join(f"`{old}` is now `{new}`" for old, new in found.items())
    if run is None:
        raise UsageError(f"{names}: use the new name.")
    raise UsageError(f"The recipe of {run} has old keys: {names}; rename them in it, as CHANGELOG.md shows.")


def dotted_keys(recipe: Any, above: str = "") -> Iterator[str]:
    """The keys of nested mappings, each behind those above it: ``model``, ``model.inference``, …"""
    if isinstance(recipe, Mapping):
        for key, value in recipe.items():
            yield f"{above}{key}"
            yield from dotted_keys(value, f"{above}{key}.")
