"""Rich's console without markup and emoji codes, because a user's path may contain ``[bold]`` or ``:cat:``."""

from functools import partial

from rich.console import Console as RichConsole

Console = partial(RichConsole, markup=False, emoji=False)
