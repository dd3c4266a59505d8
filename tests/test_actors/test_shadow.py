"""Learners beside the main one: the same batches, another loss, and nobody else notices."""

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from actors.errors import UserError
from actors.export import export
from actors.joining import reach
from actors.replay import replay
from actors.run_folder import RunFolder
from actors.shadow import run_shadow
from actors.verify import audit
from bus import subjects
from learner.checkpoints import checkpoints, step_of
from schemas.algorithm import Correction
from schemas.events import Opened, Step, Stepped
from schemas.recipe import Data, Learner, Policy, Recipe, Tools

RUN = "main-run"
STEPS = 4
RECIPE = Recipe(
    policy=Policy(model="recipes.arithmetic:model", max_tokens=32),
    data=Data(rows="recipes.arithmetic:rows"),
    tools=Tools(tier="unsafe"),  # the reward `exact` runs no code
    learner=Learner(
        steps=STEPS,
        groups_per_step=1,
        group_size=2,
        learning_rate=1e-3,
        checkpoint_every_steps=2,
        correction=Correction(token="none", sequence="none"),  # or none of the tokens would count
    ),
)
GROUPS = {f"g{number}": ["42", "7"] for number in range(STEPS)}
SLOW = ("learner.learning_rate=1e-4",)


@pytest.fixture(scope="module")
def learned(learn) -> Path:
    """The folder for runs, with a finished one in it."""
    return learn(RUN, RECIPE, GROUPS)


async def events(learner: str, kind: type) -> list:
    """What a learner's log holds of a kind."""
    async with reach(RUN, "") as (_, log):
        stored = [each async for each in log.read(subjects.learner(RUN, learner))]
    return [each.event for each in stored if isinstance(each.event, kind)]


async def test_the_same_settings_give_the_same_steps(runs: Path) -> None:
    """Along the log of a run at rest: the same batches, losses and weights as the main learner's, to the bit."""
    assert await run_shadow("same", (), RUN, "") == 0
    mains, ours = await events("main", Stepped), await events("same", Stepped)
    assert [each.weights_sha256 for each in ours] == [each.weights_sha256 for each in mains]
    assert [each.batch_sha256 for each in ours] == [each.batch_sha256 for each in mains]
    for name in ("loss", "grad_norm", "entropy", "reward_mean", "staleness_max"):
        assert [each.metrics[name] for each in ours] == [each.metrics[name] for each in mains]


async def test_other_settings_train_the_same_batches(runs: Path) -> None:
    """Another learning rate: the batches that the main learner recorded, in its order, and other weights."""
    assert await run_shadow("slow", SLOW, RUN, "") == 0
    mains, ours = await events("main", Step), await events("slow", Step)
    assert [replace(each, replica="") for each in ours] == [
        replace(each, replica="") for each in mains
    ]
    stepped = await events("slow", Stepped)
    assert [each.metrics["learning_rate"] for each in stepped] == [1e-4] * STEPS
    assert stepped[0].metrics["loss"] == (await events("main", Stepped))[0].metrics["loss"]
    assert stepped[1].metrics["loss"] != (await events("main", Stepped))[1].metrics["loss"]
    lines = (runs / RUN / "shadow" / "slow" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


async def test_nobody_else_counts_it(runs: Path) -> None:
    """The accounts balance, and a replay is that of the main learner."""
    assert await run_shadow("slow", SLOW, RUN, "") == 0
    async with reach(RUN, "") as (bus, _):
        report = await audit(bus, RUN)
    assert report.balanced
    assert (report.steps, report.fates["trained"]) == (STEPS, 2 * STEPS)
    assert await replay(RUN, "", "") == 0


async def test_a_shadow_goes_on_from_its_checkpoint(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ended in the middle of a step, its steps after the checkpoint are trained again, and none is recorded twice."""
    whole = asyncio.create_task(run_shadow("slow", SLOW, RUN, ""))
    folder = runs / RUN / "shadow" / "slow"
    async with asyncio.timeout(60):
        while not (folder / "checkpoints" / "step-000002").is_dir():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    whole.cancel()
    await asyncio.wait({whole})
    assert await run_shadow("slow", (), RUN, "") == 0
    assert await run_shadow("again", SLOW, RUN, "") == 0
    ours, uninterrupted = await events("slow", Stepped), await events("again", Stepped)
    shas = [each.weights_sha256 for each in ours]
    assert shas == [each.weights_sha256 for each in uninterrupted]
    assert len(await events("slow", Step)) == STEPS
    assert [step_of(path) for path in checkpoints(folder / "checkpoints")] == [2, 4]
    assert await run_shadow("slow", (), RUN, "") == 0  # nothing is left to do
    assert [each.weights_sha256 for each in await events("slow", Stepped)] == shas


async def test_when_its_run_is_over_it_goes_on_along_the_log(at_home) -> None:
    """By itself, once the run's supervisor has died; to a log at rest without a version there will come none."""
    supervisor = await asyncio.create_subprocess_exec("sleep", "60")
    async with at_home() as (_, log):
        await log.append_run(Opened(recipe=RECIPE))
        folder = RunFolder("test")
        live = replace(folder.live(), supervisor_pid=supervisor.pid, supervisor_began_s=0.0)
        (folder.path / "endpoint.json").write_bytes(msgspec.json.encode(live))
        shadow = asyncio.create_task(run_shadow("slow", (), "test", ""))
        async for found in log.follow(subject=subjects.learner("test", "slow")):
            if found:
                break
    supervisor.kill()
    await supervisor.wait()
    async with asyncio.timeout(60):
        with pytest.raises(UserError, match="has published no version yet"):
            await shadow


async def test_other_settings_are_another_shadow(runs: Path) -> None:
    """One that has begun keeps its own."""
    assert await run_shadow("slow", SLOW, RUN, "") == 0
    with pytest.raises(
        UserError, match=r"began with --set learner\.learning_rate=1e-4: leave --set"
    ):
        await run_shadow("slow", ("learner.learning_rate=1e-2",), RUN, "")


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("main", (), "that is the run's own learner"),
        ("a.b", (), "--shadow 'a.b' may only have"),
        ("a", ("learner.group_size=4",), "a shadow trains the main learner's batches"),
        ("a", ("learner.filter.zero_variance=false",), "a shadow trains the main learner's"),
        ("a", ("sampling.temperature=2.0",), "it can change keys of"),
    ],
)
async def test_what_a_shadow_cannot_be(name: str, overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("[", r"\[")):
        await run_shadow(name, overrides, RUN, "")


# -- export ----------------------------------------------------------------------------------------


async def test_a_checkpoint_is_exported_with_its_card(runs: Path, tmp_path: Path) -> None:
    """The newest, a step's or the best: the weights that were recorded, loadable, and what made them."""
    from transformers import AutoModelForCausalLM

    await export(RUN, tmp_path / "newest", "", step=None, best=False)
    await export(RUN, tmp_path / "first", "", step=0, best=False)
    await export(RUN, tmp_path / "best", "", step=None, best=True)
    newest, first, best = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight
        for name in ("newest", "first", "best")
    )
    assert (newest != first).any()
    assert (newest == best).all()  # of equal rewards the later
    card = (tmp_path / "newest" / "README.md").read_text()
    assert f"# {RUN}, version {STEPS}" in card
    assert "learning_rate = 0.001" in card
    assert (tmp_path / "newest" / "reward.png").read_bytes().startswith(b"\x89PNG")


async def test_a_shadow_is_exported(runs: Path, tmp_path: Path) -> None:
    """By its name behind the run's, with its own settings on its card."""
    assert await run_shadow("slow", SLOW, RUN, "") == 0
    await export(f"{RUN}/slow", tmp_path / "out", "", step=None, best=True)
    assert "learning_rate = 0.0001" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("step", "says"), [(1, r"no checkpoint of step 1 .*there are \[0, 2, 4\]")]
)
async def test_what_cannot_be_exported(runs: Path, tmp_path: Path, step: int, says: str) -> None:
    """A step that was not kept, and a folder that holds something else."""
    with pytest.raises(UserError, match=says):
        await export(RUN, tmp_path / "out", "", step=step, best=False)
    with pytest.raises(UserError, match="is no model's folder"):
        await export(RUN, runs, "", step=None, best=False)
