"""The search behind every study: Optuna chooses, a process of its own trains, shared storage keeps the results."""

from typing import Any

from ltm_pyro.studies.search.objective import Setting, score, train_and_score

__all__ = ["Setting", "Study", "score", "train_and_score"]


def __getattr__(name: str) -> Any:
    if name == "Study":  # lazily: it needs the modules that import this one
        from ltm_pyro.studies.search.manage import Study

        return Study
    raise AttributeError(name)
