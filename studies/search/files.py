"""Where the recipes that come with the studies are."""

from importlib.resources import files


def recipe_file(name: str) -> str:
    """The path of a shipped recipe."""
    return str(files("ltm_pyro.studies") / "recipes" / name)
