"""The harness's requests, handled side by side by its model for Hugging Face and by ours.

Both models are one and the same: what follows a token depends on nothing but that token (or, uniform, on nothing), so
that answers are equal where the same tokens are conditioned on and scored.
"""

import random
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ltm_pyro.data.encode import encode_prompt
from ltm_pyro.errors import UsageError
from ltm_pyro.text.streaming import token_texts

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytest.importorskip("accelerate", reason="accelerate, which the harness's model needs, is not installed")
transformers = pytest.importorskip("transformers", reason="the extra suites is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.metrics import exact_match_hf_evaluate  # noqa: E402
from lm_eval.filters.extraction import RegexFilter  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from ltm_pyro.evaluation import lm_eval as ours  # noqa: E402
from ltm_pyro.evaluation.suites import gsm8k  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness, of accelerate and of transformers
WORDS = [
    "the",
    "old",
    "model",
    "reads",
    "a",
    "long",
    "text",
    "and",
    "writes",
    "short",
    "words",
    "about",
    "time",
    "café",
]
LENGTH = 24


@pytest.fixture
def pair(tiny_run, monkeypatch):
    """Makes our model and theirs of one distribution: that of a token after the one before it, or the uniform one."""

    def make(uniform=False):
        run = tiny_run(thoughts=0, length=LENGTH, width=16)
        size = run.model.decoder.vocabulary
        torch.manual_seed(1)
        embedding = torch.randn(size, 16) * torch.rand(size, 1) * 2 * (not uniform)
        embedding -= embedding.mean(-1, keepdim=True)  # the norm of GPT-2 subtracts the mean, ours does not
        bytes_V = token_texts(run.tokenizer)
        embedding[[not text.isascii() for text in bytes_V]] = 0  # parts of characters, which ours leaves out of texts
        options = {"n_embd": 16, "n_layer": 1, "n_head": 2, "layer_norm_epsilon": torch.finfo(torch.float64).eps}
        ends = {"bos_token_id": run.start_token, "eos_token_id": run.start_token}
        config = transformers.GPT2Config(vocab_size=size, n_positions=LENGTH, **options, **ends)
        gpt2 = transformers.GPT2LMHeadModel(config).double().eval()
        with torch.no_grad():
            run.model.decoder.embedding.weight.copy_(embedding)
            for block in run.model.decoder.blocks:
                block.self_attention.output.weight.zero_()
                block.feed_forward.down.weight.zero_()
            gpt2.transformer.wte.weight.copy_(embedding)
            gpt2.transformer.wpe.weight.zero_()
            for name, weight in gpt2.transformer.h.named_parameters():
                if "c_proj" in name:
                    weight.zero_()
        end = "<|endoftext|>"
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=run.tokenizer, bos_token=end, eos_token=end, pad_token=end
        )
        theirs = HFLM(pretrained=gpt2, tokenizer=tokenizer, device="cpu", batch_size=4)
        monkeypatch.setattr(ours, "load_run", lambda *a, **k: run)
        return ours.LTM("run", samples=2, batch_size=4), theirs

    return make


def texts(count, longest, seed=0):
    """Texts of 1 to ``longest`` words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=1 + i % longest)) for i in range(count)]


def requests(kind, arguments):
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def tokens(model, text):
    return encode_prompt(model._run.tokenizer, text)


def test_continuations(pair):
    """30 of them: no context, spaces at its end, a context that is too long, a continuation that fills the model."""
    mine, theirs = pair()
    contexts = ["", "the ", "the  \n", "a\n\n", *texts(6, 6), *texts(20, 40, seed=1)]
    asked = requests("loglikelihood", zip(contexts, [f" {x}" for x in texts(30, 5, seed=2)], strict=True))
    assert any(len(tokens(mine, "".join(x.args))) > LENGTH + 1 for x in asked)
    found, expected = mine.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected])
    assert [x for _, x in found] == [x for _, x in expected]
    likely = [
        max(WORDS, key=lambda w: mine.loglikelihood(requests("loglikelihood", [(c, f" {w}")]))[0][0]) for c in "ab"
    ]
    again = requests("loglikelihood", zip("ab", (f" {word}" for word in likely), strict=True))
    assert mine.loglikelihood(again)[0][1] == theirs.loglikelihood(again, disable_tqdm=True)[0][1]


@pytest.mark.parametrize(
    ("context", "continuation"), [("the", ""), ("", ""), ("the", " old" * (LENGTH + 1))], ids=["blank", "both", "long"]
)
def test_continuations_that_neither_scores(pair, context, continuation):
    mine, theirs = pair()
    asked = requests("loglikelihood", [(context, continuation)])
    with pytest.raises((AssertionError, IndexError)):
        theirs.loglikelihood(asked, disable_tqdm=True)
    with pytest.raises((UsageError, IndexError)) as caught:
        mine.loglikelihood(asked)
    assert continuation == "" or "but the model's length is 24: leave the task out" in str(caught.value)


def test_whole_texts(pair):
    """30 of them: blank, of spaces, of one window, and of several."""
    whole = ["", " ", "\n\n", *texts(17, 8), *texts(10, 50, seed=1)]
    asked = requests("loglikelihood_rolling", [(text,) for text in whole])
    mine, theirs = pair()
    short = [index for index, text in enumerate(whole) if len(tokens(mine, text)) <= LENGTH]
    assert 5 < len(short) < 30
    found, expected = mine.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert found[0] == expected[0] == 0
    assert [found[i] for i in short] == pytest.approx([expected[i] for i in short])
    mine, theirs = pair(uniform=True)  # every token once, also where there are several windows
    found, expected = mine.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert found == pytest.approx(expected)


WRITTEN = [
    {"until": [".", "gn", "dse"], "max_gen_toks": 6},  # which end in the middle of a token
    {"until": " ", "max_new_tokens": 7},
    {"until": ["e", "o"], "max_tokens": 9, "do_sample": False},
    {"max_gen_toks": 8, "temperature": 0.7, "do_sample": False},
    {"until": ["a", "t"], "max_gen_toks": 5, "temperature": 0.0, "top_k": None},
    {"until": [], "max_gen_toks": 4, "max_new_tokens": 9},
]


def test_writing(pair):
    """30 requests: five prompts, one of them too long, with each way to name limits, stops and greedy decoding."""
    mine, theirs = pair()
    prompts = [*texts(4, 5), texts(1, 1)[0] + " old model reads" * 9]
    asked = requests("generate_until", [(prompt, dict(options)) for options in WRITTEN for prompt in prompts])
    assert len(asked) == 30
    found = mine.generate_until(asked)
    assert found == theirs.generate_until(asked, disable_tqdm=True)
    assert len({*map(len, found)}) > 3


def test_an_empty_stop_string_leaves_one_token(pair):
    mine, theirs = pair()
    for until in ([""], "", ["", "\0"]):
        asked = requests("generate_until", [("the old", {"max_gen_toks": 6, "until": until})])
        assert mine.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_settings_that_change_nothing_are_followed(pair):
    mine, theirs = pair()
    given = {"max_gen_toks": 6, "num_beams": 1, "early_stopping": False}
    asked = requests("generate_until", [("the old", given)])
    assert mine.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_settings_that_theirs_does_not_survive(pair):
    """No temperature is greedy, as the harness's warning says."""
    mine, _ = pair()

    def write(**options):
        return mine.generate_until(requests("generate_until", [("the old", {"max_gen_toks": 6} | options)]))

    greedy = write(until=[])
    assert greedy == write(until=None)
    assert greedy == write(do_sample=True, temperature=0.0) == write(do_sample=True, temperature=0.0, top_p=0.9)
    assert greedy == write(do_sample=None, temperature=None, top_k=None, top_p=None)
    with pytest.raises(UsageError, match="asks for generation with num_beams, which this model does not know: choose"):
        write(num_beams=4)


def test_a_temperature_alone_samples(pair):
    """As `normalize_gen_kwargs` has it; the same prompt asked for twice has two texts."""
    mine, _ = pair()
    asked = [("the old", {"max_gen_toks": 12, "temperature": 20.0}) for _ in range(2)]
    first, second = mine.generate_until(requests("generate_until", asked))
    assert first != second
    assert [first, second] == mine.generate_until(requests("generate_until", asked))


def test_more_than_the_model_can_write(pair, caplog):
    mine, theirs = pair()
    asked = requests("generate_until", [("the old", {"until": ["\0"], "max_gen_toks": 2 * LENGTH})])
    with pytest.raises(AssertionError):
        theirs.generate_until(asked, disable_tqdm=True)
    assert mine.generate_until(asked)
    assert "48 tokens are asked for, but the model's length is 24: half of it is written" in caplog.text


def test_choices_of_a_question_share_a_fit(pair, monkeypatch):
    from ltm_pyro.text import scoring

    mine, _ = pair()
    fitted, infer = [], scoring.infer_local

    def watched(model, guide, batch, *rest, **options):
        fitted.append(batch.size)
        return infer(model, guide, batch, *rest, **options)

    monkeypatch.setattr(scoring, "infer_local", watched)
    questions = texts(5, 5)
    mine.loglikelihood(requests("loglikelihood", [(q, f" {word}") for q in questions for word in WORDS[:4]]))
    assert sum(fitted) == len(questions)


@pytest.mark.parametrize("size", ["auto", "auto:4", "7", 7])
def test_every_batch_size_of_the_command_line(pair, size):
    pair()
    model = ours.LTM("run", batch_size=size, max_batch_size=64, device=None)
    assert model._scoring.batch_size == (7 if "7" in str(size) else 32)


def test_a_misspelt_argument(pair):
    pair()
    with pytest.raises(UsageError, match="--model_args has no sampels; did you mean samples: choose from run, estimat"):
        ours.LTM("run", sampels=4)


PARTS = ["#### ", "####", "-", "\u2212", " ", "$", "1", "20", "3.5", "1,000", ".", "/", "km", "\n", "x", "\\boxed{4}"]


@settings(max_examples=500)
@given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
def test_results_of_gsm8k_are_found_and_compared_as_there(answer):
    """By the filters and the measure of the task, and the strings of its file."""
    task = (Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text()
    raw = yaml.safe_load(task)
    ignored = raw["metric_list"][0]["regexes_to_ignore"]
    assert tuple(ignored) == gsm8k.IGNORED
    truth = "so 2 * 500 = 1000\n#### 1,000"
    for way, chosen in zip(gsm8k.EXTRACT, raw["filter_list"], strict=True):
        options = {name: x for name, x in chosen["filter"][0].items() if name != "function"}
        ((theirs,),) = RegexFilter(**options).apply([[answer]], [{}])
        assert (gsm8k.extract(answer, way) or "[invalid]") == theirs
        same = exact_match_hf_evaluate([theirs], [truth], regexes_to_ignore=ignored, ignore_case=True)
        assert gsm8k.is_right(answer, truth, way) == same["exact_match"]
