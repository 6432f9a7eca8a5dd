"""`ltm evaluate --suite`: every suite end to end, resumed where it was, and what it refuses."""

import json
import math

import numpy as np
import pytest

from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.documents import compare
from ltm_pyro.evaluation.suites import suite
from ltm_pyro.evaluation.suites.table import DOCUMENTS, REPORT, RESULTS, SUITES, _difference, markdown
from ltm_pyro.utils.files import lock_folder
from ltm_pyro.utils.statistics import clustered_ratio

LIMITS = ("--limit", 3, "--samples", 2, "--fast-steps", 1)
LAMBADA = [
    {"text": f"the old {word} day", "year": year} for word, year in (("small", 1), ("long", "1"), ("short", None))
]
TEXT = "the people read a long text about time. every old day the small model writes short words. "


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of made-up texts in the usual layout."""
    folder = tmp_path_factory.mktemp("suites")
    (folder / "eval").mkdir()
    (folder / "eval" / "ptb.valid.txt").write_text(TEXT * 3)
    (folder / "eval" / "lambada_test.jsonl").write_text("\n\n".join(map(json.dumps, LAMBADA)))
    (folder / "multilingual").mkdir()
    (folder / "multilingual" / "genesis.english.txt").write_text(TEXT)
    (folder / "multilingual" / "genesis.french.txt").write_text("the old day\n\n\néèêëîôû\n\n\nlong")
    return folder


def evaluate(ltm, run, data, out, *options, suites="zero-shot,multilingual"):
    return ltm("evaluate", run, "--suite", suites, "--suite-dir", data, "--out", out, *LIMITS, *options)


def test_every_suite_end_to_end(run, ltm, data, tmp_path):
    names = "zero-shot,multilingual,reconstruction,generation"
    options = ("--baseline", run, "--features", run, "--json")
    code, out, err = evaluate(ltm, run, data, tmp_path / "out", *options, suites=names)
    assert code == 0, err
    found = json.loads(out)["results"]
    assert list(found) == names.split(",")
    assert list(found["zero-shot"]) == ["ptb", "lambada", "lambada last word"]
    assert list(found["multilingual"]) == ["english", "french"]
    for parts in found.values():
        for figures in parts.values():
            assert figures["model"] == figures["baseline"]  # the same run under the same seed
    ptb, french = found["zero-shot"]["ptb"], found["multilingual"]["french"]["model"]
    assert ptb["paper"]["LTM-Medium"] == 32.06
    nats = {name: score["nats_per_token"] for name, score in ptb["model"]["estimates"].items()}
    assert ptb["model"]["predictive_gain"] == pytest.approx(nats["causal_prior"] - nats["causal"], abs=1e-6)
    assert 0 < french["predictive_gain_stderr"] < french["stderr"], "in bits per byte, and of a difference"
    assert found["zero-shot"]["lambada last word"]["model"]["passages"] == 3
    curve = found["reconstruction"]["held-out"]["model"]
    assert [f"accuracy_{layer}" in curve for layer in range(4)] == [True, True, True, False]
    assert 0 < found["generation"]["multinomial"]["model"]["mauve"] <= 1
    assert {file.name for file in (tmp_path / "out").iterdir()} == {RESULTS, REPORT, "reconstruction.png", DOCUMENTS}
    files = {file.name: file.read_text() for file in (tmp_path / "out" / DOCUMENTS).iterdir()}
    places = ("zero-shot.ptb", "zero-shot.lambada", "zero-shot.lambada-last-word", "multilingual.english")
    assert {f"{x}.{column}.jsonl" for x in places for column in ("model", "baseline")} < {*files}
    for part, nats in (("lambada", "bound_nats"), ("lambada last word", "nats")):
        lines = [json.loads(x) for x in files[f"zero-shot.{part.replace(' ', '-')}.model.jsonl"].splitlines()]
        ids, labels = [x["id"] for x in lines], [x["labels"]["year"] for x in lines]
        expected = [(type(x["year"]), x["year"]) for x in LAMBADA]
        assert ids == [f"lambada_test.jsonl:{2 * n + 1}" for n in range(len(lines))]
        assert [(type(x), x) for x in labels] == expected[: len(lines)]
        figures = found["zero-shot"][part]["model"]
        assert sum(x[nats] for x in lines) / figures["tokens"] == pytest.approx(figures["nats_per_token"])
    report = (tmp_path / "out" / REPORT).read_text()
    assert all(f"## {name}" in report for name in names.split(","))
    assert "LTM-Medium 32.06" in report


def test_finished_parts_are_not_computed_again(run, ltm, data, tmp_path, monkeypatch):
    whole = evaluate(ltm, run, data, tmp_path / "whole", "--json")[1]
    score, scored = suite.evaluate_run, []

    def interrupted(run, place, *arguments, **settings):
        if place.endswith("french.txt"):
            raise KeyboardInterrupt
        return score(run, place, *arguments, **settings)

    monkeypatch.setattr(suite, "evaluate_run", interrupted)
    assert evaluate(ltm, run, data, tmp_path / "out")[0] == 130
    kept = json.loads((tmp_path / "out" / RESULTS).read_text())["results"]
    assert list(kept["zero-shot"]) == ["ptb", "lambada", "lambada last word"]
    assert list(kept["multilingual"]) == ["english"]

    def counted(run, place, *arguments, **settings):
        scored.append(place)
        return score(run, place, *arguments, **settings)

    monkeypatch.setattr(suite, "evaluate_run", counted)
    code, out, err = evaluate(ltm, run, data, tmp_path / "out", "--json")
    assert code == 0
    assert scored == [str(data / "multilingual" / "genesis.french.txt")]
    assert err.count("\n") == 1  # one part was left
    assert json.loads(out)["results"] == json.loads(whole)["results"]


def test_results_of_other_settings_are_kept(run, ltm, refused, data, tmp_path):
    out, suite = tmp_path / "out", ("--suite", "multilingual", "--suite-dir", data)
    assert evaluate(ltm, run, data, out, suites="multilingual")[0] == 0
    before = (out / RESULTS).read_bytes()
    message = refused("evaluate", run, *suite, "--out", out, *LIMITS, "--seed", 1)
    assert "`seed`" in message
    assert "--force" in message
    assert (out / RESULTS).read_bytes() == before
    assert evaluate(ltm, run, data, out, "--seed", 1, "--force", suites="multilingual")[0] == 0
    (out / RESULTS).write_text("[]")
    assert "not what" in refused("evaluate", run, *suite, "--out", out, *LIMITS)


def test_only_one_process_writes_results(run, refused, data, tmp_path):
    out = tmp_path / "out"
    with lock_folder(out.with_name(".out.lock"), "busy", "--out"):
        message = refused("evaluate", run, "--suite", "multilingual", "--suite-dir", data, "--out", out, *LIMITS)
    assert "Another process writes to" in message
    assert not out.exists()


def test_two_languages_of_one_name_are_refused(run, refused, tmp_path):
    (tmp_path / "multilingual").mkdir()
    for name in ("wiki.en.txt", "news.en.txt"):
        (tmp_path / "multilingual" / name).write_text(TEXT)
    message = refused("evaluate", run, "--suite", "multilingual", "--suite-dir", tmp_path, "--out", tmp_path / "out")
    assert "the same row, 'en' of the suite multilingual" in message


def test_a_broken_file_leaves_what_is_finished(run, ltm, data, tmp_path):
    (tmp_path / "multilingual").mkdir()
    for name, text in (("a.english.txt", TEXT.encode()), ("b.french.txt", "forêt".encode("latin-1"))):
        (tmp_path / "multilingual" / name).write_bytes(text)
    code, _, err = evaluate(ltm, run, tmp_path, tmp_path / "out", suites="multilingual")
    assert code == 2
    assert "b.french.txt is not UTF-8" in err
    assert list(json.loads((tmp_path / "out" / RESULTS).read_text())["results"]["multilingual"]) == ["english"]


def test_a_run_without_a_bound_says_so(run, recipe, ltm, data, tmp_path):
    point, quick = tmp_path / "point", ("--trainer.max_steps", 1, "--trainer.limit_val_batches", 0)
    assert ltm("fit", "--config", recipe, "--run", point, *quick, "--model.guide", "ltm_pyro.guides.Point")[0] == 0
    options, names = ("--baseline", point, "--json"), "zero-shot,multilingual,generation"
    code, out, err = evaluate(ltm, run, data, tmp_path / "out", *options, suites=names)
    assert code == 0, err
    found = json.loads(out)["results"]
    for name, part, figure in (("zero-shot", "ptb", "perplexity"), ("multilingual", "french", "bits_per_byte")):
        row = found[name][part]
        assert row["baseline"][figure] is None
        assert row["model"][figure] > 1
        assert row["baseline"]["predictive_gain"] is not None, "it needs draws only"
    report = (tmp_path / "out" / REPORT).read_text()
    assert report.count("\nbaseline: bound, iwae, reused_noise unavailable, because Point has no density.\n") == 1
    assert "judged_bits_per_byte unavailable, because the judge has no bound (Point has no density)." in report


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--suite", "zero"), ("'zero'", "zero-shot")),
        (("--suite", "zero-shot"), ("--suite-dir",)),
        (("--suite", "zero-shot", "--suite-dir", "nowhere"), ("nowhere", "does not exist")),
        (("--suite", "zero-shot", "--suite-dir", "."), ("no data", "ptb*")),
        (("--suite", "gsm8k", "--suite-dir", "."), ("gsm8k*.jsonl",)),
        (("--suite", "multilingual", "--suite-dir", "."), ("multilingual",)),
        (("--suite", "zero-shot", "--source", "ptb"), ("NAME=PLACE",)),
        (("--suite", "zero-shot", "--source", "pbt=x.txt"), ("--source pbt=x.txt", "ptb, wikitext-2")),
        (("--suite", "zero-shot", "--source", "ptb=x", "--source", "ptb=y"), ("ptb is given twice", "x and y")),
        (("--suite", "gsm8k", "--source", "ptb=x.txt"), ("--source ptb has no data", "gsm8k*.jsonl")),
        (("--suite", "reconstruction", "--data", "x.txt"), ("--data",)),
        (("--suite", "reconstruction", "--normaliser", 9, "--block", 8), ("--block, --normaliser",)),
        (("--features", "x", "--shots", 0), ("Without --suite", "--shots, --features, --out")),
        (("--suite", "reconstruction", "--baseline", "nowhere"), ("nowhere",)),
    ],
    ids=str,
)
def test_what_cannot_be_evaluated(run, refused, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    message = refused("evaluate", run, "--out", "out", *options)
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


def test_every_suite_is_named_in_the_help(ltm):
    help_text = ltm("evaluate", "--help")[1]
    assert all(name in help_text for name in SUITES)


def test_a_model_and_its_baseline_are_compared_document_by_document(run, recipe, ltm, data, tmp_path):
    other, quick = tmp_path / "other", ("--trainer.max_steps", 1, "--trainer.limit_val_batches", 0)
    assert ltm("fit", "--config", recipe, "--run", other, *quick, "--seed_everything", 7)[0] == 0
    code, out, err = evaluate(ltm, run, data, tmp_path / "out", "--baseline", other, "--json", suites="zero-shot")
    assert code == 0, err
    row = json.loads(out)["results"]["zero-shot"]["ptb"]
    apart = row["model"]["nats_per_token"] - row["baseline"]["nats_per_token"]
    assert row["model - baseline"]["nats_per_token"] == pytest.approx(apart)
    files = [tmp_path / "out" / "documents" / f"zero-shot.ptb.{name}.jsonl" for name in ("model", "baseline")]
    ours, theirs = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert compare(ours, theirs).value == pytest.approx(apart)
    assert "| ptb | model - baseline |" in (tmp_path / "out" / REPORT).read_text()
    with pytest.raises(UsageError, match="on the same documents"):
        compare(ours, theirs[1:])


def test_a_baseline_of_other_settings_is_not_compared_with(run, ltm, data, tmp_path):
    """What an earlier call has written of a baseline is no comparison of a later one, which has none."""
    out = tmp_path / "out"
    assert evaluate(ltm, run, data, out, "--baseline", run, suites="multilingual")[0] == 0
    code, shown, err = evaluate(ltm, run, data, out, "--force", "--json", suites="multilingual")
    assert code == 0, err
    assert all({*row} == {"model"} for row in json.loads(shown)["results"]["multilingual"].values())


def test_a_comparison_that_is_not_there_has_a_reason(tmp_path):
    """Another tokenizer; and a name that has a line separator in it is one line of JSON."""
    lines = [
        {"id": "one\u2028two", "file": "", "tokens": tokens, "bytes": 5, "bound_nats": nats}
        for tokens, nats in ((3, 1.0), (4, 2.0))
    ]
    files = [tmp_path / "a", tmp_path / "b"]
    for file, line in zip(files, lines, strict=True):
        file.write_text(json.dumps(line, ensure_ascii=False) + "\n", "utf-8")
    assert _difference(files, "bytes", "bits_per_byte")["bits_per_byte"] == pytest.approx(-0.2 / math.log(2))
    row = _difference(files, "tokens", "nats_per_token")
    assert "another tokenizer" in row["unavailable"]["nats per token"]
    content = {"settings": {"model": "run"}, "results": {"zero-shot": {"ptb": {"model - baseline": row}}}}
    reason = "because two models are compared on the same documents, but 'one\u2028two' has other tokens"
    assert f"model - baseline: nats per token unavailable, {reason}" in markdown(content)
    files[1].write_text(json.dumps(lines[1] | {"bound_nats": None}))
    assert "no document has a finite bound_nats" in str(_difference(files, "bytes", "bits_per_byte"))
    files[1].write_text(json.dumps({name: x for name, x in lines[1].items() if name != "bound_nats"}))
    assert "has no bound" in _difference(files, "bytes", "bits_per_byte")["unavailable"]["bits per byte"]


def test_bits_per_byte_of_a_language_have_an_error_by_byte(run, ltm, data, tmp_path):
    code, shown, err = evaluate(ltm, run, data, tmp_path / "out", "--json", suites="multilingual")
    assert code == 0, err
    found = json.loads(shown)["results"]["multilingual"]["french"]["model"]
    file = tmp_path / "out" / DOCUMENTS / "multilingual.french.model.jsonl"
    documents = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    nats, size = (np.array([x[name] for x in documents], float) for name in ("bound_nats", "bytes"))
    expected = clustered_ratio(nats / math.log(2), size)
    assert found["bits_per_byte"] == pytest.approx(expected.value)
    assert found["stderr"] == pytest.approx(expected.stderr)
    longer = [x for x in documents if x["tokens"] > 4]  # a quarter of the model's length is a block
    assert found["shorter_than_a_block"] == len(documents) - len(longer) > 0
    gain, size = (np.array(x, float) for x in zip(*((_gain(x), x["bytes"]) for x in longer), strict=True))
    assert found["predictive_gain"] == pytest.approx(gain.sum() / math.log(2) / size.sum())
    assert found["predictive_gain_stderr"] == pytest.approx(clustered_ratio(gain / math.log(2), size).stderr)


def _gain(document):
    return document["causal_prior_nats"] - document["causal_nats"]
