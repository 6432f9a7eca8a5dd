"""Attention weights and interpolation of a tiny decoder against known answers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ltm_pyro.analysis import DrawOptions, draw_posterior
from ltm_pyro.analysis.draws import token_log_likelihood
from ltm_pyro.analysis.information import observed_batch
from ltm_pyro.analysis.interventions import attention, interpolate
from ltm_pyro.analysis.posterior import TEXT
from ltm_pyro.errors import UsageError

TEXTS = ["the old model reads", "short words about time", "the old model reads"]


@pytest.fixture
def seen(tiny_run):
    run = tiny_run()
    return run, draw_posterior(run, TEXTS, DrawOptions(samples=25), longer="cut")


def test_each_token_shares_its_attention_as_the_decoder_does(seen):
    """Torch's own attention returns its weights if the values are one-hot vectors of the thoughts."""
    run, posterior = seen
    found, expected = attention(run, posterior, 1), []

    def record_weights(module, arguments, _):
        x_BTD, turn, thoughts = arguments
        keys_BHKC = thoughts.keys_BHKC
        names_KK = torch.eye(keys_BHKC.shape[-2]).expand(*keys_BHKC.shape[:2], -1, -1)
        weights_BHTK = F.scaled_dot_product_attention(module.queries(x_BTD, turn), keys_BHKC, names_KK)
        expected.append(weights_BHTK.mean(1)[0])

    hooks = [block.cross_attention.register_forward_hook(record_weights) for block in run.model.decoder.blocks]
    one = posterior.select([1])
    token_log_likelihood(run.model, observed_batch(one, run.start_token), torch.from_numpy(one.stats["mean"].values))
    for hook in hooks:
        hook.remove()
    assert found.dims == ("layer", "token", "thought")
    assert found.sizes["token"] == int((posterior.group(TEXT)["tokens"][1] >= 0).sum())
    for layer, weights_TK in enumerate(expected):
        np.testing.assert_allclose(found[layer], weights_TK.detach()[: found.sizes["token"]], atol=1e-12)
    np.testing.assert_allclose(found.sum("thought"), 1)
    assert float(found.std("thought").max()) > 1e-3


def test_tokens_that_ask_nothing_look_at_all_thoughts_alike(seen):
    run, posterior = seen
    with torch.no_grad():
        for block in run.model.decoder.blocks:
            block.cross_attention.query.weight.zero_()
    np.testing.assert_allclose(attention(run, posterior, 0), 1 / 3, atol=1e-12)


def test_a_path_begins_at_one_text_and_ends_at_the_other(seen):
    run, posterior = seen
    path = interpolate(run, posterior, 0, 1, steps=3)
    assert [step.share for step in path] == [0, 0.5, 1]
    batch = observed_batch(posterior, run.start_token)
    own_B = -token_log_likelihood(run.model, batch, torch.from_numpy(posterior.stats["mean"].values)).sum(-1)
    assert path[0].nats_first == pytest.approx(own_B[0].item())
    assert path[-1].nats_second == pytest.approx(own_B[1].item())
    back = interpolate(run, posterior, 1, 0, steps=3)
    assert [step.text for step in back] == [step.text for step in path][::-1]
    assert back[1].nats_first == pytest.approx(path[1].nats_second)


def test_a_path_to_oneself_stays_there(seen):
    run, posterior = seen
    path = interpolate(run, posterior, 1, 1, steps=4)
    assert {step.text for step in path} == {path[0].text}
    assert {round(step.nats_first, 9) for step in path} == {round(path[0].nats_second, 9)}
    with pytest.raises(UsageError, match="at least 2 steps, got 1"):
        interpolate(run, posterior, 0, 1, steps=1)
