"""`ltm evaluate`: one JSON object, the same to the last digit, for packed data and for text."""

import json

import pytest

from ltm_pyro.inference.estimators import DEFAULT, ESTIMATORS
from ltm_pyro.models import cached_decoding
from ltm_pyro.runs.load import build_run
from ltm_pyro.training.run_directory import read_checkpoint

FIGURES = ("nats_per_token", "perplexity", "bits_per_byte", "stderr_nats_per_token", "kl_nats_per_token")


def test_json_is_one_object_of_the_agreed_form(run, ltm):
    code, out, err = ltm("evaluate", run, "--limit", 6, "--samples", 3, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) >= {"tokens", "sequences", "bytes", "estimates"}
    assert (found["sequences"], found["tokens"]) == (6, 96)
    assert found["bytes"] > 96
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
    assert found["thinking_gain"] is None
    found = json.loads(ltm("evaluate", run, "--limit", 1, "--estimators", "bound,prior", "--json")[1])
    bound, prior = (found["estimates"][name]["nats_per_token"] for name in ("bound", "prior"))
    assert found["thinking_gain"] == {"nats_per_token": prior - bound, "stderr_nats_per_token": None}


def test_what_thinking_is_worth_has_the_error_of_a_difference(run, ltm):
    options = ("--limit", 8, "--fast-steps", 0, "--samples", 400, "--estimators", "bound,prior", "--json")
    found = json.loads(ltm("evaluate", run, *options)[1])
    gain, bound = found["thinking_gain"], found["estimates"]["bound"]
    assert 0 < gain["stderr_nats_per_token"] < bound["stderr_nats_per_token"] / 5


def test_no_fast_steps_leave_q_at_the_prior(run, ltm):
    options = ("--fast-steps", 0, "--limit", 6, "--estimators", "bound", "--json")
    assert json.loads(ltm("evaluate", run, *options)[1])["estimates"]["bound"]["kl_nats_per_token"] == 0


def test_the_table_says_what_is_no_bound(run, ltm):
    code, out, _ = ltm("evaluate", run, "--limit", 2, "--samples", 1, "--estimators", ",".join(ESTIMATORS))
    assert code == 0
    assert "2 sequences, 32 tokens" in out
    rows = {words[0]: words[-1] for words in map(str.split, out.splitlines()) if words[-1:] in (["yes"], ["no"])}
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
