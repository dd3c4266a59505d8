"""The peer of the whole system: the same recipe in one process, with nothing but transformers and torch.

No bus, no actors, no sandbox (the tool is a multiplication in place). What it needs for the same number of steps is
what the algorithm costs here; the rest of `actors train` is the price of independent processes.

    python -m bench.single_process [--recipe PATH] [--seed N] [--rl-threads N] [--staleness N]

Legend: B sequences, T tokens, V vocabulary.
"""

import argparse
import copy
import json
import random
import re
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from schemas.recipe import Recipe
from schemas.task import ChatMessage, TaskRow

CALL = re.compile(r"<python>(.*?)</python>")
EXPRESSION = re.compile(r"(\d+)([-+*])(\d+)")
NUMBER = re.compile(r"-?\d+")
NOT_TRAINED = -100
HOPELESS = 10
"""Times the completed groups of a step without a single one to learn from."""


@dataclass
class Rollout:
    """One trajectory: its tokens, which of them were sampled, and the sampler's log-probabilities."""

    ids: list[int]
    answer: str
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    ended: bool = False

    def give(self, ids: list[int]) -> None:
        self.ids += ids
        self.mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)

    @property
    def reward(self) -> float:
        """Whether the last number of the last turn is the answer."""
        numbers = NUMBER.findall(self.text)
        return float(bool(numbers) and numbers[-1] == self.answer)


# -- sampling --------------------------------------------------------------------------------------


class Sampler:
    """Turns and tool calls of whole batches in lockstep."""

    def __init__(self, policy: PreTrainedModel, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("</python>")]

    def rollouts(self, rows: list[TaskRow], temperature: float) -> list[Rollout]:
        """One trajectory for each row."""
        rollouts = []
        for row in rows:
            rollout = Rollout(ids=[], answer=row.private["answer"])
            rollout.give(self.prompt(row.public.messages))
            rollouts.append(rollout)
        for _ in range(self.recipe.policy.max_turns):
            live = [rollout for rollout in rollouts if not rollout.ended]
            if live:
                self.turn(live, temperature)
        return rollouts

    def prompt(self, messages: list[ChatMessage]) -> list[int]:
        chat = [msgspec.to_builtins(message) for message in messages]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer.encode(str(text), add_special_tokens=False)
        return ids

    def turn(self, rollouts: list[Rollout], temperature: float) -> None:
        """Sample one turn of each, and run what it calls."""
        for rollout, (ids, logprobs) in zip(
            rollouts, self.decode(rollouts, temperature), strict=True
        ):
            rollout.ids += ids
            rollout.logprobs += logprobs
            rollout.mask += [1] * len(ids)
            rollout.text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            call = CALL.search(rollout.text)
            if call is None:
                rollout.ended = True
                continue
            given = f"<|end|><|tool|>{evaluate(call[1])}<|end|><|assistant|>"
            rollout.give(self.tokenizer.encode(given, add_special_tokens=False))

    @torch.inference_mode()
    def decode(
        self, rollouts: list[Rollout], temperature: float
    ) -> list[tuple[list[int], list[float]]]:
        """The sampled tokens of one turn, up to a stop token, and their log-probabilities."""
        ids_BT, mask_BT = pad([r.ids for r in rollouts], self.tokenizer.pad_token_id, left=True)
        position_B1 = mask_BT.sum(1, keepdim=True)
        output = self.policy(
            ids_BT,
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=1,
        )
        running_B = torch.ones(len(rollouts), dtype=torch.bool)
        stops = torch.tensor(self.stops)
        columns: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for _ in range(self.recipe.policy.max_turn_tokens):
            next_B1, logprob_B1 = choose(output.logits[:, -1], temperature)
            columns.append((next_B1[:, 0], logprob_B1[:, 0], running_B))
            running_B = running_B & ~torch.isin(next_B1[:, 0], stops)
            if not running_B.any():
                break
            mask_BT = torch.cat([mask_BT, torch.ones_like(next_B1)], dim=1)
            output = self.policy(
                next_B1,
                attention_mask=mask_BT,
                position_ids=position_B1,
                past_key_values=output.past_key_values,
            )
            position_B1 = position_B1 + 1
        ids, logprobs, kept = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
        return [
            (ids[b][kept[b]].tolist(), logprobs[b][kept[b]].tolist()) for b in range(len(rollouts))
        ]


def choose(logits_BV: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 1] a token each and its log-probability; temperature 0 takes the likeliest."""
    logprobs_BV = log_softmax(logits_BV / (temperature or 1.0), dim=-1)
    greedy_B1 = logprobs_BV.argmax(-1, keepdim=True)
    ids_B1 = torch.multinomial(logprobs_BV.exp(), 1) if temperature else greedy_B1
    return ids_B1, logprobs_BV.gather(1, ids_B1)


def evaluate(code: str) -> str:
    """What the Python tool would say."""
    match = EXPRESSION.fullmatch(code)
    if not match:
        return "SyntaxError: invalid syntax"
    a, b = int(match[1]), int(match[3])
    return str({"+": a + b, "-": a - b, "*": a * b}[match[2]])


def pad(
    sequences: list[list[int]], value: int, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] the sequences as one tensor, and [B, T] 1 where it is not padding."""
    tensors = [torch.tensor(sequence) for sequence in sequences]
    side = "left" if left else "right"
    padded_BT = torch.nn.utils.rnn.pad_sequence(
        tensors, batch_first=True, padding_value=value, padding_side=side
    )
    ones = [torch.ones_like(tensor) for tensor in tensors]
    mask_BT = torch.nn.utils.rnn.pad_sequence(
        ones, batch_first=True, padding_value=0, padding_side=side
    )
    return padded_BT, mask_BT


# -- learning --------------------------------------------------------------------------------------


def cold_start(policy: PreTrainedModel, tokenizer: Tokenizer, recipe: Recipe, seed: int) -> None:
    """Supervised fine-tuning on what assistants say in the demonstrations."""
    settings = recipe.cold_start
    torch.set_num_threads(settings.threads)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    demonstrations = resolve(settings.demonstrations)(seed)
    for step in range(settings.steps):
        set_rate(optimizer, settings.learning_rate * schedule(step + 1, settings.steps))
        batch = [labelled(tokenizer, c) for c in islice(demonstrations, settings.batch_size)]
        ids_BT, _ = pad([ids for ids, _ in batch], tokenizer.pad_token_id)
        labels_BT, _ = pad([labels for _, labels in batch], NOT_TRAINED)
        logits_BTV = policy(ids_BT).logits[:, :-1]
        loss = cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten())
        update(policy, optimizer, loss, recipe.learner.max_grad_norm)


def schedule(step: int, steps: int) -> float:
    """The share of the peak rate at a step from 1 on: up for a twentieth, then down to a tenth."""
    rise = max(1, round(steps * 0.05))
    return min(step / rise, 1.0 - 0.9 * max(step - rise, 0) / max(1, steps - rise))


def labelled(tokenizer: Tokenizer, conversation: list[ChatMessage]) -> tuple[list[int], list[int]]:
    """A conversation's tokens, and the same with all but the assistant's turns blanked."""
    ids: list[int] = []
    labels: list[int] = []
    for message in conversation:
        head = tokenizer.encode(f"<|{message.role}|>", add_special_tokens=False)
        body = tokenizer.encode(f"{message.content}<|end|>", add_special_tokens=False)
        ids += head + body
        labels += [NOT_TRAINED] * len(head)
        labels += body if message.role == "assistant" else [NOT_TRAINED] * len(body)
        if CALL.search(message.content):
            labels[-1] = NOT_TRAINED  # a call ends its turn by itself
    return ids, labels


def grpo_step(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    groups: list[list[Rollout]],
    recipe: Recipe,
) -> float:
    """One update: advantages are rewards less the group's mean; ratios clipped, and masked far out.

    Returns the share of sampled tokens that were masked.
    """
    settings, trust = recipe.learner, recipe.learner.correction
    rollouts = [rollout for group in groups for rollout in group]
    advantages = []
    for group in groups:
        mean = sum(rollout.reward for rollout in group) / len(group)
        advantages += [rollout.reward - mean for rollout in group]
    advantages_B1 = torch.tensor(advantages)[:, None]
    ids_BT, _ = pad([r.ids for r in rollouts], 0)
    sampled_BT, _ = pad([r.mask for r in rollouts], 0)
    old_BT, _ = pad([r.logprobs for r in rollouts], 0)  # type: ignore[misc]
    logits_BTV = policy(ids_BT).logits[:, :-1] / recipe.sampling.temperature
    new_BT = log_softmax(logits_BTV, -1).gather(2, ids_BT[:, 1:, None])[..., 0]
    sampled_BT = sampled_BT[:, 1:].float()
    ratio_BT = (new_BT - old_BT[:, 1:]).exp()
    trusted_BT = (ratio_BT >= trust.ratio_min) & (ratio_BT <= trust.ratio_max)
    clipped_BT = ratio_BT.clamp(1 - settings.loss.clip_low, 1 + settings.loss.clip_high)
    gain_BT = torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    loss = -(gain_BT * sampled_BT * trusted_BT).sum() / sampled_BT.sum()
    update(policy, optimizer, loss, settings.max_grad_norm)
    return float(1 - (sampled_BT * trusted_BT).sum() / sampled_BT.sum())


def update(
    policy: PreTrainedModel, optimizer: torch.optim.Optimizer, loss: torch.Tensor, limit: float
) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(policy.parameters(), limit)
    optimizer.step()


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def resolve(name: str) -> Any:
    """What `module:function` names."""
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


# -- the run ---------------------------------------------------------------------------------------


@dataclass
class Loop:
    """Sampling and learning in turns; the sampler's weights are `staleness` updates old."""

    policy: PreTrainedModel
    tokenizer: Tokenizer
    recipe: Recipe
    seed: int
    staleness: int = 0
    trajectories: int = 0

    def __post_init__(self) -> None:
        self.sampler = Sampler(copy.deepcopy(self.policy), self.tokenizer, self.recipe)
        self.old_weights: deque[dict[str, torch.Tensor]] = deque(maxlen=self.staleness + 1)
        self.rows: Iterator[TaskRow] = resolve(self.recipe.data.rows)(self.seed)
        self.remember()

    def remember(self) -> None:
        """Keep the weights as they are now, and sample with the oldest kept."""
        self.old_weights.append({k: v.clone() for k, v in self.policy.state_dict().items()})
        self.sampler.policy.load_state_dict(self.old_weights[0])

    def collect(self) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
        """A step's groups with signal, and all groups that were completed for it."""
        settings = self.recipe.learner
        signal: list[list[Rollout]] = []
        complete: list[list[Rollout]] = []
        limit = settings.refill_limit * settings.groups_per_step
        while len(signal) < settings.groups_per_step and not (signal and len(complete) >= limit):
            missing = settings.groups_per_step - len(signal)
            rows = [r for r in islice(self.rows, missing) for _ in range(settings.group_size)]
            rollouts = self.sampler.rollouts(rows, self.recipe.sampling.temperature)
            self.trajectories += len(rollouts)
            size = settings.group_size
            groups = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
            complete += groups
            signal += [group for group in groups if len({r.reward for r in group}) > 1]
            if not signal and len(complete) > HOPELESS * limit:
                raise RuntimeError(f"none of {len(complete)} groups has any signal")
        return signal, complete

    def evaluate(self) -> float:
        """The mean reward on held-out rows."""
        self.sampler.policy.load_state_dict(self.policy.state_dict())
        rows = islice(resolve(self.recipe.evaluation.rows)(self.seed), self.recipe.evaluation.limit)
        rollouts = self.sampler.rollouts(list(rows), self.recipe.evaluation.temperature)
        return mean_reward(rollouts)

    def train(self) -> list[float]:
        """The mean reward of each step's completed groups."""
        settings = self.recipe.learner
        optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        rewards = []
        for step in range(settings.steps):
            warmup = (step + 1) / max(settings.warmup_steps, 1)
            set_rate(optimizer, settings.learning_rate * min(warmup, 1.0))
            signal, complete = self.collect()
            masked = grpo_step(self.policy, optimizer, signal, self.recipe)
            self.remember()
            rewards.append(mean_reward([r for group in complete for r in group]))
            print(
                f"{step + 1:5d} {rewards[-1]:7.3f} {len(signal):7d} {len(complete):9d} {masked:7.3f}"
            )
        return rewards


def mean_reward(rollouts: list[Rollout]) -> float:
    return sum(rollout.reward for rollout in rollouts) / len(rollouts)


def run(recipe: Recipe, seed: int, rl_threads: int = 1, staleness: int = 0) -> dict[str, float]:
    """Cold start, reinforcement learning and evaluation; what the last line of the program reports."""
    torch.manual_seed(seed)
    random.seed(seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        resolve(recipe.policy.model)(Path(folder))
        policy = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    cold_start_began = time.perf_counter()
    cold_start(policy, tokenizer, recipe, seed)
    rl_began = time.perf_counter()
    torch.set_num_threads(rl_threads)
    loop = Loop(policy, tokenizer, recipe, seed, staleness)
    print(" step  reward  signal completed  masked")
    rewards = loop.train()
    ended = time.perf_counter()
    held_out = loop.evaluate()
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "cold_start_s": round(rl_began - cold_start_began, 2),
        "rl_s": round(ended - rl_began, 2),
        "trajectories_per_s": round(loop.trajectories / (ended - rl_began), 1),
        "reward_first": round(rewards[0], 3),
        "reward_last5": round(sum(rewards[-5:]) / len(rewards[-5:]), 3),
        "held_out": round(held_out, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/arithmetic.toml"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rl-threads", type=int, default=1)
    parser.add_argument(
        "--staleness", type=int, default=0, help="age of the sampler's weights, in updates"
    )
    options = parser.parse_args()
    recipe = msgspec.toml.decode(options.recipe.read_bytes(), type=Recipe)
    print(json.dumps(run(recipe, options.seed, options.rl_threads, options.staleness)))


if __name__ == "__main__":
    main()
