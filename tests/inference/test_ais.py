"""Annealed importance sampling on a model whose evidence is known: unbiased, close, and sandwiched."""

import math

import pytest
import torch

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import FullCovariance, MeanField
from ltm_pyro.inference.ais import Annealing, annealed_path, forward_ais, reverse_ais
from ltm_pyro.inference.estimators import ESTIMATORS, Problem, estimate, evaluate, fit_problem
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.row_noise import RowKeys, RowNoise
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import LinearGaussianModel

FIT = LocalInference(steps=200, rate=0.05, particles=16)
SEQUENCES = 8


@pytest.fixture
def simulated():
    """The model, its thoughts, the sequences that they generated, and q of each."""
    model = LinearGaussianModel(ThoughtShape(2, 1, 2))
    with torch.no_grad():
        z_BLKD = model.sample_prior(SEQUENCES)
        batch = model.sample_tokens(z_BLKD)
    guide = MeanField(model)
    state, _ = infer_local(model, guide, batch, FIT)
    return model, z_BLKD, batch, guide, state


def log_mean_exp(x_SB):
    return x_SB.logsumexp(0) - math.log(len(x_SB))


def test_both_directions_meet_at_the_evidence(simulated):
    model, z_BLKD, batch, guide, state = simulated
    path = annealed_path(model, guide, batch, state.parameters, Annealing(temperatures=64))
    lower_B = log_mean_exp(forward_ais(path, 256))
    upper_B = -log_mean_exp(-reverse_ais(path, {"z": z_BLKD}, 256))
    evidence_B = model.log_evidence(batch)
    assert (lower_B - evidence_B).mean().abs() < 0.05
    assert (upper_B - evidence_B).mean().abs() < 0.05


@pytest.mark.parametrize("temperatures", [1, 2, 8])
def test_the_sandwich_holds_the_evidence(simulated, temperatures):
    """In expectation, at any number of temperatures; with one chain the two sides are ELBO and EUBO of the path."""
    model, z_BLKD, batch, guide, state = simulated
    path = annealed_path(model, guide, batch, state.parameters, Annealing(temperatures=temperatures, leapfrog=3))
    forward_SB, reverse_SB = forward_ais(path, 200), reverse_ais(path, {"z": z_BLKD}, 200)
    evidence_B = model.log_evidence(batch)
    error_B = 4 * forward_SB.std(0) / 200**0.5
    assert (forward_SB.mean(0) <= evidence_B + error_B).all()
    # the reverse chain of a sequence starts at one draw, so that only the mean over sequences has the expectation
    gap_B = reverse_SB.mean(0) - evidence_B
    assert gap_B.mean() >= -4 * gap_B.std() / SEQUENCES**0.5
    weight_SB = (forward_SB - evidence_B).exp()
    assert ((weight_SB.mean(0) - 1).abs() < 5 * weight_SB.std(0) / 200**0.5 + 1e-3).all(), "the weights are biased"


@pytest.mark.slow
def test_every_bound_decreases_towards_the_evidence_with_samples(simulated):
    """The mean of each bound falls with S and stays above the evidence; `ais` is within 0.05 nats."""
    model, _, batch, guide, state = simulated
    truth = -model.log_evidence(batch).mean().item()
    for name in ("iwae", "prior_iwae", "ais"):
        means, errors, path = [], [], Annealing(temperatures=16, leapfrog=3)
        for samples in (1, 4, 16, 64):
            options = {"model": model, "guide": guide, "batch": batch, "inference": FIT, "state": state}
            problem = Problem(samples=samples, annealing=path, **options)
            repeats = 4 if name == "ais" else 40
            found = torch.stack([ESTIMATORS[name].estimate(problem).nats_B.mean() for _ in range(repeats)])
            means.append(found.mean().item())
            errors.append((found.std() / len(found) ** 0.5).item())
        for (first, e1), (second, e2) in zip(
            zip(means, errors, strict=True), [*zip(means, errors, strict=True)][1:], strict=False
        ):
            assert second <= first + 3 * math.hypot(e1, e2), name
        assert all(mean >= truth - 3 * error for mean, error in zip(means, errors, strict=True)), name
    assert means[-1] == pytest.approx(truth, abs=0.05)


def test_a_sequence_moves_alone(simulated):
    """Step sizes, moves and acceptance are each sequence's own."""
    model, _, batch, guide, _ = simulated
    inference = LocalInference(steps=5, rate=0.05)

    def figures(rows):
        problem = fit_problem(
            model, guide, batch.select(torch.tensor(rows)), inference, 4, annealing=Annealing(temperatures=4)
        )
        return estimate(problem, "ais").nats_B

    whole = figures([*range(SEQUENCES)])
    torch.testing.assert_close(figures([5, 2]), whole[[5, 2]], rtol=0, atol=1e-8)
    torch.testing.assert_close(figures([7]), whole[[7]], rtol=0, atol=1e-8)


def test_step_sizes_are_set_beforehand_and_accepted(simulated):
    model, _, batch, guide, state = simulated
    keys = RowKeys.of_batch(batch, 0)
    path = annealed_path(model, guide, batch, state.parameters, Annealing(), keys)
    before = path.step_size_KB.clone()
    one, again = (forward_ais(path, 4, RowNoise(keys.fold_in("ais"))) for _ in range(2))
    assert torch.equal(path.step_size_KB, before)
    assert torch.equal(one, again)
    assert (path.step_size_KB > 0.1).all()
    assert (path.step_size_KB < 10).all()


def test_converged_or_not_is_said(simulated):
    model, _, batch, guide, _ = simulated
    options = {"samples": [1, 4, 64], "annealing": Annealing(temperatures=16)}
    found = evaluate(model, guide, [batch], FIT, ["bound", "iwae", "prior_iwae"], **options).estimates
    assert found["bound"].converged is None
    assert found["bound"].curve == {}
    assert [*found["iwae"].curve] == [1, 4, 64]
    assert found["iwae"].curve[64].nats_per_token == pytest.approx(found["iwae"].nats_per_token)
    assert found["iwae"].curve[1].nats_per_token > found["iwae"].curve[64].nats_per_token
    assert found["prior_iwae"].converged is False, "64 draws of this prior are far from the posterior"
    few = evaluate(model, guide, [batch], LocalInference(steps=0), ["iwae"], samples=16).estimates["iwae"]
    assert few.converged is False
    full, options = FullCovariance(model), {"samples": 100, "annealing": Annealing(temperatures=4)}
    exact = evaluate(model, full, [batch], FIT, ["iwae", "ais"], **options).estimates
    assert exact["ais"].converged
    assert exact["iwae"].converged


def test_refusals():
    with pytest.raises(UsageError, match="at least 1 temperature and 1 leapfrog step, got 0 and 4"):
        Annealing(temperatures=0)
