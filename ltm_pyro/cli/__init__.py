"""The command line `ltm`: one file per command, imported only when the command is called."""

from ltm_pyro.cli.main import main

__all__ = ["main"]
