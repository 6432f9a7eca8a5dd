"""The exception for user errors; importable without torch."""


class UsageError(ValueError):
    """A user error: the message is one sentence with the bad value and a way out; the command line exits with 2."""
