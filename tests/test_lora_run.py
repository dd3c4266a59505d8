"""A whole run of adapters, a shadow beside it, and both learners killed once. Real processes, a real engine."""

import os
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from actors import run_folder
from actors.joining import reach
from actors.process import opened
from actors.reopening import reopened
from actors.weights import Versions
from bus import policy, store, subjects
from learner.checkpoints import latest_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RECIPE = Path(__file__).parent / "stalling" / "recipe.toml"
RUN, SHADOW = "adapters", "slow"
STEPS = 20
ARGUMENTS = [
    "train", str(RECIPE), "--run", RUN,
    "--set", "generator.engine=transformers", "--set", "asynchrony.max_staleness=0",
    "--set", "cold_start.demonstrations=recipes.arithmetic:demonstrations",
    "--set", "cold_start.steps=20", "--set", "cold_start.batch_size=8",
    "--set", "learner.lora.rank=4", "--set", "learner.learning_rate=1e-2",
    "--set", f"learner.steps={STEPS}", "--set", "learner.checkpoint_every_steps=5",
    "--set", "scorer.reward=stalling:in_its_time",
    "--set", "deadlines.hang_s=120", "--set", "deadlines.gen_s=120", "--set", "replicas.recorder=0",
]  # fmt: skip
BESIDE = ["run", "learner", "--run", RUN, "--shadow", SHADOW]


class Finished(NamedTuple):
    """What was printed."""

    run: str
    shadow: str
    """By the shadow that went on."""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, machine_at):
    return machine_at(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def finished(machine) -> Finished:
    """A shadow begins with the run; after two steps it is killed, and the learner too; then both go on to the end."""
    run = machine.start(*ARGUMENTS)
    machine.until((machine.runs / RUN / "endpoint.json").exists, "a run that can be joined")
    machine.say("pause", RUN)
    shadow = machine.start(*BESIDE, "--set", "learner.learning_rate=1e-3")
    _until_it_says(shadow, f"shadow {SHADOW} of run {RUN}")
    machine.say("resume", RUN)
    machine.until(lambda: len(machine.rows(RUN)) >= 2, "two steps")
    machine.say("pause", RUN)  # the run must not be over before the shadow is there
    machine.until(lambda: len(machine.rows(f"{RUN}/shadow/{SHADOW}")) >= 2, "two steps of it")
    assert len(machine.rows(RUN)) < STEPS, "the run is live"
    (learner,) = machine.processes(f"actors learner {RUN}")
    os.kill(learner.pid, signal.SIGKILL)
    os.kill(shadow.pid, signal.SIGKILL)
    shadow.communicate()
    again = machine.start(*BESIDE)
    _until_it_says(again, f"shadow {SHADOW} of run {RUN}")
    machine.say("resume", RUN)
    told, _ = again.communicate(timeout=400)
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 0, output
    assert again.returncode == 0, told
    assert not machine.processes()
    return Finished(output, told)


def _until_it_says(process: "subprocess.Popen[str]", what: str) -> None:
    said = []
    while what not in (line := process.stdout.readline()):
        said.append(line)
        assert line, "".join(said)


def test_the_engine_holds_what_the_learner_holds(machine, finished: Finished) -> None:
    """Each version's adapters are loaded before it samples: its log-probabilities are those of the learner."""
    rows = machine.rows(RUN)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["staleness_max"] == 0
        assert row["kl_behaviour_max"] < 1e-3
        assert row["masked_token_fraction"] == 0
    assert max(row["grad_norm"] for row in rows) > 1e-3


def test_a_killed_learner_goes_on(machine, finished: Finished) -> None:
    """From its checkpoint, with the same adapters; the accounts balance, and a replay gives the same again."""
    assert finished.run.count('"why": "killed by SIGKILL"') == 1
    (log,) = (machine.runs / RUN / "logs").glob("learner-*.log")
    assert "gave other weights" not in log.read_text()
    assert "balanced: each has one fate" in machine.say("verify", "--run", RUN)
    assert f"equal: {STEPS} steps" in machine.say("replay", "--run", RUN)


def test_a_shadow_beside_a_live_run(machine, finished: Finished, tmp_path: Path) -> None:
    """It trains the run's batches, each once, with its own learning rate, and is compared with the main learner."""
    assert f"done after step {STEPS}" in finished.shadow
    main, ours = machine.rows(RUN), machine.rows(f"{RUN}/shadow/{SHADOW}")
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert {row["learning_rate"] for row in ours} == {1e-3}
    for name in ("reward_mean", "train_tokens", "trained_trajectories"):
        assert [row[name] for row in ours] == [row[name] for row in main]
    picture = tmp_path / "compared.png"
    said = machine.say("compare", RUN, f"{RUN}/{SHADOW}", "--to", str(picture))
    assert f"{RUN}/{SHADOW} first differs from {RUN} at step 2" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


async def test_only_the_main_learner_publishes(
    machine, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest version is its last step's, on the base that all are of; the shadow's is in nobody's store."""
    monkeypatch.setattr(run_folder, "RUNS", machine.runs)
    async with reach(RUN, "") as (bus, log):
        newest = await policy.current(bus, RUN)
        shas = [
            [
                each.event.weights_sha256
                async for each in log.read(subjects.learner(RUN, name, "stepped"))
            ]
            for name in ("main", SHADOW)
        ]
        stored = {each.sha256 for each in await store.objects(bus, policy.BUCKET, RUN)}
    assert newest.weights_sha256 == shas[0][-1]
    assert newest.base_sha256 in stored
    assert not stored & set(shas[1])


async def test_an_export_is_the_policy(
    machine, finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Adapters merged by the learner, merged by an engine, and beside their base give the same logits."""
    machine.say("export", RUN, str(tmp_path / "merged"))
    monkeypatch.setattr(run_folder, "RUNS", machine.runs)
    ids = torch.arange(1, 25)[None]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    async with reach(RUN, "") as (bus, log):
        checkpoint = latest_checkpoint(machine.runs / RUN / "checkpoints")
        async with reopened(bus, RUN, (await opened(log)).recipe, checkpoint) as learned:
            with torch.no_grad():
                expected = learned.model(ids).logits
                with learned.adapters.absent():
                    base = learned.model(ids).logits
        _, weights = await Versions(bus, RUN).newest(await policy.current(bus, RUN))
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=1e-4)
        exported.load_state_dict(load(weights), strict=False)
        torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (base - expected).abs().max() > 0.1
