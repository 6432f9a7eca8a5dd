"""`ltm report`: a self-contained page; its verdicts agree with the file and its links have targets."""

import re

import numpy as np
import pytest

from ltm_pyro.analysis import Posterior
from tests.cli.browser import BROWSERS, Browser, find_browser


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
    assert (tmp_path / "lost.html").read_text().count("Needs the run") == 4
    quick = ("--trainer.max_steps", 1, "--trainer.limit_val_batches", 0, "--model.decoder.init_args.thoughts", 1)
    assert ltm("fit", "--config", recipe, "--run", tmp_path / "other", *quick)[0] == 0
    out = ("--out", tmp_path / "out.html")
    assert "(2, 1, 16)" in refused("report", posterior, *out, "--run", tmp_path / "other")
    assert "no posterior at" in refused("report", tmp_path / "no.nc", *out)
    assert "no calibration at" in refused("report", posterior, *out, "--calibration", tmp_path / "no.nc")
    assert "--force" in refused("report", posterior, "--out", tmp_path / "lost.html")


def test_other_seeds_and_statistics_of_ones_own(posterior, run, corpus, ltm, refused, tmp_path):
    other, own, page = tmp_path / "other.nc", tmp_path / "own_statistics.py", tmp_path / "against.html"
    options = ("--longer", "cut", "--limit", 24, "--samples", 30, "--seed", 1)
    assert ltm("posterior", run, "--input", corpus, "--out", other, *options)[0] == 0
    own.write_text("def words(text):\n    return len(text.split())\n\n\ndef _helper():\n    pass\n")
    asked = ("report", posterior, "--run", run, "--against", other, "--statistics", own, "--out", page)
    assert "is code" in refused(*asked)
    assert not page.exists()
    code, _, err = ltm(*asked, "--trust")
    assert code == 0, err
    assert "SHA-256" in err
    text = page.read_text()
    assert "<td>words</td>" in text
    assert "_helper" not in text
    assert "Rotated onto this model&#39;s thoughts, those of &#39;other&#39;" in text
    assert "nats per document ahead of" in text
    (tmp_path / "no_function.py").write_text("x = 1\n")
    code, _, err = ltm(*asked[:-3], tmp_path / "no_function.py", *asked[-2:], "--trust", "--force")
    assert code == 2
    assert "defines no function" in err


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["1280", "390"])
def browser(request, tmp_path):
    if find_browser() is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)} (Debian: apt-get install chromium)")
    with Browser(tmp_path / "profile", *request.param) as found:
        yield found


SHOWN = "[...document.querySelectorAll('.card')].filter(x => !x.hidden).map(x => Number(x.dataset.index))"


@pytest.mark.slow
def test_a_real_browser_shows_it_without_errors_or_requests(page, browser, tmp_path):
    probe = tmp_path / "probe.html"
    probe.write_text('<script>console.error("seen")</script><img src="http://example.invalid/x.png">')
    browser.go(probe.as_uri())
    assert browser.complaints
    assert browser.requests, "a page that asks for something must be seen to"
    browser.go(page.as_uri())
    assert not browser.complaints
    assert not browser.requests
    picture = tmp_path / "page.png"
    browser.picture(picture)
    assert picture.stat().st_size > 20_000
    assert browser.value("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the page"
    sizes = browser.value("[...document.querySelectorAll('.pictures img')].map(x => x.getBoundingClientRect().width)")
    assert min(sizes) > 280, "pictures are large enough to be read"


@pytest.mark.slow
def test_search_sort_and_hover(page, posterior, browser):
    found = Posterior.load(posterior)
    browser.go(page.as_uri())
    word = found.texts[3].split()[0]
    browser.click("#search")
    browser.type(word.upper())
    hits = [n for n, text in enumerate(found.texts) if word in text]
    assert 0 < len(hits) < found.size
    assert set(hits) <= set(browser.value(SHOWN)) < set(range(found.size))
    assert browser.value("document.getElementById('count').textContent").endswith(f"of {found.size}")
    browser.value(
        "document.getElementById('search').value = '';"
        "document.getElementById('search').dispatchEvent(new Event('input'))"
    )
    for key, figure, ascending in (("kl", "kl", False), ("elbo", "elbo", True), ("pareto_k", "pareto_k", False)):
        browser.value(
            f"document.getElementById('sort').value = '{key}';"
            "document.getElementById('sort').dispatchEvent(new Event('change'))"
        )
        values = found.stats[figure].values[browser.value(SHOWN)]
        assert (np.diff(values) >= 0).all() if ascending else (np.diff(values) <= 0).all()
    browser.hover(".map a:nth-of-type(5)")
    assert found.texts[4][:40] in browser.value("document.getElementById('hint').textContent")
    browser.click(".map a:nth-of-type(5)")
    assert browser.value("location.hash") == "#x4"
