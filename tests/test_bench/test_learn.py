"""The learning curves, in small."""

import json
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from actors.recipe import load_recipe, with_overrides
from bench.learn import ALGORITHMS, STALENESS, Learned, figures, kinds, line


def test_every_kind_is_a_recipe() -> None:
    """Each algorithm's keys fit together, and no two are the same loss."""
    base = load_recipe(Path("recipes/arithmetic.toml"))
    made = [with_overrides(base, keys) for _, keys in kinds(list(ALGORITHMS), STALENESS)]
    assert len({repr(recipe.learner) for recipe in made[: len(ALGORITHMS)]}) == len(ALGORITHMS)
    assert [recipe.asynchrony.max_staleness for recipe in made[len(ALGORITHMS) :]] == [0, 4, 8]


def test_a_line_says_who_never_got_there() -> None:
    """The way there is that of the seeds that made it."""
    runs = [Learned(0.95, 10, 31.0, 0.1), Learned(0.5, None, None, 0.25)]
    words = line("grpo", runs).split()
    assert words == ["grpo", "0.725", "0.500", "1/2", "10", "31.0", "0.250"]
    assert line("grpo", runs[1:]).split()[4:6] == ["-", "-"]
    assert figures(runs)["steps_to_goal"] == [10, None]
    assert inf not in figures(runs)["worst_drop"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_algorithm_is_measured() -> None:
    """The program ends with one JSON line that holds each kind's figures, one for each seed."""
    command = [sys.executable, "-m", "bench.learn", "--quick", "--algorithms", "grpo"]
    ran = subprocess.run(
        [*command, "--staleness", "none"], capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    assert set(found) == {"grpo"}
    assert set(found["grpo"]) == set(Learned._fields)
    assert 0 <= found["grpo"]["held_out"][0] <= 1
