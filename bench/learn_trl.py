"""bench.learn's peer: TRL's GRPOTrainer on the recipe, in one process, with TRL's own loop of turns and tool calls.

The same model, rows, held-out problems, reward, groups, learning rate, temperature and limits; what the recipe does not
say is as TRL has it by default. The tool is the same, in the same sandbox, opened before the clock starts; TRL lets the
calls of a turn run at once. `--in-place` makes a multiplication of it, without a sandbox. The clock stands still while
held-out problems are answered, which favours TRL: `actors train` evaluates while it trains.

    python -m bench.learn_trl RECIPE [--in-place]

The last line: versions evaluated, held-out mean and seconds to each, as JSON.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from actors.recipe import load_recipe
from bench.single_process import Sampler, evaluate, resolve
from rewards.exact import final_answer, is_same
from schemas.recipe import Recipe, Tools
from tools.observation import shorten
from tools.python import python
from tools.sandbox.sandbox import Limits
from tools.sandbox.select import open_sandbox
from tools.tool import Context

THREADS = 2
END, CALL_END = "<|end|>", "</python>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}"
    "{% for call in message.tool_calls or [] %}"
    "{% if call.function.name == 'python' %}<python>{{ call.function.arguments.code }}</python>"
    "{% else %}<{{ call.function.name }}>{{ call.function.arguments | tojson }}</{{ call.function.name }}>{% endif %}"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The recipe's, to the byte, with calls: TRL renders them, and refuses a template that drops a call's parts."""
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open_pattern": "<python>(?=.*</python>)",  # a turn cut short calls nothing
            "close": CALL_END,
            "repeats": True,
            "content": "text",
            "transform": {
                "type": "function",
                "function": {"name": "python", "arguments": {"code": "{content}"}},
            },
        },
        "content": {"close": END, "content": "text"},
    },
}


class Points(NamedTuple):
    """The held-out curve: one value for each version that was evaluated."""

    versions: list[int]
    held_out: list[float]
    seconds: list[float]
    """From the first step's beginning to the version, evaluations not counted."""


class InPlace:
    """The tool without a sandbox, and without Python."""

    def python(self, code: str) -> str:
        """Run Python code.

        Args:
            code: An expression.
        """
        return evaluate(code)


class Sandboxed:
    """The recipe's tool, as the toolbox runs it."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def open(self) -> None:
        """Open the sandbox that the recipe names."""
        self._sandbox = await open_sandbox(self._tools.tier)

    async def close(self) -> None:
        """And close it."""
        await self._sandbox.close()

    async def python(self, code: str) -> str:
        """Run Python code.

        Args:
            code: An expression.
        """
        limits = Limits(wall_s=self._tools.timeout_s)
        seen = await python(Context(run=self._sandbox.run, limits=limits, task={}), code)
        return shorten(seen.text, self._tools.observation_chars)


def correct(text: str, answer: str) -> float:
    """The reward `exact` of a last turn."""
    given = final_answer(text, answer)
    return float(given is not None and is_same(given, answer))


def rewards(completions: list[list[dict[str, Any]]], answer: list[str], **_: Any) -> list[float]:
    return [
        correct(completion[-1]["content"], expected)
        for completion, expected in zip(completions, answer, strict=True)
    ]


class Evaluations(TrainerCallback):  # type: ignore[misc]
    """Answers the held-out problems every few steps, while the clock stands still."""

    def __init__(self, sampler: Sampler, recipe: Recipe) -> None:
        self.points = Points([], [], [])
        self._sampler = sampler
        self._temperature = recipe.evaluation.temperature
        self._last = recipe.learner.steps
        self._every = recipe.evaluation.every_steps or self._last
        rows = resolve(recipe.evaluation.rows)(recipe.seed)
        self._rows = list(islice(rows, recipe.evaluation.limit))
        self._seconds = 0.0
        self._since = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._evaluate(0)

    def on_step_end(self, _arguments: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == self._last:
            self._seconds += time.perf_counter() - self._since
            self._evaluate(state.global_step)

    def _evaluate(self, version: int) -> None:
        config = self._sampler.policy.config
        cached, config.use_cache = config.use_cache, True  # the trainer has switched it off
        rollouts = self._sampler.rollouts(self._rows, self._temperature)
        config.use_cache = cached
        right = [correct(rollout.text, rollout.answer) for rollout in rollouts]
        self.points.versions.append(version)
        self.points.held_out.append(sum(right) / len(right))
        self.points.seconds.append(self._seconds)
        self._since = time.perf_counter()


def train(recipe: Recipe, tool: InPlace | Sandboxed) -> Points:
    """Every step of the recipe, from the model in the folder `policy.model`."""
    folder = recipe.policy.model
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    evaluations = Evaluations(Sampler(model, AutoTokenizer.from_pretrained(folder), recipe), recipe)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([END, CALL_END])
    made_for_trl(tokenizer)
    count = recipe.learner.steps * recipe.learner.groups_per_step
    rows = [
        {
            "prompt": [msgspec.to_builtins(message) for message in row.public.messages],
            "answer": row.private["answer"],
        }
        for row in islice(resolve(recipe.data.rows)(recipe.seed), count)
    ]
    trainer = GRPOTrainer(
        model,
        rewards,
        settings(recipe, longest_prompt(tokenizer, rows)),
        Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[evaluations],
        tools=[tool.python],
    )
    with opened(tool, trainer):
        trainer.train()
    return evaluations.points


@contextmanager
def opened(tool: InPlace | Sandboxed, trainer: GRPOTrainer) -> Iterator[None]:
    """In the loop in which TRL will call it."""
    if isinstance(tool, InPlace):
        yield
        return
    asyncio.run_coroutine_threadsafe(tool.open(), trainer.async_loop).result()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(tool.close(), trainer.async_loop).result()


def made_for_trl(tokenizer: Any) -> None:
    """Let TRL write and read the recipe's conversations."""
    # TRL lets a result begin after the last such token: the <|end|> of a turn that calls is given, not sampled.
    tokenizer.eos_token = CALL_END
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE


def longest_prompt(tokenizer: Any, rows: list[dict[str, Any]]) -> int:
    """In tokens."""
    return max(
        len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        for row in rows
    )


def settings(recipe: Recipe, prompt_tokens: int) -> GRPOConfig:
    """TRL's, with what the recipe says."""
    learner, policy = recipe.learner, recipe.policy
    return GRPOConfig(
        output_dir=str(Path(policy.model) / "trl"),
        use_cpu=True,
        bf16=False,
        seed=recipe.seed,
        shuffle_dataset=False,
        max_steps=learner.steps,
        per_device_train_batch_size=learner.groups_per_step * learner.group_size,
        num_generations=learner.group_size,
        temperature=recipe.sampling.temperature,
        max_completion_length=policy.max_tokens - prompt_tokens,
        max_tool_calling_iterations=policy.max_turns - 1,
        generation_kwargs={"max_new_tokens": policy.max_turn_tokens},
        learning_rate=learner.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=learner.warmup_steps,
        weight_decay=learner.weight_decay,
        max_grad_norm=learner.max_grad_norm,
        gradient_checkpointing=False,  # its default would cost it a third more
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--in-place", action="store_true", help="the tool multiplies, in no sandbox"
    )
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    torch.set_num_threads(THREADS)
    points = train(recipe, InPlace() if options.in_place else Sandboxed(recipe.tools))
    print(json.dumps(points._asdict()))


if __name__ == "__main__":
    main()
