"""The decoder attends to the tokens of its window and the thoughts of its layer, and to no future token."""

import subprocess
import sys

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO

from ltm_pyro.contracts import TOKENS, Z
from ltm_pyro.errors import UsageError
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.elbo import elbo_terms
from ltm_pyro.inference.local import init
from ltm_pyro.inference.pyro_guide import LocalPosterior
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import GaussianPrior, LatentThoughtModel


def thoughts(decoder, *lead):
    return torch.randn(*lead, *decoder.thought_shape)


def hidden(decoder, inputs_BT, z_BLKD):
    return decoder(decoder.stem(inputs_BT), z_BLKD)


def test_no_token_attends_to_the_future(tiny_decoder):
    decoder = tiny_decoder()
    inputs, z = torch.randint(11, (1, 12)), thoughts(decoder, 1)
    before = hidden(decoder, inputs, z)
    for t in range(12):
        changed = inputs.clone()
        changed[0, t] = (inputs[0, t] + 1) % 11
        after = hidden(decoder, changed, z)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize(("layers", "window"), [(1, 1), (1, 4), (2, 3), (3, 2)])
def test_the_receptive_field_is_exact(tiny_decoder, layers, window):
    decoder = tiny_decoder(layers=layers, window=window, thoughts=0)
    x = decoder.embedding(torch.randint(11, (1, 16))).detach().requires_grad_()
    stem = decoder.blocks[0].attend_to_tokens(x, decoder.rotary_angles[:16])
    gradient = torch.autograd.grad(decoder(stem, thoughts(decoder, 1))[0, -1].pow(3).sum(), x)[0]
    attended = (gradient[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist()
    field = layers * (window - 1) + 1
    assert attended == list(range(16 - field, 16))


def test_every_layer_attends_to_its_own_thoughts(tiny_decoder):
    decoder = tiny_decoder(layers=3)
    inputs, z = torch.randint(11, (2, 5)), thoughts(decoder, 2).requires_grad_()
    gradient = torch.autograd.grad(hidden(decoder, inputs, z)[0].pow(3).sum(), z)[0]
    assert (gradient[0].abs().sum((-1, -2)) > 0).all()
    assert (gradient[1] == 0).all()  # no sequence attends to those of another


SHAPES = [
    *({}, {"thoughts": 0}, {"kv_heads": 1}, {"thought_width": 4}, {"thought_layers": [2]}),
    *({"thought_keys": "learned"}, {"thought_keys": "learned", "kv_heads": 1}, {"position_embeddings": True}),
    *({"thoughts": 0, "constant_thoughts": 3}, {"thoughts": 0, "constant_thoughts": 3, "thought_keys": "learned"}),
]


@pytest.mark.parametrize("changes", SHAPES)
def test_no_parameter_is_dead(tiny_model, tiny_batch, changes):
    model, batch = tiny_model(**changes), tiny_batch()
    guide = MeanField(model)
    start = init(model, guide, batch, LocalInference()).parameters
    elbo_terms(model, guide, batch, start).elbo_B.sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    crossing = [name for name, _ in model.named_parameters() if "cross" in name]
    assert bool(crossing) == (changes.get("thoughts") != 0 or "constant_thoughts" in changes)


@pytest.mark.parametrize("changes", SHAPES)
def test_particles_are_computed_in_one_call(tiny_decoder, changes):
    decoder = tiny_decoder(**changes)
    stem, z = decoder.stem(torch.randint(11, (2, 6))), thoughts(decoder, 3, 2)
    batched = decoder(stem, z)
    assert batched.shape == (3, 2, 6, 8)
    torch.testing.assert_close(batched, torch.stack([decoder(stem, one) for one in z]))
    torch.testing.assert_close(decoder(stem, z[None]), batched[None])


def test_thoughts_may_have_another_width_than_tokens(tiny_decoder):
    assert tiny_decoder(thought_width=4).thought_shape == (2, 3, 4)
    assert tiny_decoder().thought_shape == (2, 3, 8)


@pytest.mark.parametrize("attending", [[1], [2], [3], [1, 3], [2, 3]])
def test_a_layer_without_thoughts_equals_one_whose_cross_attention_is_zero(tiny_decoder, attending):
    some, all_layers = (
        tiny_decoder(layers=3, thought_layers=attending),
        tiny_decoder(layers=3, zero_init_cross_attention=True),
    )
    all_layers.load_state_dict(all_layers.state_dict() | some.state_dict())
    inputs, z, z_all_layers = torch.randint(11, (2, 9)), thoughts(some, 2), thoughts(all_layers, 2)
    z_all_layers[:, [n - 1 for n in attending]] = z
    torch.testing.assert_close(hidden(some, inputs, z), hidden(all_layers, inputs, z_all_layers))
    torch.testing.assert_close(some.decode_step(inputs, some.init_cache(z)), hidden(some, inputs, z)[:, -1])
    assert some.thought_shape == (len(attending), 3, 8)


@pytest.mark.parametrize("attending", [[], [0], [3]])
def test_layers_that_do_not_exist_are_refused(tiny_decoder, attending):
    with pytest.raises(UsageError, match="thought_layers are some of its 2 layers"):
        tiny_decoder(thought_layers=attending)


def test_the_stem_is_the_first_layer_up_to_its_thoughts(tiny_model, tiny_batch):
    model, batch = tiny_model(), tiny_batch()
    prepared = model.prepare(batch)
    whole, halves = (
        pyro.poutine.trace(pyro.poutine.condition(model, {Z: z})) for z in [thoughts(model.decoder, 3)] * 2
    )
    logp, again = (t.get_trace(b).nodes[TOKENS] for t, b in ((whole, batch), (halves, prepared)))
    torch.testing.assert_close(*(node["fn"].log_prob(node["value"]) for node in (logp, again)))


def test_padding_never_changes_a_sequence(tiny_model, tiny_batch):
    model, batch = tiny_model(), tiny_batch()
    noise = torch.randint(1, 11, batch.targets_BT.shape)
    targets = torch.where(batch.mask_BT, batch.targets_BT, noise)
    inputs = torch.cat([batch.inputs_BT[:, :1], targets[:, :-1]], 1)
    other = batch._replace(targets_BT=targets, inputs_BT=inputs)
    conditioned = pyro.poutine.condition(model, {Z: thoughts(model.decoder, 3)})
    nodes = [pyro.poutine.trace(conditioned).get_trace(x).nodes[TOKENS] for x in (batch, other)]
    torch.testing.assert_close(*(node["fn"].log_prob(node["value"]) for node in nodes), rtol=0, atol=1e-12)


def test_the_embedding_is_tied(tiny_model, tiny_batch):
    model = tiny_model()
    node = pyro.poutine.trace(model).get_trace(tiny_batch()).nodes[TOKENS]
    assert node["fn"].embedding_VD is model.decoder.embedding.weight
    assert sum(p.shape == (11, 8) for p in model.parameters()) == 1


def test_zero_init_cross_attention_adds_nothing_at_first(tiny_decoder):
    decoder, inputs = tiny_decoder(zero_init_cross_attention=True), torch.randint(11, (2, 5))
    z, other = thoughts(decoder, 2), thoughts(decoder, 2)
    assert torch.equal(hidden(decoder, inputs, z), hidden(decoder, inputs, other))
    assert torch.equal(hidden(decoder, inputs, z), hidden(decoder, inputs, None))


def test_recomputed_activations_give_the_same_gradients(tiny_decoder):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        decoder = tiny_decoder(recompute=recompute, thought_layers=[2])
        hidden(decoder, torch.randint(11, (2, 9)), thoughts(decoder, 2)).pow(2).sum().backward()
        gradients.append([p.grad for p in decoder.parameters()])
    for stored, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, stored)


COMPILED = """
import torch
from ltm_pyro.contracts import make_batch
from ltm_pyro.guides import MeanField
from ltm_pyro.inference.local import training_loss
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.models import Decoder, GaussianPrior, LatentThoughtModel
decoder = Decoder(50, layers=2, width=16, heads=2, thoughts=3, window=4, length=16)
model = LatentThoughtModel(GaussianPrior(decoder.thought_shape), decoder)
batch = make_batch(torch.randint(50, (3, 9)), torch.tensor([9, 8, 4]), 0)
found = []
for compiled in (False, True):
    if compiled:
        decoder.compile()
    torch.manual_seed(0)
    model.zero_grad()
    loss = training_loss(model, MeanField(model), batch, LocalInference(steps=2, slow_gradient="last")).loss
    loss.backward()
    with torch.no_grad():
        cache, pieces = decoder.init_cache(torch.ones(2, 2, 3, 16)), torch.arange(18).view(2, 9).split([3, *[1] * 6], 1)
        hidden = [decoder.decode_step(piece, cache, compile=compiled) for piece in pieces]
    found.append([loss.detach(), *(p.grad.clone() for p in model.parameters()), *hidden])
for eager, compiled in zip(*found, strict=True):
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
assert not torch._dynamo.utils.counters["graph_break"]
"""


@pytest.mark.slow
def test_a_compiled_decoder_computes_the_same():
    """In a separate process, because the jaxtyping checks of the tests cannot be compiled."""
    done = subprocess.run([sys.executable, "-P", "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("changes", "words"), [({"heads": 3}, "multiple"), ({"kv_heads": 3}, "divisor")])
def test_heads_must_divide(tiny_decoder, changes, words):
    with pytest.raises(UsageError, match=words):
        tiny_decoder(**changes)


def test_a_sequence_that_is_too_long_is_refused(tiny_decoder):
    with pytest.raises(UsageError, match="17 tokens, but the model's length is 16"):
        tiny_decoder().stem(torch.zeros(1, 17, dtype=torch.long))


def test_pyro_renders_the_model(tiny_model, tiny_batch):
    graph = pyro.render_model(tiny_model(), (tiny_batch(),), render_distributions=True)
    assert all(word in graph.source for word in ("tokens", "z", "sequences", "TokenCategorical"))


def test_predictive_samples_tokens(tiny_model, tiny_batch):
    model, batch = tiny_model(), tiny_batch()
    drawn = Predictive(model, num_samples=4)(batch._replace(targets_BT=None))
    assert drawn[TOKENS].shape == (4, *batch.targets_BT.shape)
    assert drawn[Z].shape == (4, 3, *model.decoder.thought_shape)


@pytest.mark.parametrize("particles", [1, 3])
def test_stock_svi_improves_a_local_posterior(tiny_model, tiny_batch, particles):
    model, batch = tiny_model(), tiny_batch()
    guide = MeanField(model)
    posterior = LocalPosterior(guide, init(model, guide, batch, LocalInference()))
    loss = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    svi = SVI(model, posterior, pyro.optim.Adam({"lr": 0.02}), loss)
    losses = [svi.step(batch) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])
    found = Predictive(model, guide=posterior, num_samples=2)(batch._replace(targets_BT=None))
    assert found[TOKENS].shape == (2, *batch.targets_BT.shape)


def test_the_prior_is_standard_normal(tiny_decoder):
    shape = tiny_decoder().thought_shape
    model = LatentThoughtModel(GaussianPrior(shape), tiny_decoder())
    z = model.sample_prior(2000)
    assert z.shape == (2000, *shape)
    assert abs(z.mean()) < 5 / (2000 * 48) ** 0.5
    assert abs(z.var() - 1) < 5 * (2 / (2000 * 48)) ** 0.5
