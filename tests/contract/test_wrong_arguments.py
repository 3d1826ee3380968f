"""Arguments of another type are refused in one line; types are not checked at run time here, as for a user."""

import pytest

import kvfold
from fakes import model_of
from kvfold.errors import PlanError


@pytest.mark.parametrize("plan", [5, None, ("snapkv", 0.5), {"select": "snapkv"}])
def test_a_plan_of_another_type_is_refused_in_one_line(plan):
    with pytest.raises(PlanError, match=f"a {type(plan).__name__} was given as a plan; .*; write it like") as error:
        kvfold.cache(model_of("llama"), plan)
    assert "\n" not in str(error.value)
