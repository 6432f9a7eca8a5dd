"""The plate diagram of a model, as SVG: what is random, what depends on what, what every sequence has for itself."""

from html import escape
from typing import Any, NamedTuple

from pyro.infer.inspect import get_model_relations

from ltm_pyro.contracts import SEQUENCES, Batch
from ltm_pyro.inference.elbo import no_param_store
from ltm_pyro.inference.global_latents import GlobalLatent

WIDE, HIGH, GAP = 150, 44, 40  # an ellipse, and the room around it, in pixels


class Node(NamedTuple):
    """One site: where its ellipse's centre is, and how it is drawn."""

    name: str
    family: str
    x: int
    y: int
    observed: bool
    local: bool


def plate_diagram(model: Any, batch: Batch) -> str:
    """The SVG: an ellipse per site with its distribution, observed ones grey, a frame around the plate of sequences."""
    with no_param_store():
        relations = get_model_relations(model, (batch,))
    parents = {name: [p for p in found if p != name] for name, found in relations["sample_sample"].items()}
    shared = {part.name for part in model.modules() if isinstance(part, GlobalLatent)}
    for name in shared & parents.keys():
        parents[name] = []
    nodes = _placed(parents, relations, shared)
    edges = [(nodes[parent], nodes[name]) for name, found in parents.items() for parent in found]
    width = max(n.x for n in nodes.values()) + WIDE // 2 + 2 * GAP
    height = max(n.y for n in nodes.values()) + HIGH // 2 + 2 * GAP
    parts = [_frame([n for n in nodes.values() if n.local]), *map(_arrow, edges), *map(_ellipse, nodes.values())]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    return "\n".join([head, f'{tip}<path d="M0 0L8 4L0 8z"/></marker>', *parts, "</svg>"]) + "\n"


def _placed(parents: dict[str, list[str]], relations: Any, shared: set[str]) -> dict[str, Node]:
    """Every site one row below the lowest of its parents, side by side within a row."""
    rows: dict[str, int] = {}
    for name in parents:  # in the order they are sampled, parents first
        rows[name] = max((rows[p] + 1 for p in parents[name] if p in rows), default=0 if name in shared else 1)
    nodes: dict[str, Node] = {}
    top = min(rows.values())
    for name, row in rows.items():
        column = sum(rows[other] == row for other in nodes)
        x, y = GAP * 2 + WIDE // 2 + column * (WIDE + GAP), GAP + HIGH + (row - top) * (HIGH + 2 * GAP)
        observed = name in relations["observed"] and name not in shared
        family = relations["sample_dist"].get(name, "")
        nodes[name] = Node(name, "" if name in shared else family, x, y, observed, name not in shared)
    return nodes


def _ellipse(n: Node) -> str:
    fill = "#d0d0d0" if n.observed else "white"
    return (
        f'<ellipse cx="{n.x}" cy="{n.y}" rx="{WIDE // 2}" ry="{HIGH // 2}" fill="{fill}" stroke="black"/>'
        f'<text x="{n.x}" y="{n.y}" text-anchor="middle" font-size="14">{escape(n.name)}</text>'
        f'<text x="{n.x}" y="{n.y + 14}" text-anchor="middle" font-size="10" fill="#555">{escape(n.family)}</text>'
    )


def _arrow(edge: tuple[Node, Node]) -> str:
    above, below = edge
    return (
        f'<line x1="{above.x}" y1="{above.y + HIGH // 2}" x2="{below.x}" y2="{below.y - HIGH // 2}" stroke="black" '
        f'marker-end="url(#tip)"/>'
    )


def _frame(nodes: list[Node]) -> str:
    left, right = min(n.x for n in nodes) - WIDE // 2 - GAP // 2, max(n.x for n in nodes) + WIDE // 2 + GAP // 2
    top, bottom = min(n.y for n in nodes) - HIGH // 2 - GAP // 2, max(n.y for n in nodes) + HIGH // 2 + GAP
    return (
        f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" rx="8" fill="none" stroke="#888"/>'
        f'<text x="{right - 8}" y="{bottom - 8}" text-anchor="end" font-size="12" fill="#555">{SEQUENCES}</text>'
    )
