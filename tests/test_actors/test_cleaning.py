"""Which versions of the weights stay, as the log goes on."""

from msgspec.structs import replace

from actors.cleaning import OldWeights
from bus import policy
from bus.connection import Bus
from schemas.events import Admitted, Cause, Evaluated, Failed
from schemas.messages import WeightsPointer
from schemas.recipe import Evaluation, Learner, Policy, Recipe
from schemas.task import PublicPart

RECIPE = Recipe(
    policy=Policy(model="m"),
    learner=Learner(steps=100, weights_kept=3),
    evaluation=Evaluation(rows="x:y", every_steps=10),
)
CAUSE = Cause(boundary="engine", code="crashed")


def evaluation(version: int, row: int = 0, attempt: int = 0) -> Admitted:
    return Admitted(
        trajectory=f"e{version}x{row}-0-{attempt}",
        task="t",
        public=PublicPart(messages=[]),
        private_key="",
        purpose="eval",
        pinned_policy_version=version,
    )


def old_weights(bus: Bus, recipe: Recipe = RECIPE) -> OldWeights:
    return OldWeights(bus, "test", recipe)


async def test_the_first_and_the_newest_stay(bus: Bus) -> None:
    without = replace(RECIPE, evaluation=Evaluation())
    assert old_weights(bus, without).keep(1) >= {0, 1}
    assert old_weights(bus, without).keep(42) == {0, 40, 41, 42}
    one = replace(without, learner=Learner(weights_kept=1))
    assert old_weights(bus, one).keep(42) == {0, 41, 42}, "41 is the newest until 42 is there"


async def test_what_is_to_be_evaluated_stays_until_a_later_one_is(bus: Bus) -> None:
    """The dispatcher may see a version long after it was made; it begins with older ones first."""
    cleaning = old_weights(bus)
    assert cleaning.keep(25) == {0, 10, 20, 23, 24, 25}
    cleaning.observe(evaluation(0), 1)
    cleaning.observe(evaluation(10), 1)
    assert cleaning.keep(25) == {0, 10, 20, 23, 24, 25}
    cleaning.observe(evaluation(20), 1)
    cleaning.observe(Evaluated(trajectory="e10x0-0-0", reward=1.0), 1)
    assert cleaning.keep(25) == {0, 20, 23, 24, 25}


async def test_what_an_evaluation_in_flight_is_pinned_to_stays(bus: Bus) -> None:
    """Also between a first attempt that failed and its second."""
    cleaning = old_weights(bus)
    for version in (10, 20, 30):
        cleaning.observe(evaluation(version), 1)
    assert 10 in cleaning.keep(50)
    cleaning.observe(Failed(trajectory="e10x0-0-0", cause=CAUSE), 1)
    assert 10 in cleaning.keep(50)
    cleaning.observe(evaluation(10, attempt=1), 1)
    cleaning.observe(Failed(trajectory="e10x0-0-1", cause=CAUSE), 1)
    cleaning.observe(Evaluated(trajectory="e20x0-0-0", reward=0.0), 1)
    assert cleaning.keep(35) == {0, 30, 33, 34, 35}


async def test_a_run_keeps_its_store_small(bus: Bus) -> None:
    """However many versions are published, the bucket holds those that stay; the newest can be loaded."""
    cleaning = old_weights(bus, replace(RECIPE, evaluation=Evaluation()))
    assets = await policy.publish_assets(bus, "test", {"config.json": b"{}"})
    for version in range(12):
        weights = b"%d" % version * 1000
        name = policy.store.hashlib.sha256(weights).hexdigest()
        pointer = WeightsPointer(policy_version=version, weights_sha256=name, assets_sha256=assets)
        await cleaning.delete(version)
        await policy.publish_policy(bus, "test", pointer, weights)
        assert await policy.load_weights(bus, "test", pointer) == weights
        assert len(await policy.store.objects(bus, policy.BUCKET, "test")) <= 1 + 4
    assert await policy.version(bus, "test", 5) is None
    assert await policy.version(bus, "test", 0) is not None
