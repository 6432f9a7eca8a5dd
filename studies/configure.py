"""Recipe settings, as every study writes them: a recipe with some of its keys changed."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from ltm_pyro.errors import UsageError
from ltm_pyro.training.recipe import read_recipe
from ltm_pyro.training.run_directory import CHECKPOINT
from ltm_pyro.utils.files import atomic_write, new_folder

Values = dict[str, Any]  # such as dotted recipe keys and their values


def recipe_file(name: str) -> str:
    """The path of a recipe that comes with the studies."""
    return str(files("ltm_pyro.studies") / "recipes" / name)


def as_options(settings: Mapping[str, Any]) -> list[str]:
    """Recipe settings as options of `ltm fit`: ``--KEY=VALUE``, values that are not text as JSON."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def configure(recipe: str, settings: Mapping[str, Any], own: bool = True, trust: bool = False) -> Namespace:
    """A recipe with some keys changed.

    Args:
        recipe: a file.
        settings: dotted key to value.
        own: False if recipe and settings come from a storage or a file, not from the user.
        trust: lets what is not the user's own name any code, as ``ltm fit --trust`` does.

    Raises:
        UsageError: the recipe does not have one of the keys, or code of others is named without trust.
    """
    return read_recipe(["--config", recipe, *as_options(settings), *(["--trust"] if trust else [])], own)


def resume_options(run: Path) -> tuple[str, ...]:
    """The options of `ltm fit` with which a training goes on if it was begun, and else replaces what is there."""
    checkpoint = run / CHECKPOINT
    return ("--ckpt_path", str(checkpoint)) if checkpoint.exists() else ("--force",)


def keep_settings(path: Path, settings: Mapping[str, Any], what: str, others: str) -> None:
    """Writes down what a folder of runs is about; refuses one that is about something else.

    Args:
        what: the folder holds, such as "a comparison".
        others: how one that was made otherwise is described, such as "with another recipe".
    """
    out = path.parent
    try:
        if path.exists() and json.loads(path.read_text("utf-8")) != settings:
            raise UsageError(f"{out} holds {what} {others}: choose another --out.")
        with new_folder(out), atomic_write(path) as new:
            new.write_text(json.dumps(settings, ensure_ascii=False), "utf-8")
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"{out} cannot hold {what} ({error}): choose another --out.") from None
