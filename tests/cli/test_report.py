"""`ltm report`: a self-contained page; its verdicts agree with the file and its links have targets."""

import re
import shutil
import subprocess

import pytest

from ltm_pyro.analysis import Posterior

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]


@pytest.fixture
def posterior(run, corpus, ltm, tmp_path):
    path = tmp_path / "posterior.nc"
    options = ("--longer", "cut", "--limit", 24, "--samples", 30, "--replicas", 1)
    assert ltm("posterior", run, "--input", corpus, "--out", path, *options)[0] == 0
    return path


@pytest.fixture
def page(posterior, run, ltm, tmp_path):
    code, _, err = ltm("report", posterior, "--run", run, "--out", tmp_path / "report.html")
    assert code == 0, err
    return tmp_path / "report.html"


def test_a_page_that_stands_alone(page, posterior):
    text = page.read_text()
    found = Posterior.load(posterior)
    bad = int((found.stats.pareto_k > 0.7).sum())
    assert (f"for {bad} of 24 sequences" if bad else "for all 24 sequences") in text
    assert all(words in text for words in ("Of ", "nats of KL per sequence", "cannot be told", "Without the thoughts"))
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert {*re.findall(r'href="#([^"]+)"', text)} <= {*re.findall(r'id="([^"]+)"', text)}
    assert text.count('class="card"') == 24
    assert len(text) < 10e6


def test_without_the_run_or_with_another(posterior, recipe, ltm, refused, tmp_path):
    code, _, err = ltm("report", posterior, "--out", tmp_path / "lost.html")  # names a run, which is not loaded unasked
    assert code == 0
    assert f"names the run '{Posterior.load(posterior).attrs['run']}'" in err
    assert (tmp_path / "lost.html").read_text().count("Needs the run") == 3
    quick = ("--trainer.max_steps", 1, "--trainer.limit_val_batches", 0, "--model.decoder.init_args.thoughts", 1)
    assert ltm("fit", "--config", recipe, "--run", tmp_path / "other", *quick)[0] == 0
    out = ("--out", tmp_path / "out.html")
    assert "(2, 1, 16)" in refused("report", posterior, *out, "--run", tmp_path / "other")
    assert "no posterior at" in refused("report", tmp_path / "no.nc", *out)
    assert "no calibration at" in refused("report", posterior, *out, "--calibration", tmp_path / "no.nc")
    assert "--force" in refused("report", posterior, "--out", tmp_path / "lost.html")


def shown(page, folder, width, height):
    """The browser's messages, who asked for addresses ("not an origin" is the browser itself), and a picture."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)} (Debian: apt-get install chromium)")
    picture, log = folder / f"{page.stem}.png", folder / f"{page.stem}.json"
    where = (f"--user-data-dir={folder / page.stem}", f"--window-size={width},{height}", f"--log-net-log={log}")
    command = [browser, *QUIET, *where, f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stderr, {*re.findall(r'"initiator":"([^"]*)"', log.read_text())} - {"not an origin"}, picture


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_a_real_browser_shows_it_without_errors_or_requests(page, tmp_path, width, height):
    probe = tmp_path / "probe.html"
    probe.write_text('<script>console.error("seen")</script><img src="http://example.invalid/x.png">')
    messages, asking, _ = shown(probe, tmp_path, width, height)
    assert "CONSOLE" in messages
    assert asking, "a page that asks for something must be seen to"
    messages, asking, picture = shown(page, tmp_path, width, height)
    assert "CONSOLE" not in messages
    assert not asking
    assert picture.stat().st_size > 20_000
