"""The suites of the paper's evaluation table, for any run and any local copy of the data."""
