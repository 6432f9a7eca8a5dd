"""Estimators of −log p(x) against exact values, and which of them are bounds."""

import math
from dataclasses import replace

import pytest
import torch

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import FullCovariance, MeanField, Point
from ltm_pyro.inference.elbo import prior_log_likelihood
from ltm_pyro.inference.estimators import ESTIMATORS, Problem, evaluate
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.pareto import TRUSTED, pareto_k
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import AutoregressivePrior, GaussianPrior, LinearGaussianModel, MixturePrior


@pytest.fixture
def make_problem():
    def make(guide_class, samples=500, **options):
        model = LinearGaussianModel(ThoughtShape(2, 1, 2))
        batch = model.sample_batch(6)
        guide = guide_class(model)
        inference = LocalInference(**{"steps": 200, "rate": 0.05, "particles": 16, **options})
        state, _ = infer_local(model, guide, batch, inference)
        return Problem(
            model=model, guide=guide, batch=batch, inference=inference, samples=samples, state=state, block=2
        )

    return make


def log_probability(name, problem):
    repeats = 3 if name in ("ais", "causal", "reused_noise") else 8  # those fit q or run chains each time
    with torch.no_grad():
        values = torch.stack([-ESTIMATORS[name].estimate(problem).nats_B.sum() for _ in range(repeats)])
    return values.mean().item(), values.std().item() / math.sqrt(repeats)


@pytest.mark.parametrize("guide_class", [MeanField, FullCovariance])
@pytest.mark.parametrize("name", [name for name, estimator in ESTIMATORS.items() if estimator.is_bound])
def test_no_bound_exceeds_the_evidence(make_problem, name, guide_class):
    problem = make_problem(guide_class)
    estimate, error = log_probability(name, problem)
    assert estimate <= problem.model.log_evidence(problem.batch).sum().item() + 3 * error


def test_prior_bound_and_iwae_are_ordered(make_problem):
    problem = make_problem(MeanField)
    (prior, _), (bound, e1), (iwae, e2) = (log_probability(name, problem) for name in ("prior", "bound", "iwae"))
    evidence = problem.model.log_evidence(problem.batch).sum().item()
    assert prior < bound <= iwae + 3 * (e1 + e2)
    assert iwae <= evidence + 3 * e2


def test_reused_noise_exceeds_the_evidence_and_is_no_bound(make_problem):
    problem = make_problem(MeanField, steps=500, particles=1)
    estimate, _ = log_probability("reused_noise", problem)
    assert estimate > problem.model.log_evidence(problem.batch).sum().item()
    assert not ESTIMATORS["reused_noise"].is_bound


def test_causal_equals_the_evidence_if_q_is_exact(make_problem):
    problem = make_problem(FullCovariance, samples=3000, steps=300, particles=64, kl="path")
    estimate, error = log_probability("causal", problem)
    assert estimate == pytest.approx(problem.model.log_evidence(problem.batch).sum().item(), abs=0.3 + 4 * error)


@pytest.mark.parametrize("guide_class", [MeanField, Point])
def test_before_the_first_block_z_comes_from_the_prior(make_problem, guide_class):
    """Not from q: `Point` is a single point, and `MeanField` would start between the prior's two modes."""
    problem = make_problem(guide_class, steps=0, samples=8)
    shape = problem.model.prior.shape
    problem.model.prior = MixturePrior(shape, components=2)
    problem = replace(problem, block=problem.batch.inputs_BT.shape[1])
    with torch.no_grad():
        torch.manual_seed(0)
        log_likelihood_SB = prior_log_likelihood(problem.model, problem.batch, 8)
        torch.manual_seed(0)
        nats_B = ESTIMATORS["causal"].estimate(problem).nats_B
    torch.testing.assert_close(nats_B, math.log(8) - log_likelihood_SB.logsumexp(0))


def test_causal_does_not_depend_on_later_tokens(tiny_model, tiny_batch):
    model, batch = tiny_model(), tiny_batch(size=2, length=12)
    guide, inference = MeanField(model), LocalInference(steps=4, rate=0.3)
    changed = batch.targets_BT.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 11

    def first_blocks(targets_BT):
        kept = batch._replace(targets_BT=targets_BT, mask_BT=batch.mask_BT & (torch.arange(12) < 8))
        torch.manual_seed(0)
        state, _ = infer_local(model, guide, kept, inference)
        problem = Problem(model=model, guide=guide, batch=kept, inference=inference, samples=4, state=state, block=4)
        torch.manual_seed(1)
        with torch.no_grad():
            return ESTIMATORS["causal"].estimate(problem).nats_B

    torch.testing.assert_close(first_blocks(batch.targets_BT), first_blocks(changed))


@pytest.mark.parametrize("prior", [GaussianPrior, AutoregressivePrior])
def test_without_thoughts_every_estimator_is_the_autoregressive_loss(tiny_model, tiny_batch, prior):
    model, batch = tiny_model(thoughts=0), tiny_batch()
    model.prior = prior(model.decoder.thought_shape)
    scores = evaluate(model, MeanField(model), [batch], LocalInference(steps=4), tuple(ESTIMATORS), samples=3).estimates
    assert len({round(score.nats_per_token, 10) for score in scores.values()}) == 1


def test_a_score_does_not_depend_on_the_other_estimators(tiny_model, tiny_batch):
    model, batches = tiny_model(), [tiny_batch(), tiny_batch()]
    guide, inference = MeanField(model), LocalInference(steps=3)
    together = evaluate(model, guide, batches, inference, samples=4)
    alone = evaluate(model, guide, batches, inference, ["iwae"], samples=4)
    assert together.estimates["iwae"] == alone.estimates["iwae"]
    assert evaluate(model, guide, batches, inference, ["iwae", "iwae"], samples=4) == alone
    assert together == evaluate(model, guide, batches, inference, samples=4)


def test_a_batch_of_one_sequence_has_shuffled_thoughts_of_the_prior(tiny_model, tiny_batch):
    model = tiny_model()
    batches = [tiny_batch(), (alone := tiny_batch().select(torch.tensor([0])))]
    guide, inference = MeanField(model), LocalInference(steps=1)
    found = evaluate(model, guide, batches, inference, ["shuffled"], samples=8).rows.scores["shuffled"]
    prior = evaluate(model, guide, [alone], inference, ["prior"], samples=8).rows.scores["prior"]
    torch.testing.assert_close(found.nats_B[-1:], prior.nats_B)
    assert (found.nats_stderr_B > 0).all()


def test_scores_are_per_token_not_per_sequence(tiny_model, tiny_batch):
    model, batch = tiny_model(thoughts=0), tiny_batch(size=3, length=7)
    result = evaluate(model, MeanField(model), [batch], LocalInference(steps=0), ["bound"], samples=1)
    score = result.estimates["bound"]
    assert (result.tokens, result.sequences, result.bytes) == (18, 3, 36)
    assert score.perplexity == pytest.approx(math.exp(score.nats_per_token))
    assert score.bits_per_byte == pytest.approx(score.nats_per_token * 18 / math.log(2) / 36)
    assert score.stderr_nats_per_token > 0


def test_unknown_estimators_and_zero_samples_are_refused(tiny_model, tiny_batch):
    model = tiny_model()
    with pytest.raises(UsageError, match="Unknown estimator 'elbo': choose from bound"):
        evaluate(model, MeanField(model), [tiny_batch()], LocalInference(), ["elbo"])
    with pytest.raises(UsageError, match="Samples must be at least 1, got 0"):
        evaluate(model, MeanField(model), [tiny_batch()], LocalInference(), samples=0)


def test_k_hat_distinguishes_light_from_heavy_tails():
    torch.manual_seed(0)
    light = torch.randn(4000, 3) * 0.1
    heavy = torch.distributions.Exponential(1.0).sample((4000, 3)) * 1.2  # weights with a Pareto tail of shape 1.2
    assert (pareto_k(light) < 0.5).all()
    assert (pareto_k(heavy) > TRUSTED).all()
    assert (pareto_k(torch.zeros(100, 2)) == -torch.inf).all()
    rounding = 4e-6 * torch.randint(-1, 2, (100, 64))  # as for an exact q in float32: few distinct values
    assert (pareto_k(rounding.float()) == -torch.inf).all()
    for heaviest in range(1, 20):
        weights = torch.full((100, 1), -2000.0)
        weights[:heaviest, 0] = torch.linspace(-5, 0, heaviest)
        assert pareto_k(weights)[0] > TRUSTED
    assert pareto_k(torch.randn(1000, 1, dtype=torch.float32) * 60)[0] > TRUSTED
    with pytest.raises(UsageError, match="at least 25 samples, got 10"):
        pareto_k(torch.zeros(10, 2))


def test_a_sequence_without_a_finite_score_is_excluded_with_a_warning():
    model = LinearGaussianModel(ThoughtShape(1, 1, 2))
    batch = model.sample_batch(3)
    finite = evaluate(model, MeanField(model), [batch], LocalInference(steps=1), ["prior"], samples=1)
    model.values_V[0] = torch.nan
    batch.targets_BT[1] = 0
    with pytest.warns(UserWarning, match=r"sequences \[1\]"):
        with_nan = evaluate(model, MeanField(model), [batch], LocalInference(steps=1), ["prior"], samples=1)
    assert (finite.excluded, with_nan.excluded) == ((), (1,))
    assert (finite.sequences, with_nan.sequences) == (3, 2)
    batch.targets_BT[:] = 0
    with pytest.raises(UsageError, match="No sequence"), pytest.warns(UserWarning, match="left out"):
        evaluate(model, MeanField(model), [batch], LocalInference(steps=1), ["prior"], samples=1)
