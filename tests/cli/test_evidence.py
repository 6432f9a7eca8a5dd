"""The evidence on the command line: curves, convergence and the sandwich; densities that are none are refused alike."""

import json

import pytest
import yaml

from ltm_pyro.cli.posterior import names_of
from ltm_pyro.errors import UsageError

PRIOR = """
import pyro, torch
import pyro.distributions as dist
from pyro import poutine
from pyro.nn import PyroModule
from ltm_pyro.guides import MeanField

class Small(PyroModule):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self):
        with poutine.scale(scale=0.01):
            return pyro.sample("z", dist.Normal(torch.zeros(self.shape), 1.0).to_event(3))

class Two(MeanField):
    def posterior(self, name, local):
        loc, scale = local[name + "_loc"], (local[name + "_log_var"] / 2).exp()
        weights = dist.Categorical(logits=torch.zeros(len(loc), 2))
        return dist.MixtureSameFamily(weights, dist.Normal(torch.stack([loc, loc + 1], 1), scale[:, None]).to_event(3))
"""


@pytest.fixture
def file(tmp_path, request):
    path = tmp_path / f"own_{request.node.callspec.params['name'].lower()}.py"
    path.write_text(PRIOR)
    return path


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("prior", "Small", "Prior site 'z' is scaled by 0.01"),
        ("guide", "Two", "site 'z' is a MixtureSameFamily without reparameterised samples"),
    ],
)
def test_refusals_are_alike_in_fit_and_show(recipe, run, refused, ltm, file, tmp_path, part, name, message):
    option = f"--model.{part}", f"{file}:{name}"
    assert message in refused("fit", "--config", recipe, "--run", tmp_path / "run", *option)
    assert not (tmp_path / "run").exists()
    own = tmp_path / "own.yaml"
    changed = yaml.safe_load(recipe.read_text())
    changed["model"][part] = f"{file}:{name}"
    own.write_text(yaml.safe_dump(changed))
    code, _, err = ltm("show", own, "--svg", tmp_path / "x.svg", "--trust")
    assert (code, message in err) == (2, True)


def test_several_numbers_of_samples_make_a_curve(run, ltm):
    options = ("--estimators", "bound,iwae,prior_iwae,ais", "--samples", "1,4,8", "--temperatures", 3, "--limit", 4)
    code, out, err = ltm("evaluate", run, *options)
    assert code == 0, err
    assert "nats/token by draws" in out
    found = json.loads(ltm("evaluate", run, *options, "--json")[1])["estimates"]
    assert found["bound"]["converged"] is None
    for name in ("iwae", "prior_iwae", "ais"):
        curve = found[name]["curve"]
        assert [*curve] == ["1", "4", "8"]
        assert curve["8"]["nats_per_token"] == pytest.approx(found[name]["nats_per_token"])
        assert found[name]["is_bound"]
    assert "not yet" in out, "eight draws are too few to say that a figure has converged"


def test_a_curve_needs_weights(run, refused, ltm):
    assert "bound would have no curve" in refused("evaluate", run, "--estimators", "bound", "--samples", "1,2")
    assert "'0' is not a whole number" in refused("evaluate", run, "--samples", "1,0")


def test_the_evidence_of_a_runs_own_texts_is_sandwiched(run, ltm):
    options = ("--sequences", 4, "--chains", 8, "--temperatures", 4)
    code, out, err = ltm("check-inference", run, *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    rates = found["nats_per_token"]
    assert found["sequences"] == 4
    assert rates["gap"] == pytest.approx(rates["ais"] - rates["reverse_ais"])
    assert abs(rates["gap"]) < 0.2, "four temperatures suffice for thoughts that hardly matter yet"
    assert rates["iwae"] == pytest.approx(rates["ais"], abs=0.2)
    assert "reverse_ais" in ltm("check-inference", run, *options)[1]


def test_options_of_a_run_need_a_run(refused):
    assert "Without a run --chains would have no effect" in refused("check-inference", "--chains", 4)


def test_names_of_posteriors():
    """Files of one name in several folders are the usual layout; none of them takes another's place."""
    assert names_of(["a/p.nc", "b/q.nc"]) == {"a/p.nc": "p", "b/q.nc": "q"}
    assert names_of(["a/p.nc", "b/p.nc", "this.nc"], ["this"]) == {x: x for x in ("a/p.nc", "b/p.nc", "this.nc")}
    with pytest.raises(UsageError, match=r"p\.nc is given twice"):
        names_of(["p.nc", "p.nc"])
