"""Names to rewards: built in, from an installed package, or `module:function` beside the recipe."""

import difflib
import importlib
import math
import sys
from importlib.metadata import entry_points
from typing import Any, cast

from rewards.errors import BadReward, UnknownReward
from rewards.reward import Reward, RewardFunction, Run
from schemas.task import TaskRow
from schemas.trajectory import Trajectory

ENTRY_POINTS = "agentic_actors.rewards"
BUILT_IN = {"exact": "rewards.exact:exact", "math": "rewards.math:math"}


class CheckedReward:
    """A reward function whose numbers are checked: one that is not finite would poison a whole step."""

    def __init__(self, name: str, function: RewardFunction) -> None:
        self.name = name
        self.imports: tuple[str, ...] = tuple(getattr(function, "imports", ()))
        """Modules to have ready in the sandbox."""
        self._function = function

    async def __call__(self, task: TaskRow, trajectory: Trajectory, run: Run) -> Reward:
        """See RewardFunction. Raises BadReward for what is not a finite number."""
        given = await self._function(task, trajectory, run)
        reward = given if isinstance(given, Reward) else Reward(value=given)
        for part, number in {"value": reward.value, **reward.parts}.items():
            if not _is_finite(number):
                raise BadReward(
                    "not_finite", f"{self.name} gave {number!r} as its {part} for {trajectory.id}"
                )
        return Reward(
            value=float(reward.value),
            parts={part: float(number) for part, number in reward.parts.items()},
        )


def load_reward(name: str, recipe_dir: str = "") -> CheckedReward:
    """The reward of the name. Raises UnknownReward for a name that leads nowhere."""
    installed = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    known = installed | BUILT_IN
    place = name if ":" in name else known.get(name)
    if place is None:
        close = difflib.get_close_matches(name, known)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise UnknownReward("unknown_reward", f"no reward {name!r}; {hint}, or `module:function`")
    module, _, attribute = place.partition(":")
    try:
        found = getattr(_import(module, recipe_dir), attribute)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise UnknownReward("unknown_reward", f"{name!r}: no module {error.name!r}") from error
        raise
    except AttributeError as error:
        raise UnknownReward("unknown_reward", f"{name!r}: {error}") from error
    return CheckedReward(name, cast(RewardFunction, found))


def _is_finite(number: object) -> bool:
    try:
        return math.isfinite(cast(float, number))
    except (TypeError, ValueError):
        return False


def _import(module: str, recipe_dir: str) -> Any:
    if not recipe_dir:
        return importlib.import_module(module)
    sys.path.insert(0, recipe_dir)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(recipe_dir)
