"""`ltm evaluate`: one JSON object, the same to the last digit, for packed data and for text."""

import json
import math

import numpy as np
import pytest

from ltm_pyro.data import pack_sequences
from ltm_pyro.evaluation.evaluate import TEST_USES
from ltm_pyro.inference.estimators import DEFAULT, ESTIMATORS
from ltm_pyro.models import cached_decoding
from ltm_pyro.runs.load import build_run
from ltm_pyro.training.run_directory import read_checkpoint
from ltm_pyro.utils.statistics import clustered_ratio

FIGURES = ("nats_per_token", "perplexity", "bits_per_byte", "stderr_nats_per_token", "kl_nats_per_token")


def test_json_is_one_object_of_the_agreed_form(run, ltm):
    code, out, err = ltm("evaluate", run, "--limit", 30, "--samples", 3, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) >= {"tokens", "sequences", "bytes", "estimates"}
    assert (found["sequences"], found["documents"] > 1) == (30, True)
    assert found["bytes"] > found["tokens"] > 30
    assert list(found["estimates"]) == list(DEFAULT)
    for name, score in found["estimates"].items():
        assert set(score) >= {*FIGURES, "samples", "is_bound"}
        assert all(isinstance(score[figure], float) for figure in FIGURES)
        assert score["is_bound"] is (name in ("bound", "iwae", "prior"))
        assert 4 < score["nats_per_token"] < 7


def test_one_seed_gives_the_same_to_the_last_digit(run, ltm):
    first, second, other = (
        ltm("evaluate", run, "--limit", 6, "--samples", 3, "--seed", seed, "--json")[1] for seed in (0, 0, 1)
    )
    assert first == second != other


def test_text_is_packed_on_the_fly(run, ltm, tmp_path):
    text = "the people read a long text about time."
    (tmp_path / "text.txt").write_text(text)
    found = json.loads(ltm("evaluate", run, "--data", tmp_path / "text.txt", "--json")[1])
    assert found["bytes"] == len(text)


def test_a_text_that_spells_a_special_token_loses_no_byte(run, ltm, tmp_path):
    text = "every document ends with <|endoftext|>, it says"
    (tmp_path / "text.txt").write_text(text)
    assert json.loads(ltm("evaluate", run, "--data", tmp_path / "text.txt", "--json")[1])["bytes"] == len(text)


def test_one_sequence_has_no_standard_error(run, ltm):
    found = json.loads(ltm("evaluate", run, "--limit", 1, "--estimators", "bound", "--json")[1])
    assert list(found["estimates"]) == ["bound"]
    assert found["estimates"]["bound"]["stderr_nats_per_token"] is None
    assert found["predictive_gain"] is None
    options = ("--limit", 1, "--estimators", "causal,causal_prior", "--block", 4)
    found = json.loads(ltm("evaluate", run, *options, "--json")[1])
    with_q, without_q = (found["estimates"][name]["nats_per_token"] for name in ("causal", "causal_prior"))
    assert found["predictive_gain"] == {
        "nats_per_token": without_q - with_q,
        "stderr_nats_per_token": None,
        "interval": [None, None],
    }


def test_what_thinking_is_worth_has_the_error_of_a_difference(run, ltm):
    options = ("--limit", 30, "--samples", 40, "--block", 8, "--estimators", "causal,causal_prior")
    found = json.loads(ltm("evaluate", run, *options, "--json")[1])
    gain, causal = found["predictive_gain"], found["estimates"]["causal"]
    assert 0 < gain["stderr_nats_per_token"] < causal["stderr_nats_per_token"]
    assert gain["interval"][0] < gain["nats_per_token"] < gain["interval"][1]
    row = next(line.split() for line in ltm("evaluate", run, *options)[1].splitlines() if "predictive gain" in line)
    assert float(row[2]) == pytest.approx(gain["nats_per_token"], abs=1e-4)


def test_a_curve_is_printed_with_its_cost(run, ltm):
    options = ("--limit", 4, "--fast-steps", 3, "--estimators", "iwae,prior_iwae", "--samples", "1,4")
    lines = [line.split() for line in ltm("evaluate", run, *options)[1].splitlines()]
    row = next(line for line in lines if len(line) == 7 and line[0] == "4")
    assert (row[3], row[6]) == ("10", "4"), "3 fast steps forward and back, and 4 draws; or 4 draws alone"


def test_one_block_for_a_whole_text_is_said(run, ltm):
    """Nothing is before it, so that there is no gain."""
    options = ("--limit", 2, "--samples", 2, "--estimators", "causal,causal_prior", "--block")
    whole, halves = (" ".join(ltm("evaluate", run, *options, block)[1].split()) for block in (500, 8))
    assert "predictive gain -" in whole
    assert "2 sequences are no longer than a block and have no gain: lower --block" in whole
    assert "no gain" not in halves


def test_the_documents_own_example_fits_into_80_columns(run, ltm):
    options = ("--estimators", "causal,causal_prior,iwae,prior_iwae", "--samples", "4,16", "--limit", 2)
    out = ltm("evaluate", run, *options, "--fast-steps", 1)[1]
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_no_fast_steps_leave_q_at_the_prior(run, ltm):
    options = ("--fast-steps", 0, "--limit", 6, "--estimators", "bound", "--json")
    assert json.loads(ltm("evaluate", run, *options)[1])["estimates"]["bound"]["kl_nats_per_token"] == 0


def test_the_table_says_what_is_no_bound(run, ltm):
    code, out, _ = ltm("evaluate", run, "--limit", 2, "--samples", 1, "--estimators", ",".join(ESTIMATORS))
    assert code == 0
    assert "2 sequences (1 document, the last one cut by --limit), 32 tokens" in " ".join(out.split())
    assert "One document has no standard error" in " ".join(out.split())
    rows = {
        words[0]: words[6] for words in map(str.split, out.splitlines()) if len(words) > 6 and words[0] in ESTIMATORS
    }
    assert rows == {name: "yes" if estimator.is_bound else "no" for name, estimator in ESTIMATORS.items()}


def test_data_that_has_moved(recipe, packed, ltm, refused, tmp_path):
    moved = tmp_path / "data"
    packed.rename(moved)
    run = tmp_path / "run"
    assert ltm("fit", "--config", recipe, "--run", run, "--data.directory", moved, "--trainer.max_steps", 1)[0] == 0
    moved.rename(packed)
    message = refused("evaluate", run)
    assert str(moved) in message
    assert "--data" in message


@pytest.mark.parametrize("prompt", ["", "the people read"])
def test_generate_prints_text_or_one_object(run, ltm, prompt):
    options = ("--prompt", prompt, "--num-samples", 2, "--max-new-tokens", 6)
    code, out, _ = ltm("generate", run, *options, "--json")
    found = json.loads(out)
    assert (code, found["prompt"], len(found["samples"])) == (0, prompt, 2)
    assert ltm("generate", run, *options)[1] == "\n---\n".join(prompt + text for text in found["samples"]) + "\n"
    assert found["samples"] == json.loads(ltm("generate", run, *options, "--json")[1])["samples"]
    assert found["samples"] != json.loads(ltm("generate", run, *options, "--seed", 1, "--json")[1])["samples"]


def test_streamed_text_is_the_text(run, ltm):
    options = ("generate", run, "--prompt", "the people", "--max-new-tokens", 12, "--refit-every", 5)
    code, out, err = ltm(*options, "--stream")
    assert (code, err, out) == (0, "", ltm(*options)[1])


def test_single_tokens_are_read_compiled_where_asked(run, ltm, monkeypatch):
    """The compiler itself runs in a process of its own, in tests/models/test_decoder.py."""
    lengths, options = [], ("generate", run, "--prompt", "the people", "--max-new-tokens", 6)

    def decode_chunk(decoder, tokens_BU, *rest):
        lengths.append(tokens_BU.shape[1])
        return decoder._decode_chunk(tokens_BU, *rest)

    monkeypatch.setattr(cached_decoding, "_compiled_decode_chunk", lambda: decode_chunk)
    assert ltm(*options)[1] == ltm(*options, "--compile")[1]
    assert lengths == [1] * 5  # all but the prompt


def test_a_run_that_was_trained_compiled_is_loaded_as_it_is(run):
    checkpoint = read_checkpoint(run)
    recipe = checkpoint["ltm_pyro"]["recipe"]
    for option in ("compile", "cuda_graph"):
        assert f"{option}: false" in recipe
        recipe = recipe.replace(f"{option}: false", f"{option}: true")
    loaded = build_run(recipe, checkpoint["ltm_pyro"]["tokenizer"], checkpoint["state_dict"], run)
    assert loaded.model.decoder._compiled_call_impl is None
    assert not loaded.inference.cuda_graph


def test_without_a_compiler_one_sentence_says_so(run, ltm, monkeypatch):
    def fails():
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(cached_decoding, "_compiled_decode_chunk", fails)
    code, out, err = ltm("generate", run, "--compile")
    assert (code, out) == (2, "")
    assert "--compile does not work on this machine (no compiler): leave it out." in err


def test_thoughts_are_chosen_and_interpolated(run, ltm):
    options = ("--max-new-tokens", 6, "--layers", 1, "--candidates", 3, "--fast-steps", 1, "--json")
    found = json.loads(ltm("generate", run, "--interpolate", "a day", "old people", "--num-samples", 3, *options)[1])
    assert found["interpolate"] == ["a day", "old people"]
    assert len(found["samples"]) == 3


def test_each_documents_figures_are_joined_with_it_on_its_id(run, ltm, tmp_path):
    records = [
        {"text": "the people read", "year": 1, "kind": "1"},
        {"text": "the people read", "year": 2.5, "kind": None},
        {"text": "a long text about time, " * 9, "year": 3},
        {"prompt": "the people ", "completion": "read", "good": True},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    out = tmp_path / "scores.jsonl"
    options = ("--data", tmp_path / "a.jsonl", "--estimators", "bound,iwae", "--json")
    code, printed, _ = ltm("evaluate", run, *options, "--by-document", out)
    scores = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert (code, list(scores)) == (0, [f"a.jsonl:{2 * n + 1}" for n in range(4)])
    for n, record in enumerate(records):
        found = scores[f"a.jsonl:{2 * n + 1}"]
        expected = {name: x for name, x in record.items() if name in ("year", "kind", "good")}
        assert found["labels"] == expected
        assert {name: type(x) for name, x in found["labels"].items()} == {k: type(x) for k, x in expected.items()}
        assert found["tokens"] > found["pieces"] > 0
    assert scores["a.jsonl:5"]["pieces"] > 1
    total = json.loads(printed)
    assert sum(x["tokens"] for x in scores.values()) == total["tokens"]
    nats = sum(x["bound_nats"] for x in scores.values()) / total["tokens"]
    assert nats == pytest.approx(total["estimates"]["bound"]["nats_per_token"])
    columns = [np.array([x[name] for x in scores.values()], float) for name in ("bound_nats", "tokens")]
    error = total["estimates"]["bound"]["stderr_nats_per_token"]  # pieces of one document are not independent
    assert error == pytest.approx(clustered_ratio(*columns).stderr)
    assert (total["documents"], total["sequences"]) == (4, sum(x["pieces"] for x in scores.values()))


def test_a_document_that_the_limit_cuts_is_marked(run, ltm, tmp_path):
    records = [{"text": "the people read a long text about time, " * n, "key": n} for n in (1, 4)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = ("--data", tmp_path / "a.jsonl", "--estimators", "bound", "--json", "--force")
    marks, pieces = {}, {}
    for limit in range(1, 40):
        words = (*options, "--limit", limit, "--by-document", tmp_path / "out")
        found = json.loads(ltm("evaluate", run, *words)[1])
        scores = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
        assert found["cut"] == any(x["cut"] for x in scores)
        assert sum(x["pieces"] for x in scores) == found["sequences"]
        marks[limit], pieces[limit] = [x["cut"] for x in scores], [x["pieces"] for x in scores]
        if found["sequences"] < limit:
            break
    one, two = pieces[limit]
    for n in range(1, limit):
        assert marks[n] == ([n < one] if n <= one else [False, n < one + two])


def test_ids_of_a_pack_come_back_with_their_type(run, ltm, tmp_path):
    records = {key: {"text": f"the {n} people", "key": key} for n, key in enumerate([7, "7", 3, 2**60, "x"])}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records.values())))
    words = ("--tokenizer", run / "tokenizer.json", "--seq-len", 16, "--id", "key", "--val-fraction", 0.8)
    (code, _, err), out = (
        ltm("data", "pack", tmp_path / "a.jsonl", "--out", tmp_path / "pack", *words),
        tmp_path / "out",
    )
    assert code == 0, err
    assert ltm("evaluate", run, "--data", tmp_path / "pack", "--estimators", "bound", "--by-document", out)[0] == 0
    scores = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(records[x["id"]]["key"] == x["id"] for x in scores)
    shown = json.loads(ltm("data", "show", tmp_path / "pack", "--split", "val", "--json")[1])["samples"]
    assert len(scores) == len({x["id"] for x in scores}) >= len(shown)
    assert {*(id for x in shown for id in x["documents"])} <= {x["id"] for x in scores}


def test_an_evaluation_on_the_test_split_is_marked_and_counted(run, ltm):
    for use in (1, 2):
        found = json.loads(ltm("evaluate", run, "--split", "test", "--estimators", "bound", "--json")[1])
        assert (found["split"], found["test_uses"]) == ("test", use)
    out = ltm("evaluate", run, "--split", "test", "--estimators", "bound")[1]
    assert "This is the test split, which this run has scored 3 times." in out
    assert json.loads(ltm("evaluate", run, "--estimators", "bound", "--json")[1])["test_uses"] is None
    (run / TEST_USES).unlink()


def test_what_is_observed_changes_the_fit_and_what_is_scored_the_figure(run, ltm, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "the ", "completion": "people"}) + "\n")
    figures = {}
    for score in ("all", "completion"):
        for observe in ("all", "prompt"):
            options = ("--score", score, "--observe", observe, "--estimators", "bound", "--json")
            found = json.loads(ltm("evaluate", run, "--data", tmp_path / "a.jsonl", *options)[1])
            assert (found["score"], found["observe"]) == (score, observe)
            figures[score, observe] = (
                found["tokens"],
                found["estimates"]["bound"]["kl_nats_per_token"] * found["tokens"],
            )
    assert figures["all", "all"][0] == figures["all", "prompt"][0] > figures["completion", "all"][0]
    for observe in ("all", "prompt"):  # the same q, whatever is scored
        assert figures["all", observe][1] == pytest.approx(figures["completion", observe][1])
    assert figures["all", "all"][1] != pytest.approx(figures["all", "prompt"][1])


def test_a_run_is_scored_as_it_was_trained(ltm, recipe, tmp_path):
    """Of its own data; other data are scored whole, because they may have no prompts."""
    records = [{"prompt": f"the {n} ", "completion": "people"} for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = (tmp_path / "a.jsonl", "--out", tmp_path / "pack", "--tokenizer", "bpe:280", "--val-fraction", 0.3)
    assert ltm("data", "pack", *words, "--seq-len", 16, "--keep-together", "exact")[0] == 0
    options = ("--data.directory", tmp_path / "pack", "--data.score", "completion", "--data.observe", "prompt")
    run, last = tmp_path / "run", ("--model.inference.slow_gradient", "last")
    code, _, err = ltm("fit", "--config", recipe, *options, *last, "--run", run)
    assert code == 0, err

    def evaluate(*options):
        found = json.loads(ltm("evaluate", run, "--estimators", "bound", "--json", *options)[1])
        return found["score"], found["observe"], found["tokens"]

    own, given = evaluate(), evaluate("--score", "completion", "--observe", "prompt")
    assert own == given
    assert own[:2] == ("completion", "prompt")
    assert evaluate("--score", "all")[:2] == ("all", "prompt")
    assert evaluate("--data", tmp_path / "pack")[:2] == ("all", "all")
    assert evaluate("--data", tmp_path / "pack")[2] > own[2]
    out = ltm("evaluate", run, "--estimators", "bound")[1]
    assert "Scored: completion. Observed by q: prompt." in out


def test_sequences_with_a_known_truth_have_it_in_the_table(ltm, recipe, tmp_path):
    """Fair coins: whatever the model, the exact figure is log 2, and no bound is below it by more than chance."""
    coins = np.random.default_rng(0).integers(0, 2, (200, 8))
    pack_sequences(coins, tmp_path / "coins", 2, exact_nats=[8 * math.log(2)] * 200, val_fraction=0.3)
    options = ("--data.directory", tmp_path / "coins", "--run", tmp_path / "run")
    assert ltm("fit", "--config", recipe, *options)[0] == 0
    found = json.loads(ltm("evaluate", tmp_path / "run", "--estimators", "bound", "--json")[1])
    assert found["exact"]["rate"]["nats_per_token"] == pytest.approx(math.log(2))
    excess = found["exact"]["excess"]["bound"]
    assert excess["nats_per_token"] == pytest.approx(
        found["estimates"]["bound"]["nats_per_token"] - math.log(2), abs=1e-9
    )
    assert excess["nats_per_token"] > 0
    assert "- exact" in ltm("evaluate", tmp_path / "run", "--estimators", "bound")[1]
