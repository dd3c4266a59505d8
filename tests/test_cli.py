"""The command line: every mistake is answered in one line with what to do, and leaves nothing behind."""

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil
import pytest

from actors.recipe import load_recipe
from bus.embedded import free_port
from schemas.recipe import Recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "arithmetic.toml"
COMMANDS = [
    *("train", "run", "stop", "pause", "resume", "eval", "ps", "tail", "show", "flow"),
    *("archive", "dead", "verify", "replay", "compare", "export"),
]


def actors(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, in a folder without runs."""
    return subprocess.run(
        [sys.executable, "-m", "actors", *arguments],
        cwd=folder,
        env=os.environ | {"COLUMNS": "200", "NATS_URL": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def refused(folder: Path, *arguments: str, **environment: str) -> str:
    """The one line of a mistake."""
    done = actors(folder, *arguments, **environment)
    assert done.returncode == 2, done.stderr + done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("actors: ")
    return line


def processes_in(folder: Path) -> list[str]:
    """What was started there and still runs."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) or str(folder) in " ".join(process.cmdline()):
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


# -- recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["learner.stps=3"], "learner.stps: no such key; did you mean 'steps'?"),
        (["learner.steps=many"], "learner.steps: Expected `int`, got `str`"),
        (["learner.steps"], "--set: learner.steps: write key=value, e.g. learner.steps=20"),
        (["tools.tier=vm"], "tools.tier: Invalid enum value 'vm'"),
        (['tools.use=["pyton"]'], "tools.use: 'pyton': did you mean python?"),
        (['tools.use=["nowhere:tool"]'], "tools.use: 'nowhere:tool': no module 'nowhere'"),
        (['tools.use=["python", "python"]'], "tools.use: two tools are called 'python'"),
        (["tools.tags.shell=sh"], "tools.tags: tools.tags names shell, not in tools.use"),
        (["scorer.reward=exat"], "scorer.reward: 'exat': did you mean exact?"),
        (["scorer.reward=nowhere:f"], "scorer.reward: 'nowhere:f': no module 'nowhere'"),
        (["data.rows=recipes.arithmetic:rws"], "data.rows: 'recipes.arithmetic:rws': "),
        (["data.rows=", "data.path=no.jsonl"], "no.jsonl is not there"),
        (["data.rows=", "data.path=no.csv"], "'no.csv' is neither *.jsonl, *.parquet nor hf:"),
        (["evaluation.rows=recipes.arithmetic:x"], "evaluation.rows: 'recipes.arithmetic:x': "),
        (["cold_start.demonstrations=nowhere:f"], "cold_start.demonstrations: 'nowhere:f': "),
        (["generator.engine=scripted", "generator.script=no:f"], "generator.script: 'no:f': "),
        (["policy.model=recipes.arithmetic:modle"], "policy.model: 'recipes.arithmetic:modle'"),
        (["policy.model=./nowhere"], "policy.model: no folder './nowhere'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_in_a_recipe_is_one_line(tmp_path: Path, overrides: list[str], says: str) -> None:
    """It names the key and what is wrong with it, and no run was begun."""
    sets = [part for override in overrides for part in ("--set", override)]
    assert says in refused(tmp_path, "train", str(RECIPE), *sets)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path, "train", "no.toml") == "actors: no.toml: No such file or directory"


def test_a_bad_name_of_a_run_is_refused(tmp_path: Path) -> None:
    """It is to be a token of a subject and the name of a folder."""
    for name in ("a.b", "a b", "../a", "*", ""):
        if name:
            assert "--run" in refused(tmp_path, "train", str(RECIPE), f"--run={name}")
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_needs_held_out_tasks(tmp_path: Path) -> None:
    line = refused(tmp_path, "eval", "nowhere", str(RECIPE), "--set", "evaluation.rows=")
    assert "evaluation.path: no held-out tasks: give it or evaluation.rows" in line


@pytest.mark.slow
def test_a_model_that_is_nowhere_stops_the_run(tmp_path: Path) -> None:
    """Only the learner asks the hub; what it says is told in one line, and no process is left."""
    line = refused(
        tmp_path, "train", str(RECIPE), "--set", "policy.model=nowhere", HF_HUB_OFFLINE="1"
    )
    assert "policy.model: no such folder, and the hub does not give 'nowhere'" in line
    assert processes_in(tmp_path) == []


# -- servers and runs ------------------------------------------------------------------------------


def test_a_disk_without_room_is_named(
    tmp_path: Path, make_small_disk: Callable[[Path, int], Path]
) -> None:
    """Before anything runs; with where else to go."""
    full = make_small_disk(tmp_path / "full", 1)
    with suppress(OSError):
        (full / "ballast").write_bytes(b"x" * (2 << 20))
    line = refused(tmp_path, "train", str(RECIPE), "--run", "x", ACTORS_RUNS=str(full / "runs"))
    assert "No space left on device" in line
    assert "ACTORS_RUNS" in line
    assert processes_in(tmp_path) == []


def test_a_server_that_does_not_answer_is_named(tmp_path: Path) -> None:
    """In one line; tests/test_secrets.py asks it of other commands too."""
    url = f"nats://127.0.0.1:{free_port()}"
    line = refused(tmp_path, "ps", "--run", "r", "--nats", url)
    assert line.startswith(f"actors: no NATS server at {url}: ")


def test_a_server_may_hold_many_runs(tmp_path: Path) -> None:
    assert "--nats, or NATS_URL, needs --run NAME" in refused(
        tmp_path, "ps", "--nats", "nats://127.0.0.1:1"
    )


@pytest.mark.parametrize(
    "command", [["ps"], ["tail"], ["run", "scorer"], ["show", "g0-0-0"]], ids=lambda c: c[0]
)
def test_without_a_live_run_there_is_nothing_to_join(tmp_path: Path, command: list[str]) -> None:
    """It says where it looked, and how to start one."""
    line = refused(tmp_path, *command, ACTORS_RUNS=str(tmp_path / "runs"))
    assert "no run is alive" in line
    assert str(tmp_path / "runs") in line
    assert "actors train RECIPE" in line


@pytest.mark.parametrize("command", ["stop", "pause", "resume"])
def test_a_run_that_is_not_alive_cannot_be_steered(tmp_path: Path, command: str) -> None:
    assert "run 'nope' is not alive" in refused(tmp_path, command, "nope")


def test_what_is_no_trajectory_is_refused(tmp_path: Path) -> None:
    assert "not a trajectory id" in refused(tmp_path, "show", "g0")


def test_a_bad_role_is_click_s_to_refuse(tmp_path: Path) -> None:
    """With the roles that there are."""
    done = actors(tmp_path, "run", "janitor")
    assert done.returncode == 2
    assert "'janitor' is not one of 'dispatcher', 'generator'" in done.stderr


# -- what works without a run ----------------------------------------------------------------------


def test_a_dry_run_prints_the_recipe_as_resolved(tmp_path: Path) -> None:
    """It is TOML that means the same, with the loss as its first line; nothing is started."""
    done = actors(tmp_path, "train", str(RECIPE), "--set", "learner.steps=3", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "# loss = mean over tokens of -min(rho A, clip(rho, 0.8, 1.28) A)"
    )
    printed = msgspec.convert(tomllib.loads(done.stdout), Recipe)
    assert printed == load_recipe(RECIPE, ["learner.steps=3"])
    again = tmp_path / "again.toml"
    again.write_text(done.stdout)
    assert load_recipe(again) == printed


def test_flow_shows_every_role_and_subject(tmp_path: Path) -> None:
    done = actors(tmp_path, "flow")
    assert done.returncode == 0
    for word in ("dispatcher", "generator", "toolbox", "scorer", "learner", "log.*.t.*.turn"):
        assert word in done.stdout


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
def test_every_command_explains_itself(tmp_path: Path, command: list[str]) -> None:
    """And the list of commands is whole."""
    done = actors(tmp_path, *command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    if not command:
        assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


def test_start_up_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside that of Python alone; a figure, not a limit: machines differ."""

    def best_s(*command: str) -> float:
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            times.append(time.perf_counter() - begun)
        return min(times)

    plain_s, ours_s = best_s("-c", "pass"), best_s("-m", "actors", "--help")
    with capsys.disabled():
        print(f"\n`actors --help` {ours_s:.2f} s, `python -c pass` {plain_s:.2f} s", end=" ")
