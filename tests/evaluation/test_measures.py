"""Every measure against a known answer or against its definition."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltm_pyro.data.encode import encode_prompt
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.suites import gsm8k
from ltm_pyro.evaluation.suites.features import load_extractor, run_extractor
from ltm_pyro.evaluation.suites.generation import compression_ratio, distinct, repetition, self_bleu
from ltm_pyro.evaluation.suites.gsm8k import (
    Problem,
    as_compared,
    build_prompt,
    extract,
    is_right,
    pass_at_k,
    read_problems,
)
from ltm_pyro.evaluation.suites.mauve import SCALE, frontier_area, mauve
from ltm_pyro.evaluation.suites.suite import BY_DOCUMENT, Options
from ltm_pyro.utils.statistics import wilson


def kl(p, r):
    return sum(a * math.log(a / b) for a, b in zip(p, r, strict=True) if a)


def test_equal_histograms_have_mauve_1_and_disjoint_ones_the_known_area():
    p = np.array([0.2, 0.3, 0.5])
    assert frontier_area(p, p) == pytest.approx(1)
    weights = np.linspace(0, 1, 20_001)[1:-1]  # disjoint: KL(P | R) = -log λ, KL(Q | R) = -log (1 - λ)
    y, x = weights**SCALE, (1 - weights) ** SCALE
    exact = math.gamma(1 + SCALE) ** 2 / math.gamma(1 + 2 * SCALE)  # ∫ y dx = c B(c, c + 1)
    assert abs(float(np.trapezoid(y[::-1], x[::-1]))) == pytest.approx(exact, rel=1e-3)
    assert frontier_area(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(exact, rel=0.02)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=5))
def test_the_frontier_is_symmetric_and_within_its_bounds(counts):
    p, q = (np.array(x) + 1e-3 for x in zip(*counts, strict=True))
    p, q = p / p.sum(), q / q.sum()
    area = frontier_area(p, q)
    assert area == pytest.approx(frontier_area(q, p), rel=1e-6)
    assert 0 < area <= 1 + 1e-9


def test_mauve_falls_as_texts_move_apart():
    draw = np.random.default_rng(0)
    text = draw.normal(size=(200, 8))
    scores = [mauve(text, draw.normal(loc=shift * np.eye(8)[0], size=(200, 8))) for shift in (0, 1, 3)]
    assert scores[0] > 0.9
    assert scores == sorted(scores, reverse=True)
    assert scores[2] < 0.1


def test_features_belong_to_their_text(tiny_run):
    run = tiny_run()
    texts = ["the old", "a long text", "short words about"]
    together = run_extractor(run)(texts, 0)
    assert together.shape == (3, run.model.decoder.width)
    np.testing.assert_allclose(run_extractor(run, batch_size=1)(texts, 0), together)


def test_features_of_a_hugging_face_folder_are_its_states_behind_the_last_token(tiny_run, tmp_path):
    import transformers  # here, because it takes seconds

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_run().tokenizer)
    sizes = {"vocab_size": tokenizer.vocab_size, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2Model(transformers.GPT2Config(**sizes)).eval()
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "gpt2")
    text = "the old model reads a long text about short words"
    (found,) = load_extractor(str(tmp_path / "gpt2"))([text], 0)
    ids = torch.tensor([tokenizer(text)["input_ids"][:8]])
    np.testing.assert_allclose(found, model(ids).last_hidden_state[0, -1].detach().numpy(), rtol=1e-5)
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    load_extractor.cache_clear()
    with pytest.raises(UsageError, match="no Hugging Face model with tokenizer and safetensors"):
        load_extractor(str(tmp_path / "gpt2"))


def bleu(text, others, order=4):
    """The definition, n-gram by n-gram."""
    logs = []
    for n in range(1, order + 1):
        grams = [Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1)) for t in (text, *others)]
        found = sum(min(k, max(other[gram] for other in grams[1:])) for gram, k in grams[0].items())
        logs.append(math.log((found + (n > 1)) / (sum(grams[0].values()) + (n > 1))) if found or n > 1 else -math.inf)
    closest = min((len(t) for t in others), key=lambda size: (abs(size - len(text)), size))
    return math.exp(sum(logs) / order) * min(1, math.exp(1 - closest / len(text)))


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), min_size=2, max_size=4))
def test_self_bleu_is_bleu_against_all_others(texts):
    expected = [bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    assert self_bleu(texts) == pytest.approx(expected)


def test_mauve_of_few_and_of_equal_texts():
    draw = np.random.default_rng(0)
    for sizes in ((1, 5), (5, 1), (0, 2)):
        with pytest.raises(UsageError, match=f"sets of at least two texts, got {sizes[0]} and {sizes[1]}: give more"):
            mauve(*(draw.normal(size=(n, 4)) for n in sizes))
    assert mauve(np.ones((30, 4)), np.ones((20, 4))) == pytest.approx(1)
    assert 0 < mauve(np.repeat(np.eye(4)[:2], 20, 0), np.repeat(np.eye(4)[1:3], 20, 0)) < 1  # fewer texts than clusters


def test_equal_texts_have_self_bleu_1():
    assert self_bleu([list("abcde")] * 3) == pytest.approx([1] * 3)


def test_repetition_and_distinctness():
    assert distinct([list("aab"), list("ab")], 1) == 2 / 5
    assert distinct([list("aab"), list("ab")], 2) == 2 / 3
    assert repetition(list("abcdabcd")) == 1 - 4 / 5
    assert repetition(list("abc")) == 0
    assert compression_ratio(["same text again and again"] * 50) > 10 > compression_ratio(["one text"])


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", "7", "7"),
        ("#### 1,234.50 dollars", "1234.50", "1234.50"),
        ("so $18 a day, that is -2", None, "-2"),
        ("It costs $1,800.", None, "1800"),
        ("no idea", None, None),
        ("#### none, though 4 before", None, "4"),
        ("#### -5", "-5", "-5"),
        ("#### \u22125", None, "5"),  # the sign of a Unicode minus is lost, there too
        ("#### - 5", None, "5"),
        ("#### $12", None, "12"),
        ("#### 3/4 of it", "3", "4"),
        ("\\boxed{42}", None, "42"),
        ("between 10-20", None, "-20"),
        ("#### 7.", "7", "7"),
        ("#### 7.0", "7.0", "7.0"),
        ("#### 7\n#### 8", "7", "8"),
        ("#### 12 km\u00b2", "12", "12"),  # no digit of its own: a superscript two
    ],
)
def test_results_are_found_as_by_the_harness(answer, strict, flexible):
    found = {way: extract(answer, way) for way in ("strict", "flexible")}
    assert {way: x and as_compared(x) for way, x in found.items()} == {"strict": strict, "flexible": flexible}


def test_thousands_dollars_and_the_last_stop_do_not_count():
    truth = "He pays 2 * 900 = <<2*900=1800>>1,800.\n#### 1,800"
    assert is_right("so #### 1800", truth, "strict")
    assert is_right("It costs $1,800.", truth, "flexible")
    assert not is_right("It costs $1,800.", truth, "strict")
    assert not is_right("#### 1800.0", truth, "strict")


def test_pass_at_k_is_the_average_over_choices(tiny_run, monkeypatch):
    """The share of subsets of k answers with a correct one, by enumeration."""
    right = [[True, False, False, False, False, False], [False] * 6, [True] * 4 + [False] * 2]
    problems = [Problem("2 + 5?", "#### 7")] * 3
    texts = ["#### 7" if hit else "8" for row in right for hit in row]
    monkeypatch.setattr(gsm8k, "generate", lambda *a, **k: texts)
    found = pass_at_k(problems, Options(shots=0, attempts=6), tiny_run(length=120))
    for k in (1, 5):
        shares = [np.mean([any(chosen) for chosen in itertools.combinations(row, k)]) for row in right]
        for way in ("strict", "flexible"):
            assert found[f"pass@{k}_{way}"] == pytest.approx(np.mean(shares))
    assert [(x["strict"], x["flexible"]) for x in found[BY_DOCUMENT]] == [(sum(row), sum(row)) for row in right]
    assert (found["questions"], found["no_number"]) == (3, 0)


def test_answers_are_written_for_the_question_asked(tiny_run):
    run = tiny_run(length=200)
    found = pass_at_k([Problem("1 + 1?", "#### 2")] * 3, Options(shots=1, attempts=2, fast_steps=1), run)
    assert (found["questions"], found["left_out"], found["shots"], found["attempts"]) == (2, 0, 1, 2)
    for way in ("strict", "flexible"):
        assert 0 <= found[f"pass@1_{way}_low"] <= found[f"pass@1_{way}"] <= found[f"pass@1_{way}_high"] <= 1
    assert [(x["result"], len(x["answers"])) for x in found[BY_DOCUMENT]] == [("2", 2)] * 2


def test_examples_are_left_out_until_the_prompt_fits(tiny_run):
    run = tiny_run(length=100)
    examples = [Problem(f"{i} + {i}?", f"#### {2 * i}") for i in range(3)]
    texts = {room: build_prompt(run, examples, "9 + 9?", room) for room in (20, 50, 99)}
    assert texts[99] is None
    assert 0 < texts[50].count("Question:") < texts[20].count("Question:")
    assert all(len(encode_prompt(run.tokenizer, text)) + room <= 100 for room, text in texts.items() if text)
    assert texts[50].endswith("Question: 9 + 9?\nAnswer:")
    assert "2 + 2?" in texts[20] or texts[20].count("Question:") == 1  # the last example is the last to go


def test_capital_letters_do_not_hide_data(tmp_path):
    (tmp_path / "Eval").mkdir()
    for name in ("PTB.Test.TXT", "gsm8k.Train.JSONL", "GSM8K.test.Jsonl"):
        (tmp_path / "Eval" / name).write_text("")
    options = Options(directory=tmp_path)
    assert options.find("ptb", "ptb*test*") == str(tmp_path / "Eval" / "PTB.Test.TXT")
    assert options.find("gsm8k", "gsm8k*test*.jsonl", "gsm8k*.jsonl") == str(tmp_path / "Eval" / "GSM8K.test.Jsonl")
    assert options.find("gsm8k", "eval/*train*.jsonl") == str(tmp_path / "Eval" / "gsm8k.Train.JSONL")
    assert options.find("lm1b", "lm1b*") is None


def test_wilson():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = wilson(0.0, 20)
    assert low == 0
    assert high == pytest.approx(0.1611, abs=1e-4)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "line 2"),
        ('{"question": "q"}', "'answer'"),
        ('{"question": "q", "answer": "x"}', "number"),
        ('{"question": "q", "answer": 4}', "expected str instance, int found"),
        ('{"question": ["q"], "answer": "4"}', "expected str instance, list found"),
        (r'{"question": "\ud800", "answer": "4"}', "surrogates not allowed"),
    ],
)
def test_a_line_that_is_no_problem(tmp_path, line, word):
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n" + line)
    with pytest.raises(UsageError, match=word):
        read_problems(file)
