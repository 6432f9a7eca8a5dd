"""Who was still climbing at the end of the fast steps: known trajectories, and how often noise is taken for it."""

import numpy as np
import pytest
import xarray as xr

from ltm_pyro.analysis.fast_steps import climbing
from ltm_pyro.analysis.posterior import SEQUENCES, Posterior
from ltm_pyro.errors import UsageError


def of_steps(elbo_NB):
    """A posterior that has nothing but the ELBO of its fast steps."""
    size = elbo_NB.shape[1]
    mean = (("sequence", "layer", "thought", "dim"), np.zeros((size, 1, 1, 1)))
    stats = xr.Dataset({"elbo_by_step": (("step", "sequence"), elbo_NB), "mean": mean})
    names = xr.Dataset({"document": ("sequence", np.array(["x"] * size, dtype=object))})
    return Posterior(xr.DataTree.from_dict({SEQUENCES: stats, "constant_data": names}))


def test_a_trajectory_that_climbs_is_seen_and_noise_is_not():
    random, step_N1 = np.random.default_rng(0), np.arange(32)[:, None]
    flat = -100 + random.normal(size=(32, 500))
    steep = -100 + 2 * step_N1 + random.normal(size=(32, 500))
    tiny = -100 + 0.001 * step_N1 * np.ones(500)
    assert climbing(of_steps(flat)).is_climbing.mean() < 0.03
    assert climbing(of_steps(steep)).is_climbing.all()
    assert not climbing(of_steps(tiny)).is_climbing.any()
    np.testing.assert_allclose(climbing(of_steps(steep)).gain.mean(), 2 * 8, rtol=0.02)


@pytest.mark.parametrize(("size", "steps"), [(200, 16), (60, 16), (200, 8)])
def test_noise_alone_is_seldom_taken_for_a_climb_of_any_sequence(size, steps):
    random = np.random.default_rng(1)
    alarms = [climbing(of_steps(-300 + 2 * random.normal(size=(steps, size)))).is_climbing.any() for _ in range(200)]
    assert np.mean(alarms) < 0.1


def test_the_steps_are_those_of_the_fit(tiny_run):
    from dataclasses import replace

    from ltm_pyro.analysis import DrawOptions, draw_posterior

    run = tiny_run()
    run = run._replace(inference=replace(run.inference, steps=10))
    found = draw_posterior(run, ["short words", "a long text"], DrawOptions(samples=25), longer="cut")
    assert found.stats["elbo_by_step"].shape == (10, 2)
    assert found.stats["kl_by_step"][0].max() < found.stats["kl_by_step"][-1].min()  # from the prior to the text


def test_too_few_steps():
    with pytest.raises(UsageError, match="at least 8"):
        climbing(of_steps(np.zeros((4, 2))))
