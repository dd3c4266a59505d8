"""A whole run in which every process has the login of its role and no more."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

RECIPE = str(Path(__file__).parent / "stalling" / "recipe.toml")


def test_a_run_needs_no_more_than_its_rights(tmp_path: Path, machine_at: Any) -> None:
    """Trained to its end, with weights deleted on the way, then read, accounted for and emptied: nothing is refused."""
    machine = machine_at(tmp_path, PYTHONPATH=str(Path(RECIPE).parent))
    less = ("--set", "learner.steps=4", "--set", "learner.weights_kept=1")
    machine.say("train", RECIPE, "--run", "whole", *less)
    assert '"kind":"ended"' in machine.say("tail", "--run", "whole", "--from-start", "--json")
    assert "balanced: each has one fate" in machine.say("verify", "--run", "whole")
    machine.say("dead", "list", "--run", "whole")
    machine.say("archive", "whole", "--drop")
    logs = [tmp_path / "whole" / "nats" / "nats.log", *(tmp_path / "whole" / "logs").iterdir()]
    for log in logs:
        text = log.read_text()
        assert "iolation" not in text, log
        assert "denied" not in text, log
