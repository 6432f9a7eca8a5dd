"""What only reads a model keeps no graph for gradients: one of all draws once took 14 GiB."""

import pytest
import torch

from ltm_pyro import LocalInference, make_batch
from ltm_pyro.analysis import DrawOptions, draw_posterior
from ltm_pyro.analysis.calibration import calibrate, simulate_texts
from ltm_pyro.analysis.information import decompose
from ltm_pyro.analysis.interventions import ablate, attention, interpolate
from ltm_pyro.analysis.sensitivity import power_scaling
from ltm_pyro.inference.estimators import ESTIMATORS, OF_A_BATCH, evaluate
from ltm_pyro.text.generation import generate
from ltm_pyro.text.rethinking import Rethinking, rethink
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.text.scoring import Scoring, score, score_continuations

TEXTS = ["the old", "a long text and short words", "naïve café"]
WITHOUT_GRADIENTS = [name for name in ESTIMATORS if name != "ais"]  # whose Hamiltonian steps need them
STILL = LocalInference(steps=0)


@pytest.fixture
def run(tiny_run):
    return tiny_run()._replace(inference=STILL)


def of(name, function):
    return pytest.param(function, id=name)


def posterior_of(run):
    return draw_posterior(run, TEXTS, DrawOptions(samples=25))


def evaluation(run):
    batch = make_batch(torch.arange(24).reshape(2, 12), torch.tensor([12, 7]), 0)
    evaluate(run.model, run.guide, [batch], STILL, WITHOUT_GRADIENTS, block=4)


@pytest.mark.parametrize(
    "read",
    [
        *(
            of(f"score {name}", lambda run, name=name: score(run, TEXTS, Scoring(estimator=name, block=4)))
            for name in WITHOUT_GRADIENTS
            if name not in OF_A_BATCH
        ),
        *(
            of(
                f"continuations {name}",
                lambda run, name=name: score_continuations(
                    run, [(text, " reads") for text in TEXTS], Scoring(estimator=name, block=4)
                ),
            )
            for name in WITHOUT_GRADIENTS
            if name not in OF_A_BATCH
        ),
        of("evaluate", evaluation),
        of("posterior", lambda run: draw_posterior(run, TEXTS, DrawOptions(samples=25, replicas=2))),
        of("calibrate", lambda run: calibrate(run.model, run.guide, STILL, simulate_texts(run), 20, 9)),
        of("generate", lambda run: generate(run, TEXTS, Sampling(max_new_tokens=4))),
        *(
            of(target, lambda run, target=target: rethink(run, TEXTS[:1], Rethinking(iterations=1, target=target)))
            for target in ("ancestral", "gibbs", "rethink")
        ),
        of("decompose", lambda run: decompose(run.model, run.guide, posterior_of(run))),
        of("ablate", lambda run: ablate(run.model, posterior_of(run), run.start_token)),
        of("attention", lambda run: attention(run, posterior_of(run), 0)),
        of("interpolate", lambda run: interpolate(run, posterior_of(run), 0, 1)),
        of("power_scaling", lambda run: power_scaling(posterior_of(run), run)),
    ],
)
def test_no_graph_is_kept(run, read):
    def refuse(tensor):
        raise AssertionError(f"a tensor {tuple(tensor.shape)} is kept for a gradient that nobody takes")

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda tensor: tensor):
        read(run)
