"""The objective, limits, several objectives, pruning, repeats and the baseline."""

import json
import math
import random

import pytest

from ltm_pyro.data import pack
from ltm_pyro.data.make import make_task
from ltm_pyro.data.tasks.permutation import Permutation
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.documents import RECORDS, read_records, write_records
from ltm_pyro.runs.load import load_run
from ltm_pyro.studies.ar_baseline import PARTS, ar_baseline
from ltm_pyro.studies.budget import parse_budget
from ltm_pyro.studies.configure import configure
from ltm_pyro.studies.search import study as search
from ltm_pyro.studies.search import trials
from ltm_pyro.studies.search.definition import SHIPPED, load_definition
from ltm_pyro.studies.search.objective import NEED_BOUND, Setting, options_of, score, train_and_score
from ltm_pyro.studies.search.storage import open_storage
from ltm_pyro.training.recipe import build_module
from tests.studies.search.conftest import FREE

BY_DOCUMENT = """
from ltm_pyro.evaluation.documents import write_records
whole = objective
def objective(setting):
    figures = whole(setting)
    factors = [0.5, 1.5, 0.5, 1.5, 0.5, 1.5, 0.5, 1.5]  # of each document's difference; their mean is 1
    records = [
        {"id": n, "file": "", "tokens": 7, "bytes": 7, "bound_nats": 7 * (10 * n + factor * figures["bound"])}
        for n, factor in enumerate(factors)
    ]
    write_records(setting.run, records)
    return figures
"""
HALVING = """
from optuna.distributions import FloatDistribution
space = {"model.inference.rate": FloatDistribution(0.1, 1.0)}
def objective(setting):
    bound = setting.parameters.get("model.inference.rate", 1.0)
    for rung in range(2):
        setting.report(rung, bound)
    import time; time.sleep(0.2)
    return {"bound": bound}
"""


@pytest.mark.parametrize(("text", "amount", "unit"), [("2e13flops", 2e13, "flops"), ("90061s", 90061, "s")])
def test_a_budget_is_an_amount_and_a_unit(text, amount, unit):
    budget = parse_budget(text)
    assert (budget.amount, budget.unit) == (amount, unit)


def test_a_budget_is_the_only_end():
    seconds, flops = parse_budget("90061s").settings, parse_budget("2e13flops").settings
    assert (seconds["trainer.max_time"], seconds["model.max_flops"]) == ("01:01:01:01", None)
    assert (flops["trainer.max_time"], flops["model.max_flops"]) == (None, 2e13)


@pytest.mark.parametrize("text", ["", "12", "-1s", "0s", "0.5s", "1e999flops", "1.2.3s", "2 s", "nans", "fivesec"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UsageError, match="is not an amount of training"):
        parse_budget(text)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_ask_and_fit_their_recipe(name):
    definition = load_definition(name)
    assert definition.question.endswith("?") or "?" in definition.question
    for point in (*definition.points, definition.example):
        assert point.keys() == definition.space.keys()
        assert all(definition.space[k]._contains(definition.space[k].to_internal_repr(v)) for k, v in point.items())
    for point in (definition.example, *definition.points[-1:]):
        configure(definition.recipe, definition.settings(point))


def test_a_trial_spends_its_budget_and_reports_a_bound(recipe, tmp_path):
    said, received = [], []
    budget = parse_budget("6e8flops")
    setting = Setting(
        recipe=str(recipe),
        options=options_of(budget, {}, tmp_path / "run", 0),
        parameters={},
        run=tmp_path / "run",
        samples=2,
        limit=4,
        k_hat=True,
        pruned=True,
        tick=received.append,
        report=lambda rung, bound, documents: said.append((rung, bound)),
    )
    figures = train_and_score(setting)
    step = 4 * 16 * figures["flops_per_token"]
    assert budget.amount <= figures["flops"] < budget.amount + step * 1.001
    assert figures["tokens"] == 64 * len(received)
    assert abs(figures["predictive_gain"]) < 0.5
    assert math.isnan(figures["predictive_gain_stderr"]), "all rows are of one document"
    assert 3 < figures["bound"] < 8
    assert figures["inference_flops_per_token"] > 0
    assert figures["peak_memory_mib"] > 50
    assert figures["k_hat"] == figures["k_hat"]
    assert [rung for rung, _ in said] == [0, 1]
    assert said[-1][1] > figures["bound"] - 0.2
    assert received == sorted(received)
    assert received[-1] == 1


def test_what_a_trial_says_of_each_document_stays_in_its_folder(recipe, tmp_path):
    texts = "".join(json.dumps({"text": "some words come over and over " * n}) + "\n" for n in range(1, 31))
    (tmp_path / "text.jsonl").write_text(texts)
    pack(
        [tmp_path / "text.jsonl"], tmp_path / "data", tokenizer="bpe:270", seq_len=16, val_fraction=0.3, test_fraction=0
    )
    changed = {"data.directory": str(tmp_path / "data"), "data.batch_size": None, "data.tokens": 64}
    options = options_of(parse_budget("6e8flops"), changed, tmp_path / "run", 0)
    setting = Setting(recipe=str(recipe), options=options, parameters={}, run=tmp_path / "run", samples=2, limit=40)
    figures, records = train_and_score(setting), read_records(tmp_path / "run")
    assert len({record["id"] for record in records}) == len(records) > 2
    nats, tokens = (sum(record[name] for record in records) for name in ("bound_nats", "tokens"))
    assert nats / tokens == pytest.approx(figures["bound"])


def test_the_best_is_compared_with_the_others_document_by_document(run, study_file, tmp_path):
    """What is common to all trials of a document, ten times larger than any difference, is in no error."""
    found = run(5, study_file(FREE + BY_DOCUMENT), repeats=1)
    best = found["trials"][found["best"]]
    assert "above_best" not in best
    others = [row for row in found["trials"] if row != best]
    for row in others:
        apart = row["figures"]["bound"] - best["figures"]["bound"]
        assert row["above_best"] == pytest.approx(apart, abs=1e-6)
        assert row["above_best_stderr"] == pytest.approx(0.189 * abs(apart), rel=0.01)
    second = min((row for row in others if row["role"] == "trial"), key=lambda row: row["figures"]["bound"])
    assert f"trial {second['number']} by {second['above_best']:+.4f} ±" in found["recommendation"]
    baseline = next(row for row in others if row["role"] == "baseline")
    assert f"the autoregressive baseline by {baseline['above_best']:+.4f} ±" in found["recommendation"]
    assert "Not told apart" not in found["recommendation"]
    url, lacking = f"sqlite:///{tmp_path / 'studies.db'}", "No error by document is given for these differences"
    assert lacking in search.describe(url, found["study"])["recommendation"], "they are not where the default is"
    assert lacking not in search.describe(url, found["study"], tmp_path / "out")["recommendation"]
    for folder in (tmp_path / "out").glob("trial-*"):
        (folder / RECORDS).unlink()
    assert lacking in search.describe(url, found["study"], tmp_path / "out")["recommendation"]


def test_tokens_are_counted_where_the_last_batch_is_short(recipe, tmp_path):
    changed = {"data.batch_size": 30, "trainer.accumulate_grad_batches": 2}
    options = options_of(parse_budget("9e9flops"), changed, tmp_path / "run", 0)
    setting = Setting(recipe=str(recipe), options=options, parameters={}, run=tmp_path / "run", samples=2, limit=4)
    figures = train_and_score(setting)
    module = build_module(configure(str(recipe), {**options, "model.vocabulary": 270}))
    assert figures["tokens"] % 480 != 0  # a short batch was among them
    assert figures["flops_per_token"] == pytest.approx(module.cost(16, module.inference))


def test_without_a_bound_there_are_the_other_figures(recipe, tmp_path):
    options = options_of(parse_budget("6e8flops"), {"model.guide": "ltm_pyro.guides.Point"}, tmp_path / "run", 0)
    setting = Setting(recipe=str(recipe), options=options, parameters={}, run=tmp_path / "run", samples=2, limit=4)
    figures = train_and_score(setting)
    assert figures["prior"] > 3
    assert not figures.keys() & {*NEED_BOUND}


def test_the_best_is_trained_again_and_beside_a_baseline(run, study_file):
    found = run(4, study_file(), repeats=2)
    *searched, baseline, first, second = found["trials"]
    best = min(searched, key=lambda row: row["figures"]["bound"])
    assert found["best"] == best["number"]
    assert (baseline["role"], first["role"], second["role"]) == ("baseline", "repeat", "repeat")
    assert (baseline["seed"], first["seed"], second["seed"]) == (0, 1, 2)
    assert f"Recommended: trial {best['number']}, bound " in found["recommendation"]
    assert "the mean over 2 fresh seeds" in found["recommendation"]
    assert "autoregressive baseline" in found["recommendation"]


def test_the_baseline_has_no_prior_and_no_guide_of_its_own(recipe):
    prior = {"model.prior": "ltm_pyro.models.AutoregressivePrior", "model.prior.init_args.layers": 1}
    settings = {**prior, "model.guide": "ltm_pyro.guides.FlowGuide", "data.batch_size": 2}
    found = configure(str(recipe), ar_baseline(settings))
    assert (found.model.prior.class_path, found.model.guide.class_path) == tuple(PARTS.values())
    assert (found.model.decoder.init_args.thoughts, found.data.batch_size) == (0, 2)


def test_of_two_baselines_made_at_once_the_first_counts(run, study_file, tmp_path):
    found = run(2, study_file(), repeats=0)
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    with open_storage(url) as storage:
        checks = trials.load_study(storage, found["study"] + trials.CHECKS)
        (baseline,) = trials.current_trials(checks)
        about = {key: baseline.user_attrs[key] for key in ("of", "role")}
        checks.enqueue_trial({}, user_attrs=about)
    again = search.describe(url, found["study"])
    assert [row["state"] for row in again["trials"] if row["role"] == "baseline"] == ["complete"]
    assert again["trials"] == found["trials"]


def test_a_limit_keeps_the_best_within_it(run, study_file):
    free = run(5, study_file(), "a.db")
    costs = [row["figures"]["inference_flops_per_token"] for row in free["trials"][:5]]
    limit = costs[free["best"]] - 1e-6
    limited = run(5, study_file(), "b.db", at_most={"inference_flops_per_token": limit})
    assert min(costs) <= limit
    assert limited["trials"][limited["best"]]["figures"]["inference_flops_per_token"] <= limit
    nothing = run(2, study_file(), "c.db", at_most={"k_hat": 1.0})
    assert nothing["best"] is None
    assert nothing["recommendation"].startswith("No trial is complete and within its limits")


def test_an_exact_q_keeps_every_limit_on_k_hat(run, study_file):
    text = FREE.replace('{"bound":', '{"k_hat": float("-inf"), "bound":')
    found = run(7, study_file(text), at_most={"k_hat": 0.7})
    assert found["best"] is not None
    assert found["trials"][0]["figures"]["k_hat"] is None  # JSON has no infinity


def test_what_a_trial_recorded_before_it_failed_is_kept(run, study_file):
    found = run(1, study_file(FREE.replace('{"bound":', '{"loss":')))
    (row,) = found["trials"]
    assert (row["state"], row["reason"]) == ("fail", "no figure `bound`, but loss, inference_flops_per_token, size")
    assert row["figures"]["loss"] > 0


def test_several_objectives_give_a_front(run, study_file):
    found = run(6, study_file(), minimise=("bound", "inference_flops_per_token"))
    assert [row["state"] for row in found["trials"]] == ["complete"] * 7
    assert all(len(found["minimise"]) == 2 for _ in found["trials"])
    with pytest.raises(UsageError, match="Pruning needs one objective"):
        run(6, study_file(), minimise=("bound", "size"), pruner="median")


def test_hopeless_trials_are_given_up_with_a_reason(run, study_file):
    found = run(16, study_file(HALVING), pruner="hyperband")
    pruned = [row for row in found["trials"] if row["state"] == "pruned"]
    assert 3 <= len(pruned) < 15
    assert all(row["reason"].startswith("pruned after ") for row in pruned)
    lowest = min(row["parameters"]["model.inference.rate"] for row in found["trials"] if row["role"] == "trial")
    assert found["trials"][found["best"]]["parameters"]["model.inference.rate"] == pytest.approx(lowest)


def test_what_is_told_is_plain(run, study_file):
    found = run(2, study_file())
    assert json.loads(json.dumps(found)) == found


def test_unequal_seconds_are_told(run, study_file):
    text = HALVING.replace('{"bound": bound}', '{"bound": bound, "flops": 1e9 * bound}')
    found = run(4, study_file(text), budget="5s")
    spent = [row["figures"]["flops"] for row in found["trials"]]
    assert f"The same 5s bought {min(spent):.2g} to {max(spent):.2g} FLOPs" in found["recommendation"]
    assert "bought" not in run(4, study_file(text), "flops.db")["recommendation"]


@pytest.fixture(scope="module")
def corpus_pack(tmp_path_factory):
    """Rows as long as the shipped recipes want them, of words that nobody has heard."""
    folder, draw = tmp_path_factory.mktemp("shipped"), random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(800)]
    texts = [" ".join(draw.choices(words, k=400)) for _ in range(30)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pack([folder / "text.jsonl"], folder / "data", tokenizer="bpe:1000", seq_len=256, val_fraction=0.2, test_fraction=0)
    return folder / "data"


@pytest.mark.parametrize("name", [x if x == "rate_ratio" else pytest.param(x, marks=pytest.mark.slow) for x in SHIPPED])
def test_shipped_studies_keep_their_budget_or_refuse_it(name, corpus_pack):
    """By less than 2 %: the dearest step of every point, and of the baseline behind it, is no more of the budget."""
    changed = {"data.directory": str(corpus_pack)}
    definition, plan = search.prepare(name, None, changed, None, at_most={})
    assert plan.pack != "unknown"
    if not any(point for point in definition.points if "model.max_flops" in definition.options(point)):
        with pytest.raises(UsageError, match=r"is less than 50 of the dearest steps, which .* raise it"):
            search.prepare(name, None, changed, "5e9flops", at_most={})


def test_a_sampled_point_whose_steps_are_too_dear_fails_before_it_is_trained(run, study_file):
    text = """
from optuna.distributions import IntDistribution
from ltm_pyro.studies.search import train_and_score as objective
space = {"model.inference.steps": IntDistribution(1, 64)}
first = {"model.inference.steps": 1}
checks = False
"""
    found = run(3, study_file(text), budget="1.2e9flops", sampler="qmc")
    rows = {row["parameters"]["model.inference.steps"]: row for row in found["trials"]}
    assert rows.pop(1)["state"] == "complete"
    assert {row["state"] for steps, row in rows.items() if steps > 8} == {"fail"}
    assert all("dearest steps" in row["reason"] for row in rows.values() if row["state"] == "fail")
    spent = [row["figures"]["flops"] for row in found["trials"] if row["state"] == "complete"]
    assert all(1.2e9 <= flops < 1.2e9 * 1.02 for flops in spent)
    assert f"Spent: {min(spent):.4g} to {max(spent):.4g} FLOPs each." in found["recommendation"]


def test_the_context_recovered_is_an_objective(recipe, tmp_path):
    """On a task whose optimum is known, and between a floor and a ceiling whose figures are beside the trials' runs."""
    make_task(Permutation(symbols=4, pairs=8), tmp_path / "task", sequences=400, val_fraction=0.2)
    changed = {"data.directory": str(tmp_path / "task")}
    options = options_of(parse_budget("1e9flops"), changed, tmp_path / "run", 0)
    asked = {"samples": 2, "limit": 40, "asked": ("context_recovered", "iwae")}
    setting = Setting(recipe=str(recipe), options=options, parameters={}, run=tmp_path / "run", **asked)
    figures = train_and_score(setting)
    assert figures["context_recovered"] < 1
    assert figures["iwae"] <= figures["bound"] + 0.05
    records = read_records(tmp_path / "run")
    nats = {name: sum(record[name] for record in records) for name in ("bound_nats", "exact_nats")}
    floor = sum(record["labels"]["best_within_7"] for record in records)
    share = (floor - nats["bound_nats"]) / (floor - nats["exact_nats"])
    assert figures["context_recovered"] == pytest.approx(share)

    text = {part: [record | {"exact_nats": None, "labels": {}} for record in records] for part in ("floor", "ceiling")}
    for part, figure in (("floor", "best_within_7"), ("ceiling", None)):
        for kept, record in zip(text[part], records, strict=True):
            kept["bound_nats"] = record["labels"][figure] if figure else record["exact_nats"]
        (tmp_path / part).mkdir()
        write_records(tmp_path / part, text[part])
    between = score(load_run(tmp_path / "run"), setting)
    assert between["context_recovered"] == pytest.approx(share)
