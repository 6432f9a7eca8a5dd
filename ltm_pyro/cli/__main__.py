"""`python -m ltm_pyro.cli` is `ltm`."""

from ltm_pyro.cli import main

main()
