"""Local inference: initial q, fast steps, known posteriors, early stopping, and what must not change."""

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ltm_pyro.contracts import Init, ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import FullCovariance, MeanField
from ltm_pyro.guides.full_covariance import scale_tril
from ltm_pyro.inference.local import fast_updates, infer_local, init, run_steps, step, training_loss
from ltm_pyro.inference.optimizers import OPTIMIZERS
from ltm_pyro.inference.state import LocalInference, Stop
from ltm_pyro.models import LinearGaussianModel

FEW = LocalInference(steps=3, rate=0.1)


@pytest.fixture
def known():
    model = LinearGaussianModel(ThoughtShape(2, 1, 3))
    return model, model.sample_batch(4)


def test_the_initial_q_is_the_prior_or_as_narrow_as_requested(tiny_model, tiny_batch):
    model, batch = tiny_model(), tiny_batch()
    prior = init(model, MeanField(model), batch, LocalInference(init=Init())).parameters
    narrow = init(model, MeanField(model), batch, LocalInference(init=Init(log_var=-5.0, jitter=0.1))).parameters
    assert prior["z_loc"].shape == (3, 2, 3, 8)
    assert (prior["z_loc"] == 0).all()
    assert (prior["z_log_var"] == 0).all()
    assert (narrow["z_log_var"] == -5).all()
    assert 0.05 < narrow["z_loc"].std() < 0.2


def test_the_info_has_every_step_and_sequence(tiny_model, tiny_batch):
    model = tiny_model()
    state, info = infer_local(model, MeanField(model), tiny_batch(), FEW)
    assert info.elbo_NB.shape == (3, 3)
    assert info.elbo_NB.isfinite().all()
    assert info.is_finite_B.all()
    assert (info.steps_B == 3).all()
    assert (state.steps_B == 3).all()


def test_a_fit_equals_init_and_repeated_steps(tiny_model, tiny_batch):
    """`infer_local` returns the same as `init`, then `step` in a loop."""
    model, batch = tiny_model(), tiny_batch()
    guide = MeanField(model)
    torch.manual_seed(1)
    fitted, info = infer_local(model, guide, batch, FEW)
    torch.manual_seed(1)
    first = state = init(model, guide, batch, FEW)
    for index, update in enumerate(fast_updates(FEW, state, range(FEW.steps))):
        before = {name: x.clone() for name, x in state.parameters.items()}
        new, terms = step(model, guide, batch, FEW, state, update)
        for name, x in before.items():
            assert torch.equal(state.parameters[name], x), "the old state must not change"
        torch.testing.assert_close(terms.elbo_B, info.elbo_NB[index])
        state = new
    assert first.steps_B.tolist() == [0, 0, 0]
    torch.testing.assert_close(state.parameters, fitted.parameters)
    torch.testing.assert_close(state.moments, fitted.moments)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "natural"])
@pytest.mark.parametrize("guide", [MeanField, FullCovariance])
def test_every_optimiser_raises_the_elbo(known, optimizer, guide):
    model, batch = known
    rate = {"sgd": 0.02, "natural": 0.05}.get(optimizer, 0.05)
    inference = LocalInference(steps=150, rate=rate, optimizer=optimizer, particles=32)
    _, info = infer_local(model, guide(model), batch, inference)
    assert (info.elbo_NB[-20:].mean(0) > info.elbo_NB[:5].mean(0)).all()


def test_mean_field_finds_the_best_factorised_gaussian(known):
    model, batch = known
    inference = LocalInference(steps=400, rate=0.2, optimizer="natural", particles=512, noise="antithetic")
    state, _ = infer_local(model, MeanField(model), batch, inference)
    best = model.factorised(batch)
    torch.testing.assert_close(state.parameters["z_loc"].flatten(1), best.mean_BN, atol=1e-3, rtol=0)
    variance = state.parameters["z_log_var"].exp().flatten(1)
    torch.testing.assert_close(variance, best.covariance_BNN.diagonal(dim1=-2, dim2=-1), atol=0, rtol=0.03)


def test_full_covariance_with_the_path_gradient_finds_the_exact_posterior(known):
    model, batch = known
    inference = LocalInference(steps=300, rate=0.1, optimizer="natural", particles=64, noise="antithetic", kl="path")
    state, info = infer_local(model, FullCovariance(model), batch, inference)
    truth, factor = model.posterior(batch), scale_tril(state.parameters["z_factor"])
    torch.testing.assert_close(state.parameters["z_loc"], truth.mean_BN, atol=1e-4, rtol=0)
    torch.testing.assert_close(factor @ factor.mT, truth.covariance_BNN, atol=1e-4, rtol=0)
    torch.testing.assert_close(info.elbo_NB[-1], model.log_evidence(batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("slow_gradient", ["last", "trajectory"])
def test_a_fit_does_not_change_the_model(tiny_model, tiny_batch, slow_gradient):
    model, batch = tiny_model(), tiny_batch()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    infer_local(model, MeanField(model), batch, replace(FEW, slow_gradient=slow_gradient))
    training_loss(model, MeanField(model), batch, replace(FEW, slow_gradient=slow_gradient))
    for name, parameter in model.named_parameters():
        assert (parameter.grad == 7).all()
        assert parameter.requires_grad
        torch.testing.assert_close(parameter.detach(), before[name])
    assert model.training


def test_the_last_slow_gradient_is_that_of_the_elbo_at_the_final_q(tiny_model, tiny_batch):
    from ltm_pyro.inference.elbo import elbo_terms

    model, batch = tiny_model(), tiny_batch()
    guide = MeanField(model)
    torch.manual_seed(1)
    loss, state, *_ = training_loss(model, guide, batch, replace(FEW, slow_gradient="last"))
    ours = torch.autograd.grad(loss, list(model.parameters()))
    torch.manual_seed(1)
    infer_local(model, guide, batch, FEW)  # to reach the same random state
    theirs = torch.autograd.grad(
        -elbo_terms(model, guide, batch, state.parameters).elbo_B.sum(), list(model.parameters())
    )
    torch.testing.assert_close(ours, theirs)


def test_the_trajectory_slow_gradient_is_the_average_over_the_steps(tiny_model, tiny_batch):
    from ltm_pyro.inference.elbo import elbo_terms

    model, batch = tiny_model(), tiny_batch()
    guide, visited = MeanField(model), []
    torch.manual_seed(1)
    loss, *_ = training_loss(model, guide, batch, replace(FEW, slow_gradient="trajectory"))
    loss.backward()
    torch.manual_seed(1)
    state = init(model, guide, batch, FEW)
    for update in fast_updates(FEW, state, range(FEW.steps)):
        visited.append(state.parameters)
        state, _ = step(model, guide, batch, FEW, state, update)
    torch.manual_seed(1)
    init(model, guide, batch, FEW)  # to reach the same random state
    total = sum(-elbo_terms(model, guide, batch, local).elbo_B.sum() for local in visited)
    expected = torch.autograd.grad(total / len(visited), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("optimizer", ["adam", "natural"])
def test_a_fit_continues_from_a_state(tiny_model, tiny_batch, optimizer):
    """Two steps and two more equal four steps exactly: parameters, moments, counts and ELBO."""
    model, batch = tiny_model(), tiny_batch()
    guide, inference = MeanField(model), LocalInference(steps=2, schedule="constant", rate=0.1, optimizer=optimizer)
    torch.manual_seed(1)
    four, info_of_four = infer_local(model, guide, batch, replace(inference, steps=4))
    torch.manual_seed(1)
    two, info_of_two = infer_local(model, guide, batch, inference)
    continued, info_of_continued = infer_local(model, guide, batch, inference, two)
    assert (continued.steps_B == 4).all()
    assert (info_of_continued.steps_B == 2).all()
    exactly = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(continued.parameters, four.parameters, **exactly)
    torch.testing.assert_close(continued.moments, four.moments, **exactly)
    elbo_NB = torch.cat([info_of_two.elbo_NB, info_of_continued.elbo_NB])
    torch.testing.assert_close(elbo_NB, info_of_four.elbo_NB, **exactly)
    assert (two.parameters["z_loc"] != four.parameters["z_loc"]).all()


def test_a_state_of_another_batch_is_refused(tiny_model, tiny_batch):
    model = tiny_model()
    guide = MeanField(model)
    state, _ = infer_local(model, guide, tiny_batch(size=3), FEW)
    with pytest.raises(UsageError, match=r"\(3, 2, 3, 8\).*need.*\(2, 2, 3, 8\)"):
        infer_local(model, guide, tiny_batch(size=2), FEW, state)
    infer_local(model, guide, tiny_batch(size=2), FEW, state.select(torch.tensor([0, 2])))


def test_converged_sequences_are_dropped_and_keep_their_q(known):
    model, batch = known
    inference = LocalInference(steps=400, rate=0.05, particles=16, stop=Stop(window=40, tolerance=0.02))
    sizes = []

    class Counted(MeanField):
        def __call__(self, batch, local):
            sizes.append(batch.size)
            return super().__call__(batch, local)

    state, info = infer_local(model, Counted(model), batch, inference)
    assert sum(sizes) == info.steps_B.sum() < 400 * batch.size
    assert (info.steps_B % 40 == 0).all()
    for sequence, steps in enumerate(info.steps_B.tolist()):
        assert info.elbo_NB[:steps, sequence].isfinite().all()
        assert info.elbo_NB[steps:, sequence].isnan().all()
    best = model.factorised(batch)
    torch.testing.assert_close(state.parameters["z_loc"].flatten(1), best.mean_BN, atol=0.3, rtol=0)


def test_the_elbo_with_reused_noise_exceeds_the_evidence(known):
    model, batch = known
    inference = LocalInference(steps=500, rate=0.05, noise="reused")
    _, info = infer_local(model, MeanField(model), batch, inference)
    assert info.elbo_NB[-1].mean() > model.log_evidence(batch).mean()


def test_with_antithetic_draws_the_gradient_of_the_mean_has_no_noise(known):
    model, batch = known
    guide = MeanField(model)
    inference = LocalInference(steps=1, rate=1.0, optimizer="sgd", particles=2, noise="antithetic")
    first, second = (infer_local(model, guide, batch, inference)[0].parameters for _ in range(2))
    torch.testing.assert_close(first["z_loc"], second["z_loc"])
    assert not torch.allclose(first["z_log_var"], second["z_log_var"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "must not be negative, got -1"),
        ({"particles": 0}, "at least 1, got 0"),
        ({"noise": "reused", "stop": Stop()}, "cannot go with a stopping rule"),
        ({"particles": 3, "noise": "antithetic"}, "pairs, got 3"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        LocalInference(**options)


def test_a_non_finite_sequence_is_reported_and_does_not_affect_the_others(known):
    model, batch = known
    model.values_V[0] = torch.nan
    batch.targets_BT[1] = 0
    state, info = infer_local(model, MeanField(model), batch, FEW)
    assert info.is_finite_B.tolist() == [True, False, True, True]
    assert state.parameters["z_loc"][[0, 2, 3]].isfinite().all()


def test_one_tensor_update_covers_all_local_parameters(tiny_model, tiny_batch, monkeypatch):
    model, calls = tiny_model(), []
    adam = OPTIMIZERS["adam"]

    def counted(*arguments, **options):
        for update in adam.tensor_updates(*arguments, **options):
            yield lambda x, *rest, update=update: calls.append(x.shape) or update(x, *rest)

    monkeypatch.setitem(OPTIMIZERS, "adam", adam._replace(tensor_updates=counted))
    state, _ = infer_local(model, MeanField(model), tiny_batch(), LocalInference(steps=3))
    assert calls == [(3, 2 * 2 * 3 * 8)] * 3  # means and log-variances, concatenated
    assert all(x.is_contiguous() for x in state.parameters.values())


@pytest.mark.parametrize("function", [step, run_steps])
def test_the_documents_quote_algorithm_1(function):
    """docs/local-inference.md shows the function as it is, without its docstring, and it fits on one screen."""
    source = inspect.getsource(inspect.unwrap(function))
    code, _, rest = source.partition('    r"""' if '    r"""' in source else '    """')
    quoted = code + rest.partition('"""\n')[2]
    documents = Path(__file__).resolve().parents[2] / "docs" / "local-inference.md"
    assert quoted in documents.read_text("utf-8")
    assert quoted.count("\n") <= 40


def test_one_fast_step_shows_the_decoder_a_fitted_q(tiny_model, tiny_batch):
    """From the initial q the trajectory of one step holds nothing of the text; from a stored q it stays Pyro's SVI."""
    model, batch = tiny_model(), tiny_batch()
    guide, options = MeanField(model), LocalInference(steps=1, slow_gradient="trajectory", init=Init(log_var=-3.0))

    def gradient(inference, state=None):
        torch.manual_seed(1)
        return torch.autograd.grad(training_loss(model, guide, batch, inference, state).loss, list(model.parameters()))

    slow, fast = (gradient(replace(options, rate=rate)) for rate in (0.05, 5.0))
    assert not all(torch.allclose(x, y) for x, y in zip(slow, fast, strict=True)), "the fast rate has no effect"
    torch.testing.assert_close(slow, gradient(replace(options, rate=0.05, slow_gradient="last")))
    stored = init(model, guide, batch, options)
    kept, other = (gradient(replace(options, rate=rate), stored) for rate in (0.05, 5.0))
    torch.testing.assert_close(kept, other)
    many = [gradient(replace(options, steps=3, rate=rate)) for rate in (0.05, 5.0)]
    assert not all(torch.allclose(x, y) for x, y in zip(*many, strict=True))
