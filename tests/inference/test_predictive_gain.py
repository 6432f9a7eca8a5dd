"""What thinking is worth: the predictive gain where its value is known, and where it has to be 0."""

import math

import pytest
import torch

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.guides import FullCovariance, Laplace, MeanField
from ltm_pyro.inference.elbo import Draws, elbo_terms
from ltm_pyro.inference.estimators import ESTIMATORS, Problem, evaluate, fit_problem
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.scores import GAIN, NatsAndKL, RowScores, is_settled, summarise
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import LinearGaussianModel

EXACT = LocalInference(steps=150, rate=0.1, particles=16, kl="path")  # q is the posterior after it
BLOCK, SEQUENCES, REPEATS = 2, 12, 6


@pytest.fixture
def problem():
    """Makes texts of a linear-Gaussian model, with q fitted to them; ``matrix`` changes what depends on what."""

    def make(matrix=lambda x: x, samples=2000):
        model = LinearGaussianModel(ThoughtShape(3, 1, 2))
        model.matrix_TN = matrix(model.matrix_TN)
        with torch.no_grad():
            batch = model.sample_batch(SEQUENCES)
        return fit_problem(model, FullCovariance(model), batch, EXACT, samples, block=BLOCK)

    return make


def gain(problem):
    """The mean gain of a sequence over repeats with fresh noise, and its Monte Carlo error."""
    problem = problem.__class__(**(vars(problem) | {"state": problem.state._replace(keys=None)}))
    with torch.no_grad():
        with_q, without_q = ([ESTIMATORS[name].estimate(problem).nats_B for _ in range(REPEATS)] for name in GAIN)
    difference_R = (torch.stack(without_q) - torch.stack(with_q)).mean(1)
    return difference_R.mean().item(), (difference_R.std() / math.sqrt(REPEATS)).item()


def exact_gain(problem):
    """Σ_b log p(x_b | x_{<b}) − log p(x_b), in closed form."""
    model, batch, total = problem.model, problem.batch, 0.0
    for first in range(0, batch.inputs_BT.shape[1], BLOCK):
        last = first + BLOCK
        given = model.log_evidence(batch.crop(0, last)) - model.log_evidence(batch.crop(0, first))
        total += (given - model.log_evidence(batch.crop(first, last))).mean().item()
    return total


def by_block(matrix_TN):
    """Each block of observations has thoughts of its own, so that the text before says nothing about them."""
    block_T = torch.arange(matrix_TN.shape[0])[:, None] // BLOCK
    return 2 * matrix_TN * (block_T == torch.arange(matrix_TN.shape[1]) // BLOCK)


def test_it_is_the_closed_form_if_q_is_exact(problem):
    made = problem()
    value, error = gain(made)
    assert exact_gain(made) > 0.2
    assert value == pytest.approx(exact_gain(made), abs=4 * error + 0.03)


def test_it_is_zero_where_the_past_says_nothing(problem):
    made = problem(by_block)
    assert exact_gain(made) == pytest.approx(0, abs=1e-9)
    value, error = gain(made)
    assert value == pytest.approx(0, abs=4 * error + 0.03)
    fitted = evaluate(made.model, made.guide, [made.batch], EXACT, ["bound", "prior"], samples=50).estimates
    assert fitted["bound"].kl_nats_per_token > 0.2, "thoughts are used"
    assert fitted["prior"].nats_per_token - fitted["bound"].nats_per_token > 0.5, "Jensen's gap is no gain"


def test_it_is_zero_for_a_decoder_that_ignores_z(problem, tiny_model, tiny_batch):
    value, _ = gain(problem(torch.zeros_like, samples=3))
    assert value == pytest.approx(0, abs=1e-9)
    model = tiny_model()
    for name, parameter in model.decoder.named_parameters():
        if "cross" in name:
            torch.nn.init.zeros_(parameter)
    options = {"estimators": GAIN, "samples": 4, "block": 2}
    found = evaluate(model, MeanField(model), [tiny_batch()], LocalInference(steps=4, rate=0.3), **options)
    assert found.predictive_gain.nats_per_token == pytest.approx(0, abs=1e-9)


def test_it_is_zero_for_thoughts_of_other_texts(problem):
    """Each draw comes from the q of a text that is chosen anew: together they are the prior, if q is exact."""
    made, draws = problem(), 2400
    model, guide, batch = made.model, made.guide, made.batch
    with torch.no_grad():
        many = model.sample_batch(draws)
        gains = []
        for first in range(BLOCK, batch.inputs_BT.shape[1], BLOCK):
            local = infer_local(model, guide, many.crop(0, first), EXACT)[0].parameters
            block, log_p = batch.crop(first, first + BLOCK), []
            for start in range(0, draws, SEQUENCES):
                shuffled = {name: x[start : start + SEQUENCES] for name, x in local.items()}
                if start + SEQUENCES <= draws:
                    log_p.append(elbo_terms(model, guide, block, shuffled, Draws()).log_likelihood_B)
            found_B = torch.stack(log_p).logsumexp(0) - math.log(len(log_p))
            gains.append(found_B - model.log_evidence(block))
    gain_B = torch.stack(gains).sum(0)
    assert gain_B.mean().item() == pytest.approx(0, abs=4 * (gain_B.std() / SEQUENCES**0.5).item() + 0.03)


def test_the_first_block_gains_nothing_to_the_last_digit(problem):
    made = problem(samples=5)
    whole = Problem(**(vars(made) | {"block": made.batch.inputs_BT.shape[1]}))
    with torch.no_grad():
        with_q, without_q = (ESTIMATORS[name].estimate(whole).nats_B for name in GAIN)
    assert torch.equal(with_q, without_q)


def test_an_evaluation_has_it_paired_and_says_if_it_has_settled(problem):
    made = problem()
    options = {"estimators": GAIN, "block": BLOCK}
    found = evaluate(made.model, made.guide, [made.batch], EXACT, samples=[4, 500, 32_000], **options)
    with_q, without_q = (found.estimates[name] for name in GAIN)
    gain = found.predictive_gain
    assert gain.nats_per_token == pytest.approx(without_q.nats_per_token - with_q.nats_per_token)
    assert gain.nats_per_token * made.batch.inputs_BT.shape[1] == pytest.approx(exact_gain(made), abs=0.1)
    assert gain.interval[0] < gain.nats_per_token < gain.interval[1]
    assert without_q.converged
    assert [*without_q.curve] == [4, 500, 32_000]
    assert without_q.curve[4].nats_per_token > without_q.curve[32_000].nats_per_token
    few = evaluate(made.model, made.guide, [made.batch], EXACT, samples=8, **options).estimates
    assert few["causal_prior"].converged is False
    assert evaluate(made.model, made.guide, [made.batch], EXACT, ["causal"], samples=2).predictive_gain is None


def test_a_curve_says_what_it_costs(problem):
    made = problem()
    inference = LocalInference(steps=5, particles=3)
    options = {"estimators": ["iwae", "prior_iwae", "causal"], "samples": [1, 16]}
    found = evaluate(made.model, made.guide, [made.batch], inference, **options).estimates
    assert [point.passes for point in found["iwae"].curve.values()] == [31, 46]
    assert [point.passes for point in found["prior_iwae"].curve.values()] == [1, 16]
    assert [point.passes for point in found["causal"].curve.values()] == [None, None]
    assert found["iwae"].curve[16].stderr_nats_per_token == pytest.approx(found["iwae"].stderr_nats_per_token)
    laplace = evaluate(made.model, Laplace(made.model), [made.batch], inference, ["iwae"]).estimates["iwae"]
    assert laplace.curve[16].passes == 46 + 2 * 12, "two gradients for each of 6 coordinates, each forward and back"


def test_batches_of_other_lengths_are_joined():
    """A shorter batch has fewer blocks; what is missing adds nothing."""
    short, long = torch.randn(4, 1, 2), torch.randn(4, 3, 5)
    joined = NatsAndKL.concatenate([NatsAndKL.of_weights(x) for x in (short, long)])
    assert joined.log_weights_SJB.shape == (4, 3, 7)
    torch.testing.assert_close(joined.curve(4), joined.nats_B)
    rows = RowScores(torch.arange(7), None, torch.full((7,), 3.0), torch.ones(7), dict.fromkeys(GAIN, joined))
    found = summarise(
        rows._replace(scores=rows.scores | {"causal": _better(joined)}), [4], dict.fromkeys(GAIN, False), 0
    )
    assert found.shorter_than_a_block == 2
    assert found.predictive_gain.nats_per_token == pytest.approx(1), "over the five that have more than a block"
    assert (
        summarise(
            rows._replace(scores=dict.fromkeys(GAIN, _one_block(joined))), [4], dict.fromkeys(GAIN, False), 0
        ).predictive_gain
        is None
    )


def _better(result):
    """By 3 nats in the second block, where there is one."""
    weights_SJB = result.log_weights_SJB.clone()
    weights_SJB[:, 1, 2:] += 3
    return NatsAndKL.of_weights(weights_SJB)


def _one_block(result):
    return NatsAndKL.of_weights(result.log_weights_SJB[:, :1])


@pytest.mark.parametrize(("shape", "settled"), [(0.1, True), (0.8, False)])
def test_a_figure_has_settled_if_its_curve_says_so(shape, settled):
    """Weights with heavy tails, whose average falls much more slowly than 1 / S: the right value is 0 nats."""
    samples, texts = 4096, 400
    weights_SB = torch.distributions.Pareto(torch.tensor(1.0), torch.tensor(1 / shape)).sample((samples, texts))
    result = NatsAndKL.of_weights((weights_SB * (1 - shape)).log()[:, None])
    tokens_B = torch.full((texts,), 20.0)
    fallen = (result.curve(samples // 4) - result.nats_B).sum() / tokens_B.sum()
    left = result.nats_B.sum() / tokens_B.sum()
    assert fallen < 0.003, "a gap that falls as 1 / S would have settled"
    assert (left < 0.001) == settled
    assert is_settled(result, tokens_B) == settled
    assert not is_settled(NatsAndKL.of_weights(result.log_weights_SJB[:8]), tokens_B), "too few to know"
