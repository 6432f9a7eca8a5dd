"""A study as a page to read and files to work with: HTML that needs nothing else, CSV, PNG."""

import csv
import json
from html import escape
from pathlib import Path
from typing import Any

from ltm_pyro.contracts import UsageError
from ltm_pyro.studies.search import trials
from ltm_pyro.studies.search.charts import charts, embedded
from ltm_pyro.studies.search.definition import Row, load_definition
from ltm_pyro.studies.search.study import describe

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-size: 14px }} td, th {{ padding: .2rem .6rem; text-align: right }}
tr:nth-child(even) {{ background: #f3f3f3 }} td:last-child {{ text-align: left }} img {{ max-width: 100% }}
.lead {{ background: #eef6ee; padding: .8rem 1rem }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write_report(url: str, name: str | None, out: Path | None, force: bool) -> dict[str, Any]:
    """Writes ``report.html``, ``trials.csv`` and a PNG for every picture; returns their names and the findings."""
    found = describe(url, name)
    out = out or Path(f"{found['study']}-report")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise UsageError(f"{out} is there and not empty: choose another --out, or add --force.")
    with trials.existing(url) as storage:
        study = trials.load_study(storage, found["study"])
        pictures = charts(study, tuple(found["minimise"]))
    own, sentences = _own(study.user_attrs[trials.SOURCE], found["trials"])
    pictures = own | pictures
    out.mkdir(parents=True, exist_ok=True)
    for title, image in pictures.items():
        (out / f"{title.replace(' ', '-')}.png").write_bytes(image)
    _write_csv(found["trials"], out / "trials.csv")
    (out / "report.html").write_text(_page(found, pictures, sentences), "utf-8")
    return {"report": str(out / "report.html"), "files": sorted(p.name for p in out.iterdir()), "findings": sentences}


def _own(source: str, rows: list[Row]) -> tuple[dict[str, bytes], list[str]]:
    """What the study's own file adds."""
    if source.endswith(".py") and not Path(source).is_file():
        return {}, [f"The study's file {source} is not on this machine: what it would add is left out."]
    analyse = load_definition(source).analyse
    return analyse(rows) if analyse and any(row["state"] == "complete" for row in rows) else ({}, [])


def _write_csv(rows: list[Row], path: Path) -> None:
    flat = [{**row, **row["parameters"], **row["figures"]} for row in rows]
    columns = [c for c in dict.fromkeys(key for row in flat for key in row) if c not in ("parameters", "figures")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(flat)


def _page(found: dict[str, Any], pictures: dict[str, bytes], sentences: list[str]) -> str:
    limits = "".join(f", {name} at most {most:g}" for name, most in found["at_most"].items())
    sections = [
        f"<p>{escape(found['question'])}</p>",
        f'<p class="lead">{escape(found["recommendation"])}</p>',
        *(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        f"<p>Every trial trains for {escape(found['budget'])}; lowest is best: {', '.join(found['minimise'])}{limits}. "
        "<code>bound</code> is the negative ELBO in nats per held-out token, its noise drawn after q was final.</p>",
        *(f"<h2>{escape(title.capitalize())}</h2>{embedded(image, title)}" for title, image in pictures.items()),
        "<h2>Trials</h2>",
        _table([row for row in found["trials"] if row["state"] == "complete"]),
        "<h2>Failed and pruned</h2>",
        _troubles([row for row in found["trials"] if row["state"] in ("fail", "pruned")]),
        f"<details><summary>Plan</summary><pre>{escape(json.dumps(_plan(found), indent=1))}</pre>"
        f"<pre>{escape(found['recipe'])}</pre></details>",
    ]
    return PAGE.format(title=f"Study {escape(found['study'])}", body="\n".join(sections))


def _plan(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k not in ("trials", "recipe", "recommendation")}


def _table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in (*row["parameters"], *row["figures"])))
    body = [[_label(row), *(_cell((row["parameters"] | row["figures"]).get(name)) for name in names)] for row in rows]
    return _html(["trial", *names], body) if rows else "<p>None.</p>"


def _troubles(rows: list[Row]) -> str:
    body = [[_label(row), json.dumps(row["parameters"]), row["state"], row["reason"]] for row in rows]
    return _html(["trial", "parameters", "state", "reason"], body) if rows else "<p>None.</p>"


def _html(head: list[str], body: list[list[str]]) -> str:
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in cells) for cells in body]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _label(row: Row) -> str:
    return str(row["number"]) if row["role"] == "trial" else f"{row['role']} (seed {row['seed']})"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
