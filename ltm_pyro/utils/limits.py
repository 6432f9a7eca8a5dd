"""Limits of what a user can give, importable without torch."""

LARGEST_SEED = 2**32 - 1  # of NumPy's global generator, which Lightning, Optuna and scikit-learn seed
