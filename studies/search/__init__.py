"""The search behind every study: Optuna chooses, a process of its own trains, shared storage keeps the results."""

from ltm_pyro.studies.search.objective import Setting, score, train_and_score

__all__ = ["Setting", "score", "train_and_score"]
