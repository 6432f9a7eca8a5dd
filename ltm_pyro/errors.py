"""The one error of a user's making; importable without torch."""


class UsageError(ValueError):
    """What a user can get wrong: one sentence with the value and the way out; the command line exits with 2."""
