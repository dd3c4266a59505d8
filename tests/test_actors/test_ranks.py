"""A learner of several processes, as far as none has to be started; tests/test_ranks.py starts them."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from actors.errors import RecipeError
from actors.preflight import check_names
from actors.ranks import Group, group_of
from actors.replaying import compare_metrics, compare_weights
from actors.supervisor import last_error
from learner.combination import contradictions
from schemas.events import Stepped
from schemas.recipe import Data, Learner, Lora, Policy, Recipe


def test_a_recipe_says_whether_there_is_a_group() -> None:
    """One process of torch by default; DeepSpeed for several, and for one that offloads."""
    assert group_of(Learner()) is None
    assert group_of(Learner(ranks=4, hostfile="hosts")) == Group(ranks=4, hostfile="hosts")
    assert group_of(Learner(offload="optimizer")) == Group(ranks=1)


@pytest.mark.parametrize(
    ("learner", "key"),
    [
        (Learner(zero_stage=3), "zero_stage"),
        (Learner(hostfile="hosts"), "hostfile"),
        (Learner(ranks=2, zero_stage=2, offload="weights"), "offload"),
        (Learner(ranks=2, zero_stage=3, lora=Lora(rank=2)), "zero_stage"),
    ],
)
def test_keys_that_do_not_fit_are_refused(learner: Learner, key: str) -> None:
    recipe = Recipe(policy=Policy(model="m"), learner=learner)
    assert key in [found.key for found in contradictions(recipe)]


def test_a_hostfile_must_be_there(tmp_path: Path) -> None:
    """The key is named before anything is started."""
    learner = Learner(ranks=2, hostfile=str(tmp_path / "hosts"))
    recipe = Recipe(policy=Policy(model="m"), learner=learner, data=Data())
    with pytest.raises(RecipeError, match=r"learner\.hostfile"):
        check_names(recipe, "")


def test_the_launcher_is_never_the_reason(tmp_path: Path) -> None:
    """Its lines come last; what a rank said before is why."""
    log = tmp_path / "learner.log"
    launcher = "[2026-11-22 18:34:43,571] [ERROR] [launch.py:259:sigkill_handler] exits with code 1"
    log.write_text(f"rank 1 of the learner: ValueError: no\n{launcher}\nhost2: {launcher}\n")
    assert last_error(log) == "rank 1 of the learner: ValueError: no"


def test_a_replay_of_several_ranks_has_a_tolerance() -> None:
    """One process adds up in another order: the versions are not compared, the metrics to a thousandth."""
    metrics = {"loss": 1.0, "computed_tokens": 100, "ranks": 2}
    recorded = Stepped(step=1, policy_version=1, weights_sha256="a", metrics=metrics)
    again = {"loss": 1.0 + 1e-6, "computed_tokens": 90}
    assert not [*compare_metrics(recorded, again), *compare_weights(recorded, "b")]
    assert [found.what for found in compare_metrics(recorded, {"loss": 1.1})] == ["loss"]
    alone = replace(recorded, metrics={"loss": 1.0, "computed_tokens": 100})
    found = [*compare_metrics(alone, again), *compare_weights(alone, "b")]
    assert [each.what for each in found] == ["loss", "computed_tokens", "weights_sha256"]
