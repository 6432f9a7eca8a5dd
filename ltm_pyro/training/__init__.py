"""Training under Lightning, from a recipe to a run directory; only this folder knows Lightning."""
