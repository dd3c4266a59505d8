"""The learning curves, in small."""

import json
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from actors.compare import Curve
from actors.recipe import load_recipe, with_overrides
from bench.learn import ALGORITHMS, STALENESS, Learned, figures, kinds, learned, line
from bench.learn_trl import made_for_trl
from recipes.arithmetic import model


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


def test_the_goal_is_reached_by_the_first_version_that_has_it() -> None:
    """Also where the curve falls again; without one there is no way there."""
    curve = Curve([0, 5, 10, 15], [0.2, 0.95, 0.7, 0.9])
    found = learned(curve, [0.0, 3.5, 7.0, 10.5])
    assert (found.held_out, found.steps_to_goal, found.seconds_to_goal) == (0.9, 5, 3.5)
    assert found.worst_drop == pytest.approx(0.25)
    assert learned(Curve([0, 5], [0.2, 0.89]), [0.0, 3.5])[1:3] == (None, None)


def test_trl_writes_and_reads_what_the_recipe_does(tmp_path: Path) -> None:
    """A conversation with its call apart has the recipe's tokens, and a turn has that call; one cut short has none."""
    model(tmp_path)
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path) for _ in range(2))
    made_for_trl(theirs)
    question = {"role": "user", "content": "What is 47 * 86?"}
    result = {"role": "tool", "content": "4042"}
    text = "<python>47*86</python>"
    call = {"type": "function", "function": {"name": "python", "arguments": {"code": "47*86"}}}
    apart = [question, {"role": "assistant", "content": "", "tool_calls": [call]}, result]
    whole = [question, {"role": "assistant", "content": text}, result]
    prompt = ours.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    assert (
        ours.apply_chat_template(whole)["input_ids"]
        == theirs.apply_chat_template(apart)["input_ids"]
    )
    assert theirs.parse_response(text, prefix=prompt)["tool_calls"] == [call]
    assert "tool_calls" not in theirs.parse_response("<python>47*8", prefix=prompt)
    assert theirs.parse_response("4042<|end|>", prefix=prompt)["content"] == "4042"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_algorithm_is_measured() -> None:
    """The program ends with one JSON line that holds each kind's figures, and TRL's, one for each seed."""
    command = [sys.executable, "-m", "bench.learn", "--quick", "--algorithms", "grpo", "--trl"]
    ran = subprocess.run(
        [*command, "--staleness", "none"], capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    assert set(found) == {"grpo", "trl", "trl in place"}
    for row in found.values():
        assert set(row) == set(Learned._fields)
        assert 0 <= row["held_out"][0] <= 1
