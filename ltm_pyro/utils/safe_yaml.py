"""YAML that may be somebody else's, read in time and memory that are bounded whatever it says."""

from typing import Any

import yaml

LARGEST = 2**16  # characters, every alias written out; a recipe with all its defaults has some 10,000
DEEPEST = 50  # levels of lists and mappings, one inside the other; a recipe has some ten


class _Loader(yaml.SafeLoader):
    """A `yaml.SafeLoader` that measures each node as it is composed, before anything is made of it.

    An alias shares its node, so that a few lines can stand for more lists than any memory holds: they would be written
    out by a merge key (``<<``), and by everything that goes through the content.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}  # characters and levels of the finished nodes

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; a `yaml.YAMLError` if it is too large."""
        self._level += 1
        _check(0, self._level)
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._level -= 1
        if is_alias and node not in self._sizes:
            raise yaml.YAMLError("an alias is inside of what it stands for")
        if node is not None and not is_alias:
            self._sizes[node] = self._measure(node)
        return node

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1 + len(node.value), 1
        parts = [x for pair in node.value for x in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes = [self._sizes[part] for part in parts]
        size, levels = 1 + sum(size for size, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)
        _check(size, levels)
        return size, levels


def _check(size: int, levels: int) -> None:
    if size > LARGEST:
        raise yaml.YAMLError(f"YAML of more than {LARGEST:,} characters, its aliases written out")
    if levels > DEEPEST:
        raise yaml.YAMLError(f"lists and mappings nested more than {DEEPEST} levels deep")


def load_yaml(text: str) -> Any:
    """The content of one YAML document; a `yaml.YAMLError` if it is wrong, larger than `LARGEST`, or too deep."""
    _check(len(text), 0)
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
