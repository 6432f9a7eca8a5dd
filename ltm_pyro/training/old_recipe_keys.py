"""Keys of a recipe that have been renamed: an old one is refused by its new name."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.safe_yaml import load_yaml

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
    """The keys of nested mappings, each behind those above it: ``model``, ``model.inference``, …

    The arguments of a user's own class are left out: they may have any name.
    """
    if isinstance(recipe, Mapping):
        own = not str(recipe.get("class_path", "ltm_pyro.")).startswith("ltm_pyro.")
        for key, value in recipe.items():
            yield f"{above}{key}"
            if not (own and key in ("init_args", "dict_kwargs")):
                yield from dotted_keys(value, f"{above}{key}.")


def option_keys(words: Iterable[str]) -> Iterator[str]:
    """The dotted keys of options, ``--KEY VALUE`` or ``--KEY=VALUE``, and those inside a value that is a mapping."""
    for key, value in option_values(words):
        yield key
        try:
            content = load_yaml(value)
        except yaml.YAMLError:
            content = None
        yield from dotted_keys(content, f"{key}.")


def option_values(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The dotted key and the value of each option, ``--KEY VALUE`` or ``--KEY=VALUE``; empty where there is none."""
    key = ""
    for word in words:
        name, equals, value = word.partition("=") if word.startswith("--") else (f"--{key}", "=", word)
        key = name.removeprefix("--")
        yield key, value if equals and key else ""
