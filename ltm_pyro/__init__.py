"""Latent-Thought Language Models as Pyro programs: the public names, each imported on first use.

Priors and models, p(x, z), are in `ltm_pyro.models`; variational families, q(z | x), are in `ltm_pyro.guides`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltm_pyro.contracts import Batch, Guide, Init, Model, Prior, ThoughtShape, make_batch
    from ltm_pyro.errors import UsageError
    from ltm_pyro.evaluation.evaluate import evaluate_run
    from ltm_pyro.inference.elbo import ElboTerms, elbo_terms
    from ltm_pyro.inference.estimators import evaluate
    from ltm_pyro.inference.global_latents import GlobalLatent
    from ltm_pyro.inference.local import infer_local, training_loss
    from ltm_pyro.inference.pyro_guide import LocalPosterior
    from ltm_pyro.inference.scores import Evaluation
    from ltm_pyro.inference.state import LocalInference, LocalInfo, LocalState
    from ltm_pyro.inference.svi import DualRateSVI
    from ltm_pyro.runs.load import load_run
    from ltm_pyro.runs.run import Run
    from ltm_pyro.text.generation import generate, infill, interpolate
    from ltm_pyro.text.sampling import Sampling
    from ltm_pyro.text.scoring import Scoring, score, score_continuations
    from ltm_pyro.text.streaming import TextStreamer
    from ltm_pyro.text.thoughts import ThoughtSampling
    from ltm_pyro.training.trust import register_class

    __version__: str

__all__ = [
    "Batch",
    "DualRateSVI",
    "ElboTerms",
    "Evaluation",
    "GlobalLatent",
    "Guide",
    "Init",
    "LocalInference",
    "LocalInfo",
    "LocalPosterior",
    "LocalState",
    "Model",
    "Prior",
    "Run",
    "Sampling",
    "Scoring",
    "TextStreamer",
    "ThoughtSampling",
    "ThoughtShape",
    "UsageError",
    "elbo_terms",
    "evaluate",
    "evaluate_run",
    "generate",
    "infer_local",
    "infill",
    "interpolate",
    "load_run",
    "make_batch",
    "register_class",
    "score",
    "score_continuations",
    "training_loss",
]

_PUBLIC = {  # module -> its public names
    "contracts": ("Batch", "Guide", "Model", "Prior", "Init", "ThoughtShape", "make_batch"),
    "errors": ("UsageError",),
    "evaluation.evaluate": ("evaluate_run",),
    "inference.elbo": ("ElboTerms", "elbo_terms"),
    "inference.estimators": ("evaluate",),
    "inference.global_latents": ("GlobalLatent",),
    "inference.local": ("infer_local", "training_loss"),
    "inference.pyro_guide": ("LocalPosterior",),
    "inference.scores": ("Evaluation",),
    "inference.state": ("LocalInference", "LocalInfo", "LocalState"),
    "inference.svi": ("DualRateSVI",),
    "runs.load": ("load_run",),
    "runs.run": ("Run",),
    "text.generation": ("generate", "infill", "interpolate"),
    "text.sampling": ("Sampling",),
    "text.scoring": ("Scoring", "score", "score_continuations"),
    "text.streaming": ("TextStreamer",),
    "text.thoughts": ("ThoughtSampling",),
    "training.trust": ("register_class",),
}


def __getattr__(name: str) -> Any:  # `ltm --help` and `import ltm_pyro` must not wait for torch
    if name == "__version__":
        return version("ltm-pyro")
    for module, names in _PUBLIC.items():
        if name in names:
            return getattr(import_module(f"ltm_pyro.{module}"), name)
    raise AttributeError(f"module 'ltm_pyro' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
