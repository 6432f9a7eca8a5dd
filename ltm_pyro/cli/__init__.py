"""The command line `ltm`: one small file per command, imported only when it is called."""

from ltm_pyro.cli.main import main

__all__ = ["main"]
