"""What is printed for people: text without markup, because a path may contain ``[bold]``.

On a terminal no text that is printed can give it commands: control characters are shown as symbols.
"""

import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

WIDTH_OF_FILES = 160
_SYMBOLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
_SYMBOLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # as ESC and a letter, in one character


def printable(text: str) -> str:
    """A text whose control characters, line ends and tabs apart, are symbols such as ␛, which command nothing."""
    return text.translate(_SYMBOLS)


class Console(RichConsole):
    """Rich's console without markup; the texts on it are `printable`, its own colours stay."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)
        if not self.is_terminal and "COLUMNS" not in os.environ:  # a file has room: no figure in a table is cut
            self.width = WIDTH_OF_FILES

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of a renderable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class PrintableStream:
    """A terminal's stream that writes texts `printable`; Rich's consoles write to the stream itself."""

    def __init__(self, stream: Any) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Writes to the terminal."""
        return int(self.rich_proxied_file.write(printable(text)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def guard_terminal() -> None:
    """From here on what this process prints is `printable`, where it goes to a terminal."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream.isatty() and not isinstance(stream, PrintableStream):
            setattr(sys, name, PrintableStream(stream))
