"""`python -m ltm_pyro.cli` is the same as `ltm`."""

from ltm_pyro.cli import main

main()
