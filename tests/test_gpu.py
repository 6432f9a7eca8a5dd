"""What only a CUDA device can show: when the host waits, what is allocated, which kernels are right."""

from dataclasses import replace

import pyro
import pytest
import torch

from ltm_pyro.contracts import make_batch
from ltm_pyro.evaluation.evaluate import evaluate_run
from ltm_pyro.guides.mean_field import MeanField
from ltm_pyro.inference.local import infer_local, training_loss
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.models.gaussian import GaussianPrior
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.nn.attention import BACKENDS, backend, dense_attention
from ltm_pyro.nn.cross_entropy import token_nats
from ltm_pyro.text.generation import generate
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.utils.rng import seeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings(  # of torch and its compiler, about themselves
        "ignore::DeprecationWarning", "ignore:Synchronization debug mode", "ignore:TensorFloat32 tensor cores"
    ),
]
B, T, V = 4, 128, 20_000


@pytest.fixture(autouse=True)
def validation():
    """Torch's compiler turns it off."""
    yield
    pyro.enable_validation(True)


@pytest.fixture
def case():
    decoder = Decoder(V, layers=2, width=128, heads=2, thoughts=4, window=32, length=T)
    model = LatentThoughtModel(GaussianPrior(decoder.thought_shape), decoder).float().cuda()
    batch = make_batch(torch.randint(1, V, (B, T)), torch.full((B,), T), start_token=0)
    return model, MeanField(model), batch.to("cuda")


def test_a_fit_waits_for_the_device_once(case):
    model, guide, batch = case
    with torch.autocast("cuda", torch.bfloat16):
        infer_local(model, guide, batch, LocalInference(steps=4))  # whatever is tried or compiled the first time
        torch.cuda.set_sync_debug_mode("error")
        try:
            _, info = infer_local(model, guide, batch, LocalInference(steps=4))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert info.elbo_NB.isfinite().all()  # the one place where the host waits


def test_a_replayed_fit_is_the_fit_and_waits_for_nothing(case):
    model, guide, batch = case
    inference, found = LocalInference(steps=4, rate=0.1), []
    with torch.autocast("cuda", torch.bfloat16):
        for _ in range(2):  # as usual, then recorded
            infer_local(model, guide, batch, replace(inference, cuda_graph=True))
        with torch.no_grad():
            model.decoder.embedding.weight.mul_(0.9)  # a replay reads the weights as they are now
        for graph in (True, False):
            with seeded(1):
                torch.cuda.set_sync_debug_mode("error")
                try:
                    found.append(infer_local(model, guide, batch, replace(inference, cuda_graph=graph)))
                finally:
                    torch.cuda.set_sync_debug_mode("default")
    (ours, record), (theirs, eager) = found
    torch.testing.assert_close(record.elbo_NB, eager.elbo_NB, rtol=1e-2, atol=1.0)
    for name, x in theirs.parameters.items():
        torch.testing.assert_close(ours.parameters[name], x, rtol=0.05, atol=0.05)


def test_a_graph_trains_as_well(case):
    model, guide, batch = case
    inference = LocalInference(steps=4, rate=0.1, slow_gradient="last", cuda_graph=True)
    for _ in range(4):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            training_loss(model, guide, batch, inference).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.decoder.embedding.weight.grad.abs().sum() > 0


def test_no_logits_of_a_batch_are_allocated(case):
    model, guide, batch = case
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        with torch.autocast("cuda", torch.bfloat16):
            training_loss(model, guide, batch, LocalInference(steps=2, slow_gradient="last")).loss.backward()
        events = [e for trace in torch.cuda.memory._snapshot()["device_traces"] for e in trace]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    assert max(e["size"] for e in events if e["action"] == "alloc") < B * T * V * 4


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_backends_are_near_the_truth(name, dtype, limit):
    try:
        backend(name, "cuda", dtype, 64, 32)
    except ValueError as error:
        pytest.skip(str(error))
    q, k, v = torch.randn(3, 2, 4, 100, 64, dtype=torch.float64, device="cuda").requires_grad_().unbind(0)
    halves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    ours, truth = BACKENDS[name](*halves, 32), dense_attention(q, k, v, 32)
    weight = torch.randn_like(truth)
    found = torch.autograd.grad((ours * weight.to(dtype)).sum(), halves)
    expected = torch.autograd.grad((truth * weight).sum(), (q, k, v))
    for a, b in zip((ours, *found), (truth, *expected), strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < limit


def test_cross_entropy_in_half_precision():
    hidden, embedding = torch.randn(B, T, 128, device="cuda"), torch.randn(V, 128, device="cuda") / 11
    value = torch.randint(V, (B, T), device="cuda")
    truth = torch.nn.functional.cross_entropy((hidden @ embedding.T).flatten(0, 1).double(), value.flatten())
    with torch.autocast("cuda", torch.bfloat16):
        assert abs(token_nats(hidden, embedding, value).mean().item() - truth.item()) < 0.01


def test_a_run_scores_and_writes_on_the_device_as_on_the_cpu(tiny_run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a short text about time. " * 9)
    run, found = tiny_run(), {}
    sampling = Sampling(max_new_tokens=8, do_sample=False)
    for device in ("cpu", "cuda"):
        run.to(device)
        scores = evaluate_run(run, str(text), ["bound", "causal"], samples=64).estimates
        found[device] = {name: score.nats_per_token for name, score in scores.items()}
        assert len(generate(run, "a short", sampling)) == 1
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.02)  # the noise is another


def test_posteriors_are_found_and_calibrated_on_the_device_as_on_the_cpu(tiny_run):
    pytest.importorskip("xarray")
    from ltm_pyro.analysis import DrawOptions, draw_posterior
    from ltm_pyro.analysis.calibration import calibrate, simulate_texts

    run, found = tiny_run(), {}
    for device in ("cpu", "cuda"):
        run.to(device)
        posterior = draw_posterior(run, ["a short text"], DrawOptions(samples=400, replicas=1))
        found[device] = float(posterior.stats["elbo"].mean()), float(posterior.stats["kl"].mean())
        calibrate(run.model, run.guide, run.inference, simulate_texts(run), simulations=20, samples=9)
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.1)  # the noise is another
