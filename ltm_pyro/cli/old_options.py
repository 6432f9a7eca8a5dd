"""Options that have been renamed: an old one is refused by its new name."""

RENAMED = {"--protocols": "--estimators"}
