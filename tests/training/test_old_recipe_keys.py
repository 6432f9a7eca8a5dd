"""Old keys are found wherever a recipe or an option can hold one, and not in the arguments of a user's own class."""

import pytest

from ltm_pyro.errors import UsageError
from ltm_pyro.training.old_recipe_keys import dotted_keys, option_keys, refuse_old_keys


@pytest.mark.parametrize(
    "words",
    [
        ["--model.inference.start.log_var", "-1"],
        ["--model.inference.start.log_var=-1"],
        ["--model.inference", '{"start": {"log_var": -1}}'],
        ["--model.evaluation=start: {log_var: -1}"],
        ["--model.decoder", "{init_args: {quiet_thoughts: true}}"],
    ],
)
def test_an_old_key_among_options_is_named(words):
    with pytest.raises(UsageError, match="is now `model"):
        refuse_old_keys(option_keys(words))


def test_a_users_own_class_may_have_arguments_of_any_name():
    own = {"model": {"decoder": {"class_path": "mine.MyDecoder", "init_args": {"quiet_thoughts": True}}}}
    refuse_old_keys(dotted_keys(own))
    own["model"]["decoder"]["class_path"] = "ltm_pyro.models.Decoder"
    with pytest.raises(UsageError, match="zero_init_cross_attention"):
        refuse_old_keys(dotted_keys(own))
