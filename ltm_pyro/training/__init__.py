"""Training with Lightning, from a recipe to a run directory; no other folder imports Lightning."""
