"""The plate diagram of a model, as SVG: its random variables, their dependencies, and the plate of sequences."""

from html import escape
from typing import Any, NamedTuple

from pyro import poutine
from pyro.infer.inspect import get_model_relations

from ltm_pyro.contracts import SEQUENCES, Batch
from ltm_pyro.inference.global_latents import GlobalLatent
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.utils.threads import one_at_a_time

WIDTH, HEIGHT, GAP = 150, 44, 40  # of an ellipse, and the space between ellipses, in pixels


class Node(NamedTuple):
    """One site: the centre (x, y) of its ellipse, and how it is drawn."""

    name: str
    family: str
    x: int
    y: int
    observed: bool
    local: bool


@one_at_a_time
def plate_diagram(model: Any, batch: Batch) -> str:
    """An SVG: an ellipse per site with its distribution, grey if observed; a frame is the plate of sequences."""
    with no_param_store(model):
        drawn = poutine.trace(model).get_trace(batch)  # Pyro's tracking of dependencies cannot draw from every family
        relations = get_model_relations(poutine.replay(model, trace=drawn), (batch,))
    parents = {name: [p for p in names if p != name] for name, names in relations["sample_sample"].items()}
    global_names = {part.name for part in model.modules() if isinstance(part, GlobalLatent)}
    for name in global_names & parents.keys():
        parents[name] = []
    nodes = _layout(parents, relations, global_names)
    edges = [(nodes[parent], nodes[name]) for name, names in parents.items() for parent in names]
    svg_width = max(n.x for n in nodes.values()) + WIDTH // 2 + 2 * GAP
    svg_height = max(n.y for n in nodes.values()) + HEIGHT // 2 + 2 * GAP
    parts = [_frame([n for n in nodes.values() if n.local]), *map(_arrow, edges), *map(_ellipse, nodes.values())]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {svg_width} {svg_height}" font-family="sans-serif">'
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    return "\n".join([head, f'{tip}<path d="M0 0L8 4L0 8z"/></marker>', *parts, "</svg>"]) + "\n"


def _layout(parents: dict[str, list[str]], relations: Any, global_names: set[str]) -> dict[str, Node]:
    """Puts every site one row below its lowest parent; the sites of a row are side by side."""
    rows: dict[str, int] = {}
    for name in parents:  # in the order of sampling, parents first
        rows[name] = max((rows[p] + 1 for p in parents[name] if p in rows), default=0 if name in global_names else 1)
    nodes: dict[str, Node] = {}
    top = min(rows.values())
    for name, row in rows.items():
        column = sum(rows[other] == row for other in nodes)
        x, y = GAP * 2 + WIDTH // 2 + column * (WIDTH + GAP), GAP + HEIGHT + (row - top) * (HEIGHT + 2 * GAP)
        observed = name in relations["observed"] and name not in global_names
        family = relations["sample_dist"].get(name, "")
        nodes[name] = Node(name, "" if name in global_names else family, x, y, observed, name not in global_names)
    return nodes


def _ellipse(n: Node) -> str:
    fill = "#d0d0d0" if n.observed else "white"
    return (
        f'<ellipse cx="{n.x}" cy="{n.y}" rx="{WIDTH // 2}" ry="{HEIGHT // 2}" fill="{fill}" stroke="black"/>'
        f'<text x="{n.x}" y="{n.y}" text-anchor="middle" font-size="14">{escape(n.name)}</text>'
        f'<text x="{n.x}" y="{n.y + 14}" text-anchor="middle" font-size="10" fill="#555">{escape(n.family)}</text>'
    )


def _arrow(edge: tuple[Node, Node]) -> str:
    above, below = edge
    return (
        f'<line x1="{above.x}" y1="{above.y + HEIGHT // 2}" x2="{below.x}" y2="{below.y - HEIGHT // 2}" stroke="black" '
        f'marker-end="url(#tip)"/>'
    )


def _frame(nodes: list[Node]) -> str:
    left, right = min(n.x for n in nodes) - WIDTH // 2 - GAP // 2, max(n.x for n in nodes) + WIDTH // 2 + GAP // 2
    top, bottom = min(n.y for n in nodes) - HEIGHT // 2 - GAP // 2, max(n.y for n in nodes) + HEIGHT // 2 + GAP
    return (
        f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" rx="8" fill="none" stroke="#888"/>'
        f'<text x="{right - 8}" y="{bottom - 8}" text-anchor="end" font-size="12" fill="#555">{SEQUENCES}</text>'
    )
