"""Whole runs of real processes: trained, joined, killed, resumed, accounted for."""

import json
import os
import signal
from collections import Counter
from typing import Any

import psutil
import pytest

from actors.recipe import load_recipe
from schemas.events import OWNERS

pytestmark = pytest.mark.slow

METRICS = {
    "step", "policy_version", "reward_mean", "reward_std", "trajectories", "tool_call_rate", "loss",
    "grad_norm", "entropy", "kl_behaviour", "is_ratio_mean", "masked_token_fraction",
    "staleness_mean", "staleness_max", "zero_variance_fraction", "truncated_fraction",
    "failed_by_cause", "gen_tokens_per_s", "train_tokens_per_s", "step_s",
}  # fmt: skip
STEPS = 40
SMALL = [
    "recipes/arithmetic.toml", "--run", "whole",
    "--set", "cold_start.steps=80", "--set", f"learner.steps={STEPS}",
    "--set", "learner.groups_per_step=8", "--set", "learner.checkpoint_every_steps=3",
    "--set", "evaluation.limit=8", "--set", "evaluation.every_steps=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, machine_at):
    return machine_at(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def finished(machine) -> list[dict[str, Any]]:
    """A run that two generators joined, whose terminal was killed, and that was resumed to its end."""
    first = machine.start("train", *SMALL)
    machine.until(
        lambda: len(machine.rows("whole")) >= 2 or first.poll() is not None, "two steps", 300
    )
    machine.say("pause", "whole")  # the run must not be over before they are there
    joined = machine.start("run", "generator", "--replicas", "2", "--run", "whole")
    machine.until(lambda: _generators(machine) == 3, "three generators with weights")
    machine.say("resume", "whole")
    before = len(machine.rows("whole"))
    machine.until(lambda: len(machine.rows("whole")) >= before + 4, "steps with them")
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    machine.until(lambda: not machine.processes(), "no process left after the terminal was killed")
    joined.communicate(timeout=60)
    assert joined.returncode == 0
    assert not _listens(machine), "no port left"
    assert "balanced: each has one fate" in machine.say("verify", "--run", "whole")

    machine.say("train", *SMALL, timeout_s=600)
    assert not machine.processes()
    events = machine.say("tail", "--run", "whole", "--from-start", "--json")
    return [json.loads(line) for line in events.splitlines()]


def _samplers(events: list[dict[str, Any]]) -> set[str]:
    return {event["replica"] for event in events if event["kind"] == "turn"}


def _generators(machine) -> int:
    """How many hold weights: ROLE REPLICA PID UP s VERSION …"""
    lines = (line.split() for line in machine.say("ps", "--run", "whole").splitlines())
    return sum(words[0] == "generator" and words[5] != "-" for words in lines)


def _listens(machine) -> bool:
    config = (machine.runs / "whole" / "nats" / "nats.conf").read_text()
    address = config.split('listen: "')[1].split('"')[0]
    port = int(address.rsplit(":", 1)[1])
    return any(c.laddr.port == port and c.status == "LISTEN" for c in psutil.net_connections())


def test_every_trajectory_has_one_fate(finished: list[dict[str, Any]]) -> None:
    """admitted = trained + filtered + evaluated + expired + failed + dropped, each id once."""
    fates: Counter[str] = Counter()
    for event in finished:
        if event["kind"] in ("evaluated", "expired", "failed", "dropped"):
            fates[event["trajectory"]] += 1
        elif event["kind"] in ("step", "filtered"):
            fates.update(event["trajectories"])
    admitted = [event["trajectory"] for event in finished if event["kind"] == "admitted"]
    assert len(set(admitted)) == len(admitted)
    assert fates == Counter(admitted)


def test_no_step_is_lost_or_made_twice(finished: list[dict[str, Any]]) -> None:
    """One `step` and one `stepped` each, in order, across the kill."""
    steps = [event["step"] for event in finished if event["kind"] == "step"]
    stepped = [event["step"] for event in finished if event["kind"] == "stepped"]
    assert steps == stepped == list(range(1, STEPS + 1))


def test_no_prompt_is_skipped_or_repeated(finished: list[dict[str, Any]]) -> None:
    """Groups g0, g1, … have the rows in order; a repeat is of an expired group."""
    groups = {e["trajectory"].split("-")[0]: e["task"] for e in finished if e["kind"] == "admitted"}
    fresh = [name for name in groups if name[0] == "g" and "r" not in name]
    assert sorted(int(name[1:]) for name in fresh) == list(range(len(fresh)))
    tasks = [groups[name] for name in fresh]
    assert len(set(tasks)) == len(tasks)


def test_steps_trained_again_gave_the_same_weights(machine, finished: list[dict[str, Any]]) -> None:
    """After the kill the checkpoint and the recorded batches lead to the recorded weights, to the bit."""
    logs = "".join(path.read_text() for path in (machine.runs / "whole" / "logs").glob("learner*"))
    assert "gave other weights" not in logs


def test_joined_replicas_took_load(finished: list[dict[str, Any]]) -> None:
    """At least three generators sampled turns before the kill, and another after it."""
    assert len(_samplers(finished)) >= 4


def test_each_role_appended_only_its_own_kinds(finished: list[dict[str, Any]]) -> None:
    owners = {kind.__struct_config__.tag: role for kind, role in OWNERS.items()}
    for event in finished:
        assert event["replica"].split("-")[0] == owners[event["kind"]], event


def test_token_facts_agree(finished: list[dict[str, Any]]) -> None:
    """Sampled tokens have a version and a log-probability; given ones have neither; staleness is bounded."""
    for event in finished:
        if event["kind"] == "turn":
            tokens = event["tokens"]
            for mask, logprob, version in zip(
                tokens["mask"], tokens["logprobs"], tokens["versions"], strict=True
            ):
                assert (version >= 0) == bool(mask)
                assert logprob <= 0 if mask else logprob == 0
    stepped = [event["metrics"] for event in finished if event["kind"] == "stepped"]
    assert max(row["staleness_max"] for row in stepped) <= 2


def test_the_learner_agrees_with_the_engine(finished: list[dict[str, Any]]) -> None:
    """Where the version that samples is the one that is trained, log-probabilities are the same."""
    first = next(event["metrics"] for event in finished if event["kind"] == "stepped")
    assert first["staleness_max"] == 0
    assert abs(first["kl_behaviour"]) < 1e-6
    assert abs(first["is_ratio_mean"] - 1) < 1e-4


def test_the_accounts_balance(machine, finished: list[dict[str, Any]]) -> None:
    """`actors verify`, from the log of a run at rest: as many as were admitted have a fate, and none is in flight."""
    found = json.loads(machine.say("verify", "--run", "whole", "--json"))
    assert found["balanced"]
    assert found["ended"]
    assert found["steps"] == STEPS
    assert found["in_flight"] == found["junk"] == 0
    admitted = sum(event["kind"] == "admitted" for event in finished)
    assert found["admitted"] == sum(found["fates"].values()) == admitted


def test_the_run_can_be_replayed(machine, finished: list[dict[str, Any]]) -> None:
    """`actors replay`: batches, rewards, losses and weights of every step come out equal, across the kill."""
    output = machine.say("replay", "--run", "whole")
    assert f"equal: {STEPS} steps from step-000000: {STEPS} batches" in output


def test_what_a_run_leaves(machine, finished: list[dict[str, Any]]) -> None:
    """Metrics without a gap, held-out scores, the curve, the recipe, and a model that transformers loads."""
    folder = machine.runs / "whole"
    metrics = machine.rows("whole")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert metrics[0].keys() >= METRICS
    evaluations = [
        json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()
    ]
    assert {row["policy_version"] for row in evaluations} >= {0, STEPS}
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events.*"))
    assert load_recipe(folder / "recipe.toml").learner.steps == STEPS
    assert not (folder / "endpoint.json").exists()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    assert model.config.vocab_size >= len(AutoTokenizer.from_pretrained(folder / "checkpoint"))


def test_a_trajectory_can_be_shown(machine, finished: list[dict[str, Any]]) -> None:
    """Of a run at rest, too: every turn, call, result and the reward."""
    scored = next(e for e in finished if e["kind"] == "scored" and e["trajectory"].startswith("g"))
    text = machine.say("show", scored["trajectory"], "--run", "whole")
    assert "turn 0" in text
    assert "reward" in text


def test_a_finished_run_is_not_started_again(machine, finished: list[dict[str, Any]]) -> None:
    process = machine.start("train", *SMALL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "has ended" in output
