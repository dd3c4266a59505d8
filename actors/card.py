"""The model card of an exported checkpoint: what it is, how it was trained, how good it is, how to load it."""

from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from actors.recipe import sentence, to_toml
from actors.report import draw
from actors.scores import Scores
from schemas.recipe import Recipe

_PACKAGES = ("agentic-actors", "torch", "transformers")
_PICTURE = "reward.png"


class Exported(NamedTuple):
    """What is known of a checkpoint."""

    name: str
    """`RUN`, or `RUN/SHADOW`."""
    step: int
    recipe: Recipe
    scores: Scores


def card_files(exported: Exported) -> dict[str, bytes]:
    """README.md and the picture that it shows."""
    files = {"README.md": _text(exported).encode()}
    if exported.scores.rows:
        with TemporaryDirectory() as name:
            picture = Path(name) / _PICTURE
            draw(exported.scores.rows, exported.scores.held_out(), picture)
            files[_PICTURE] = picture.read_bytes()
    return files


def _text(exported: Exported) -> str:
    name, step, recipe, scores = exported
    rows = [row for row in scores.rows if row["step"] <= step]
    parts = [
        "---\nlibrary_name: transformers\ntags: [agentic-actors, reinforcement-learning]\n---",
        f"# {name}, version {step}",
        f"{recipe.policy.model} after {step} of {recipe.learner.steps} steps of the recipe below. {_data(recipe)}",
    ]
    if rows:
        last = rows[-5:]
        mean = sum(row["reward_mean"] for row in last) / len(last)
        parts += [
            f"Mean training reward {rows[0]['reward_mean']:.3f} at step 1, {mean:.3f} over the last {len(last)}.",
            f"![mean reward by step]({_PICTURE})",
        ]
    if held_out := scores.held_out():
        lines = [f"| {number} | {mean:.3f} |" for number, mean in held_out.items()]
        parts.append("\n".join(["| version | held-out reward |", "| ---: | ---: |", *lines]))
    parts += [
        "## Load it",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```',
        "or `vllm serve FOLDER`, or `actors eval FOLDER RECIPE`.",
        "## Recipe",
        f"```toml\n{sentence(recipe)}{to_toml(recipe)}```",
        "## Versions",
        ", ".join(f"{package} {version(package)}" for package in _PACKAGES),
    ]
    return "\n\n".join(parts) + "\n"


def _data(recipe: Recipe) -> str:
    held_out = recipe.evaluation.path or recipe.evaluation.rows
    data = f"Trained on {recipe.data.path or recipe.data.rows}"
    return f"{data}, held out {held_out}." if held_out else f"{data}."
