"""The report of a study: one self-contained HTML page, CSV and PNG."""

import csv
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from html import escape
from pathlib import Path
from typing import Any

from ltm_pyro.errors import UsageError
from ltm_pyro.studies.search import trials
from ltm_pyro.studies.search.charts import Picture, charts
from ltm_pyro.studies.search.definition import Row, load_definition
from ltm_pyro.studies.search.storage import open_existing
from ltm_pyro.studies.search.study import describe
from ltm_pyro.training.trust import is_own_file, list_file
from ltm_pyro.utils.files import atomic_write, new_folder, writing

PAIRED = ("above_best", "above_best_stderr")  # of a trial's row: the difference from the best, by document
MAIN = ("predictive_gain", "predictive_gain_stderr", "kl", "flops", "seconds")  # of every table
SEARCHED = ("trial", "added")  # the roles of the search itself
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>{title}</title>
<style>
* {{ box-sizing: border-box }}
body {{ font: 16px/1.55 system-ui, sans-serif; margin: 0; background: #f4f6f9; color: #1d2733 }}
main {{ max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }}
h1 {{ font-size: 1.7rem; line-height: 1.25; margin: .5rem 0 }} h2 {{ font-size: 1.15rem; margin: 0 0 .6rem }}
section, details {{ background: white; border: 1px solid #dde3ea; border-radius: 10px; padding: 1rem; margin: 1rem 0 }}
section.lead {{ border-left: 5px solid #0072b2; font-size: 1.05rem }} .lead p {{ margin: .3rem 0 }}
.soft {{ color: #5b6b7b; font-size: .9rem }} img, svg {{ max-width: 100%; height: auto }}
.side {{ display: flex; flex-wrap: wrap; gap: 1rem }} .side > * {{ flex: 0 1 26rem }} figure {{ margin: 0 }}
.trial {{ cursor: help }} figcaption {{ color: #5b6b7b; font-size: .9rem }}
.table {{ overflow-x: auto }} table {{ border-collapse: collapse; font-size: .82rem }}
td, th {{ padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #dde3ea }} th {{ color: #5b6b7b }}
td {{ white-space: nowrap }} th {{ vertical-align: bottom }}
td:first-child, th:first-child {{ text-align: left; position: sticky; left: 0; background: white }}
.wide td {{ text-align: left; white-space: normal; overflow-wrap: anywhere }} .wide th {{ text-align: left }}
tr.best td {{ background: #fdf3dc; font-weight: 600 }} summary {{ cursor: pointer }} pre {{ overflow-x: auto }}
@media (max-width: 40rem) {{ main {{ padding: .6rem }} section, details {{ padding: .8rem }} h1 {{ font-size: 1.35rem }}
.side > * {{ flex-basis: 100% }} }}
</style></head>
<body><main>
<h1>{title}</h1>
{body}
</main></body></html>
"""


def write_report(
    url: str, name: str | None, out: Path | None, force: bool, trust: bool = False, runs: Path | None = None
) -> dict[str, Any]:
    """Writes ``report.html``, ``trials.csv`` and a PNG for every picture; returns their names and the findings.

    The file that the storage names as the study's is executed for its own analysis if it is one that this user has run
    a study of, unchanged, or with ``trust``.
    """
    found = describe(url, name, runs)
    out = out or Path(f"{found['study']}-report")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise UsageError(f"{out} is there and not empty: choose another --out, or add --force.")
    with open_existing(url) as storage:
        study = trials.load_study(storage, found["study"])
        pictures = charts(study, found, trials.current_trials(study))
        source = str(study.user_attrs.get(trials.SOURCE, ""))
    own, sentences = _analysis(source, found["trials"], trust)
    pictures = {title: Picture(image) for title, image in own.items()} | pictures
    with writing(out), new_folder(out), ExitStack() as whole:
        for title, image in pictures.items():
            whole.enter_context(atomic_write(out / _file_name(title))).write_bytes(image.png)
        _write_csv(found["trials"], whole.enter_context(atomic_write(out / "trials.csv")))
        page = whole.enter_context(atomic_write(out / "report.html"))
        page.write_text(_page(found, pictures, sentences), "utf-8")
    return {"report": str(out / "report.html"), "files": sorted(p.name for p in out.iterdir()), "findings": sentences}


def _analysis(source: str, rows: list[Row], trust: bool) -> tuple[dict[str, bytes], list[str]]:
    """The charts and sentences that the study's own file adds."""
    if not source:
        return {}, []
    if source.endswith(".py") and not Path(source).is_file():
        return {}, [f"The study's file {source} is not on this machine: its own analysis is left out."]
    if source.endswith(".py") and trust:
        list_file(Path(source), "the study")
    elif source.endswith(".py") and not is_own_file(Path(source)):
        return {}, [f"The study's own analysis is left out, because it is code in {source}: read it, then add --trust."]
    analyse = load_definition(source).analyse
    return analyse(rows) if analyse and any(row["state"] == "complete" for row in rows) else ({}, [])


def _file_name(title: str) -> str:
    """A picture's file; its title may have the name of a figure in somebody else's storage."""
    return re.sub(r"[^\w()=+,.-]", "-", title).lstrip(".")[:100] + ".png"


def _write_csv(rows: list[Row], path: Path) -> None:
    """One line a trial; parameters are called ``params_NAME``, as in Optuna's data frames.

    Where a text begins as a formula does, an apostrophe stands before it, so that no spreadsheet computes it.
    """
    flat = [
        {k: v for k, v in row.items() if k not in ("parameters", "figures")}
        | {f"params_{name}": value for name, value in row["parameters"].items()}
        | row["figures"]
        for row in rows
    ]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for row in (columns, *([row.get(name, "") for name in columns] for row in flat)):
            writer.writerow(f"'{x}" if isinstance(x, str) and x.startswith(tuple("=+-@\t\r")) else x for x in row)


def _page(found: dict[str, Any], pictures: dict[str, Picture], sentences: list[str]) -> str:
    limits = "".join(f", {name} at most {most:g}" for name, most in found["at_most"].items())
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in (found["recommendation"], *sentences))
    complete = sorted((r for r in found["trials"] if r["state"] == "complete"), key=lambda r: _place(r, found))
    lost = [row for row in found["trials"] if row["state"] in ("fail", "pruned")]
    plan = json.dumps(_plan(found), indent=1, ensure_ascii=False)
    aim = [f"lowest {', '.join(found['minimise'])}"] if found["minimise"] else []
    aim += [f"highest {', '.join(found['maximise'])}"] if found["maximise"] else []
    sections = [
        f"<p>{escape(found['question'])}</p>",
        f'<p class="soft">Every trial trains for {escape(found["each"])}; proposed by {escape(found["sampler"])}; best '
        f"is the {escape(' and '.join(aim))}{escape(limits)}. <code>bound</code> is the negative ELBO in nats per "
        "held-out token, its noise drawn after q was final.</p>",
        f'<section class="lead">{said}</section>',
        *_pictures(pictures),
        _section("Trials, the best first", _table(complete, found)),
        _section("Failed and pruned", _troubles(lost)) if lost else "",
        f"<details><summary>All figures</summary>{_every_figure(complete)}</details>",
        f"<details><summary>Plan and base recipe</summary><pre>{escape(plan)}</pre>"
        f"<pre>{escape(found['recipe'])}</pre></details>",
    ]
    return PAGE.format(title=f"Study {escape(found['study'])}", body="\n".join(sections))


def _pictures(pictures: dict[str, Picture]) -> Iterator[str]:
    """A section for every picture, or for a group of them."""
    groups: dict[str, dict[str, Picture]] = {}
    for title, picture in pictures.items():
        groups.setdefault(picture.group or title, {})[title] = picture
    for group, those in groups.items():
        if len(those) == 1:
            ((title, picture),) = those.items()
            yield _section(title[0].upper() + title[1:], picture.html(title))
        else:
            shown = (
                f"<figure>{picture.html(title)}<figcaption>{escape(title)}</figcaption></figure>"
                for title, picture in those.items()
            )
            yield _section(group.capitalize(), f'<div class="side">{"".join(shown)}</div>')


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _place(row: Row, found: dict[str, Any]) -> tuple[bool, float]:
    """The search by its objective, then what was trained again."""
    name = [*found["minimise"], *found["maximise"]][0]
    return row["role"] not in SEARCHED, row["figures"][name] * (1 if found["minimise"] else -1)


def _plan(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k not in ("trials", "recipe", "recommendation")}


def _table(rows: list[Row], found: dict[str, Any]) -> str:
    """Parameters, objectives and the main figures; a parameter and a figure of one name are two columns."""
    objectives = [*found["minimise"], *found["maximise"]]
    searched = list(dict.fromkeys(n for row in rows if row["role"] in SEARCHED for n in row["parameters"]))
    names = [n for n in dict.fromkeys([*objectives, "bound_stderr", *PAIRED, *MAIN]) if _any(rows, n)]
    if found["front"]:
        names = ["front", *names]
    places = {number: index for index, number in enumerate(found["front"])}
    body = [
        [
            _label(row),
            *(_cell(row["parameters"].get(name)) for name in searched),
            *(_cell(_figures_of(row, places).get(name)) for name in names),
        ]
        for row in rows
    ]
    best = next((i for i, row in enumerate(rows) if row["role"] in SEARCHED and row["number"] == found["best"]), None)
    head = ["trial", *(name.rsplit(".", 1)[-1] for name in searched), *(name.replace("_", " ") for name in names)]
    return _html(head, body, best) if rows else "<p>None.</p>"


def _figures_of(row: Row, places: dict[int, int]) -> dict[str, Any]:
    place = places.get(row["number"]) if row["role"] in SEARCHED else None
    return row["figures"] | {name: row.get(name) for name in PAIRED} | {"front": place}


def _any(rows: list[Row], name: str) -> bool:
    return any((row["figures"] | row).get(name) is not None for row in rows)


def _every_figure(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    return _html(["trial", *names], [[_label(row), *(_cell(row["figures"].get(n)) for n in names)] for row in rows])


def _troubles(rows: list[Row]) -> str:
    body = [
        [_label(row), row["state"], str(row["reason"]), json.dumps(row["parameters"], ensure_ascii=False)]
        for row in rows
    ]
    return _html(["trial", "state", "reason", "parameters"], body, kind="table wide")


def _html(head: list[str], body: list[list[str]], best: int | None = None, kind: str = "table") -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    for index, cells in enumerate(body):
        mark = ' class="best"' if index == best else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f'<div class="{kind}"><table>{"".join(lines)}</table></div>'


def _label(row: Row) -> str:
    if row["role"] in SEARCHED:
        return str(row["number"])
    return f"{row['role']} of {row['of']}, seed {row['seed']}"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
