"""`ltm generate --rethink`: drafts with their figures, one kept, and one sentence for what does not go together."""

import json

import pytest


@pytest.mark.parametrize("target", ["rethink", "gibbs", "ancestral"])
def test_it_writes_again_and_says_what_it_wrote(run, ltm, target):
    words = ("generate", run, "--prompt", "time and", "--rethink", 2, "--max-new-tokens", 4, "--chains", 2)
    code, out, err = ltm(*words, "--target", target, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [len(row) for row in found["drafts"]] == [2, 2, 2]
    assert found["text"] == found["drafts"][-1][0]
    assert len(found["elbo"]) == len(found["kl"]) == len(found["log_likelihood"]) == len(found["accepted"]) == 3
    text = ltm(*words, "--target", target)[1]
    assert text == "\n---\n".join("time and" + draft for draft in found["drafts"][-1]) + "\n"
    kept = ltm(*words, "--target", target, "--keep", "likelihood")[1]
    assert kept.startswith("time and")
    assert json.loads(ltm(*words, "--target", target, "--json", "--seed", 1)[1])["drafts"] != found["drafts"]


def test_what_does_not_go_together_is_refused(run, refused):
    assert "--chains has no effect without --rethink N" in refused("generate", run, "--chains", 2)
    assert "--keep has no effect without --rethink N" in refused("generate", run, "--keep", "elbo")
    assert "--rethink does not go with" in refused("generate", run, "--rethink", 2, "--num-samples", 2)
    assert "The target gibbs needs y" in refused("generate", run, "--rethink", 2, "--target", "gibbs", "--greedy")
