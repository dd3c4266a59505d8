"""Adapters on their way: a real learner's run with them, its versions as engines take them, and its replay."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from actors.joining import reach
from actors.replay import replay
from actors.run_folder import RunFolder
from actors.weights import Versions
from bus import policy, store
from learner.checkpoints import latest_checkpoint
from schemas.algorithm import Correction
from schemas.recipe import ColdStart, Data, Learner, Lora, Policy, Recipe, Tools

RUN = "adapters"
RECIPE = Recipe(
    policy=Policy(model="recipes.arithmetic:model", max_tokens=32),
    data=Data(rows="recipes.arithmetic:rows"),
    tools=Tools(tier="unsafe"),
    cold_start=ColdStart(
        demonstrations="recipes.arithmetic:demonstrations", steps=1, batch_size=2, threads=1
    ),
    learner=Learner(
        steps=3,
        groups_per_step=1,
        group_size=2,
        learning_rate=1e-2,
        checkpoint_every_steps=2,
        weights_kept=1,
        lora=Lora(rank=2),
        correction=Correction(token="none", sequence="none"),  # or none of the tokens would count
    ),
)
pytestmark = pytest.mark.usefixtures("runs")

GROUPS = {f"g{number}": ["42", "7"] for number in range(3)}


@pytest.fixture(scope="module")
def learned(learn) -> Path:
    """The folder for runs, with a finished one in it."""
    return learn(RUN, RECIPE, GROUPS)


async def test_versions_are_adapters_of_one_base() -> None:
    """What is published is small, version 0 is the cold start's result, and a late joiner gets the newest whole."""
    async with reach(RUN, "") as (bus, _):
        first, newest = await policy.version(bus, RUN, 0), await policy.current(bus, RUN)
        assert first is not None
        assert newest is not None
        assert newest.policy_version == 3
        assert first.base_sha256 == newest.base_sha256 != ""
        adapters = await policy.load_weights(bus, RUN, newest)
        base = await policy.load_base(bus, RUN, newest)
        assert len(adapters) < len(base) / 8
        assert await policy.version(bus, RUN, 1) is None  # deleted, and its base is not
        versions = Versions(bus, RUN)
        found, whole = await versions.newest(newest)
        version_0 = load(await versions.exactly(0))
    assert found == newest
    assert all(torch.equal(tensor, version_0[name]) for name, tensor in load(base).items())
    folder = RunFolder(RUN).path
    exported = load((folder / "checkpoint" / "model.safetensors").read_bytes())
    merged = load(whole)
    assert any(not torch.equal(tensor, version_0[name]) for name, tensor in merged.items())
    assert merged.keys() == exported.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
    assert (folder / "base" / "config.json").is_file()


async def test_the_run_is_done_again(capsys: pytest.CaptureFixture[str]) -> None:
    """From its first checkpoint and from its last: the same adapters, to the bit."""
    newest = latest_checkpoint(RunFolder(RUN).checkpoints)
    assert newest is not None
    assert (newest / "adapter.safetensors").is_file()
    assert await replay(RUN, "", "") == 0
    assert await replay(RUN, "", "3") == 0
    assert "3 versions" in capsys.readouterr().out


async def test_whole_versions_are_as_they_were_published(bus) -> None:
    """Without a base nothing is merged."""
    from schemas.messages import WeightsPointer

    sha256 = await store.put_object(bus, policy.BUCKET, "test", b"weights")
    pointer = WeightsPointer(policy_version=0, weights_sha256=sha256, assets_sha256="")
    await policy.publish_policy(bus, "test", pointer, b"weights")
    assert await Versions(bus, "test").newest(pointer) == (pointer, b"weights")
