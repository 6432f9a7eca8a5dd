"""Rich's console, for which what users name is text: a path may hold ``[bold]`` or ``:cat:``."""

from functools import partial

from rich.console import Console as RichConsole

Console = partial(RichConsole, markup=False, emoji=False)
