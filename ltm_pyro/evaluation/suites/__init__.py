"""The paper's evaluation table, suite by suite, each for any run and any local copy of the data."""
