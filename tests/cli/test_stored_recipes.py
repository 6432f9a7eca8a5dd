"""A recipe that lies with somebody else's run is known as one, however the command line names it."""

from tests.cli.test_hostile import (
    TRAINER,
    assert_harmless,
    audited,
    called,
    exported,  # noqa: F401 - a fixture
    part,
    with_recipe,
)


def test_a_stored_recipe_is_known_as_one_however_it_is_named(exported, tmp_path):  # noqa: F811
    """By the user's home, an abbreviated option, or an option of its own; and what names other files is refused."""
    home, cases = exported.parent, []
    hostile = with_recipe(exported, "hostile", part("prior", called("evil.py:Prior"))) / "config.yaml"
    words = [
        [f"--config=~/hostile/{hostile.name}"],
        ["--conf", str(hostile)],
        ["--config", f"~/hostile/{hostile.name}"],
    ]
    names = ("the trainer in a file", "another recipe", "YAML as run", "YAML as cache")
    words += [
        ["--config", str(with_recipe(exported, f"stored{i}", TRAINER[x]) / "config.yaml")] for i, x in enumerate(names)
    ]
    for given in words:
        cases.append({"name": str(given), "argv": ["fit", *given], "home": str(home), "cwd": str(hostile.parent)})
    assert_harmless(audited(cases, tmp_path), home)
