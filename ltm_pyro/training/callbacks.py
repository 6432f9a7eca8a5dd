"""Which of Lightning's own callbacks go with a training that resumes exactly; the others are refused at the start."""

from collections.abc import Collection, Sequence

from pytorch_lightning.callbacks import Callback, EarlyStopping

from ltm_pyro.errors import UsageError

REFUSED = {  # Lightning's callback -> why it does not go with this training, or what to use in its place
    "BackboneFinetuning": "parameters that join later have no place in the slow step: use `warm_start`",
    "BaseFinetuning": "parameters that join later have no place in the slow step: use `warm_start`",
    "BasePredictionWriter": "a training makes no predictions: leave it out",
    "BatchSizeFinder": "the order of the data depends on the batch size: set `data.batch_size`",
    "GradientAccumulationScheduler": "steps have the same size throughout: set `trainer.accumulate_grad_batches`",
    "LearningRateFinder": "the slow rate follows a schedule: set `model.slow.rate`",
    "ModelCheckpoint": "checkpoints are written already: set `checkpoints.every` and `checkpoints.keep`",
    "ModelPruning": "it renames weights, and no run could be loaded from its checkpoints: leave it out",
    "OnExceptionCheckpoint": "the last step is saved after an error already: leave it out",
    "ProgressBar": "there is a progress line already: leave it out",
    "SpikeDetection": "it forgets what it has seen when a training is resumed: set `model.on_nonfinite`",
    "StochasticWeightAveraging": "it would replace the schedule of the slow rate: leave it out",
}
FOR_LOGGERS = ("DeviceStatsMonitor", "LearningRateMonitor", "ThroughputMonitor")  # metrics.csv has no columns for them


def check_callbacks(callbacks: Sequence[Callback], figures: Collection[str], has_logger: bool) -> None:
    """Raises `UsageError` for a callback of Lightning that would fail later, have no effect or not resume exactly.

    Args:
        callbacks: of a recipe and of the caller.
        figures: the names that the training logs, which `EarlyStopping` can monitor.
        has_logger: whether there is a logger besides ``metrics.csv``.
    """
    of_lightning = [{x.__name__ for x in type(c).__mro__ if "lightning" in x.__module__} for c in callbacks]
    ours_or_lightnings = ("ltm_pyro.", "pytorch_lightning.")
    for callback, names in zip(callbacks, of_lightning, strict=True):
        name = type(callback).__name__
        if found := sorted(names & REFUSED.keys()):
            raise UsageError(f"`trainer.callbacks` has {name}, but {REFUSED[found[0]]}.")
        if names & {*FOR_LOGGERS} and not has_logger:
            raise UsageError(
                f"`trainer.callbacks` has {name}, but metrics.csv has no columns for its figures: add a "
                f"`trainer.logger`, or leave it out."
            )
    if all(type(callback).__module__.startswith(ours_or_lightnings) for callback in callbacks):
        for callback in callbacks:  # a callback of the user's own may log further figures
            if isinstance(callback, EarlyStopping) and callback.monitor not in figures:
                raise UsageError(
                    f"EarlyStopping monitors {callback.monitor}, which this training does not log: choose from "
                    f"{', '.join(figures)}."
                )
