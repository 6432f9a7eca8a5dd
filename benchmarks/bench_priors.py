"""What two priors find when there is something to find: components of a mixture, and unused dimensions.

    python benchmarks/bench_priors.py [--seed 0] [--figure docs/figures/priors.png]

Thoughts are drawn from a known density and observed through a known linear decoder with noise, so that the truth is
known. Only the prior learns; q is inferred sequence by sequence; figures are of fresh sequences.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ltm_pyro import DualRateSVI, LocalInference, ThoughtShape, evaluate, infer_local
from ltm_pyro.guides import MeanField
from ltm_pyro.models import GaussianPrior, LearnedGaussianPrior, LinearGaussianModel, MixturePrior, SparsePrior
from ltm_pyro.utils.rng import seeded
from ltm_pyro.utils.statistics import clustered_mean

TRAIN, TEST, BATCH = 1024, 512, 128
LOCAL = LocalInference(steps=16, rate=0.2, slow_gradient="last")  # the prior follows its gradient at the final q
FINAL = LocalInference(steps=64, rate=0.1, particles=4)


def train_prior(model: LinearGaussianModel, data: Any, steps: int, rate: float) -> None:
    """Trains the prior on the ELBO, with sixteen fast steps for the q of each batch."""
    rates = lambda name: {"lr": 0.1 if name.startswith("local.") else rate}  # noqa: E731
    svi = DualRateSVI(model, MeanField(model), rates, LOCAL, corpus=TRAIN)
    for _ in range(steps):
        svi.step(data.select(torch.randint(0, TRAIN, (BATCH,))))


def bound(model: LinearGaussianModel, data: Any) -> Tensor:
    """Honest bound on −log p(x) of each sequence, in nats."""
    rows = evaluate(model, MeanField(model), [data], FINAL, ["bound"], samples=32).rows
    assert rows is not None
    return rows.scores["bound"].nats_B


def summary(nats_B: Tensor, truth_B: Tensor) -> dict[str, float]:
    """A bound, and by how much it is above that of the prior that thoughts were drawn from, by sequence."""
    mean, above = clustered_mean(nats_B), clustered_mean(nats_B - truth_B)
    return {"bound": mean.value, "stderr": mean.stderr, "above": above.value, "above_stderr": above.stderr}


def mixture(seed: int) -> dict[str, Any]:
    shape, nats = ThoughtShape(1, 2, 4), {}
    with seeded(seed):
        model = LinearGaussianModel(shape, length=16, noise=0.5)
        truth = MixturePrior(shape, components=2)
        with torch.no_grad():
            truth.mean_MLKD.copy_(torch.randn(1, *shape).sign() * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
            truth.log_scale_MLKD.fill_(-1.0)
        model.prior = truth
        training, test = model.sample_batch(TRAIN), model.sample_batch(TEST)
        with torch.no_grad():
            truths_B = truth.responsibilities(least_squares(model, test))[:, 0] > 0.5
        nats["the truth"] = bound(model, test)
        for prior in (GaussianPrior(shape), LearnedGaussianPrior(shape), MixturePrior(shape, components=2)):
            model.prior = prior
            if any(True for _ in prior.parameters()):
                train_prior(model, training, 150, 0.05)
            nats[type(prior).__name__] = bound(model, test)
        state, _ = infer_local(model, MeanField(model), test, FINAL)
        with torch.no_grad():
            found_B = model.prior.responsibilities(state.parameters["z_loc"])[:, 0] > 0.5
    agreement = (found_B == truths_B).double().mean().item()
    figures = {name: summary(nats_B, nats["the truth"]) for name, nats_B in nats.items()}
    return {"bounds": figures, "assignment_accuracy": max(agreement, 1 - agreement)}


def least_squares(model: LinearGaussianModel, data: Any) -> torch.Tensor:
    """The thoughts nearest to the observations: 16 of 8 numbers, so least squares separates the components."""
    z_BN = torch.linalg.lstsq(model.matrix_TN, model.observed(data).T).solution.T
    return z_BN.unflatten(-1, (1, 2, 4))


def sparse(seed: int) -> dict[str, Any]:
    shape = ThoughtShape(1, 4, 8)
    with seeded(seed):
        model = LinearGaussianModel(shape, length=24, noise=0.5, seed=seed)
        useful_N = torch.zeros(32, dtype=torch.bool)
        useful_N[torch.randperm(32)[:8]] = True
        model.matrix_TN[:, ~useful_N] = 0.0
        model.matrix_TN *= 2.0  # as much signal in 8 columns as in 32
        training = model.sample_batch(TRAIN)
        model.prior = SparsePrior(shape)
        train_prior(model, training, 400, 0.03)
        on_N, scale_N = model.prior.active().flatten(), model.prior.scale.median.flatten()
    return {
        "useless_off": (~on_N[~useful_N]).double().mean().item(),
        "useful_on": on_N[useful_N].double().mean().item(),
        "scales_useful": sorted(scale_N[useful_N].tolist(), reverse=True),
        "scales_useless": sorted(scale_N[~useful_N].tolist(), reverse=True),
    }


def plot_priors(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    bounds = figures["mixture"]["bounds"]
    errors = [2 * x["stderr"] for x in bounds.values()]
    left.bar([n.removesuffix("Prior") for n in bounds], [x["bound"] for x in bounds.values()], yerr=errors, capsize=4)
    low = min(x["bound"] for x in bounds.values())
    left.set(ylim=(low - 2, None), title="two kinds of sequences", ylabel="honest bound, nats per sequence")
    for name, colour in (("useful", "C0"), ("useless", "C1")):
        scales = figures["sparse"][f"scales_{name}"]
        first = 0 if name == "useful" else len(figures["sparse"]["scales_useful"])
        right.bar(range(first, first + len(scales)), scales, color=colour, label=name)
    right.axhline(0.3, color="grey", linestyle=":")
    right.set(title="SparsePrior: median scale of 32 dimensions", xlabel="dimension, sorted")
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/priors.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.clear_param_store()
    figures = {"mixture": mixture(options.seed), "sparse": sparse(options.seed)}
    plot_priors(figures, options.figure)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
