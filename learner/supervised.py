"""The cold start: supervised fine-tuning on demonstrations before version 0.

demonstrations → tokens (conversations.py) → batches, an order per epoch → supervised steps → version 0
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch

from learner.conversations import Chat, Segmenter
from learner.errors import BadConversation
from learner.policy import Policy
from schemas.recipe import Recipe
from schemas.task import ChatMessage

_ROW_STEPS = 50
_WARMUP_SHARE = 0.05
_FINAL_RATE = 0.1
"""Of the peak, where the decay ends."""


def cold_start(
    policy: Policy, conversations: Iterable[Sequence[ChatMessage]], config: Recipe, chat: Chat
) -> Iterator[dict[str, float]]:
    """Fine-tune for `config.cold_start.steps`; yields a row of metrics every 50 steps and after the last.

    Takes no more conversations than the steps need, so that there may be endlessly many; fewer are gone through again,
    each time in another order. Uses `cold_start.threads` torch threads until it ends, and leaves a fresh optimizer.
    A row: step, and as means since the last row, what `supervised_step` returns; seconds, tokens_per_s. Raises
    BadConversation, NotFinite.
    """
    plan = config.cold_start
    messages = islice(conversations, plan.steps * plan.batch_size)
    tokenizer = policy.tokenizer()

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    segmenter = Segmenter(chat, encode, config.policy.observation_role)
    data = [segmenter.conversation(conversation) for conversation in messages]
    if plan.steps and not data:
        raise BadConversation("there are no demonstrations")
    with _threads(plan.threads):
        rows: list[dict[str, float]] = []
        began = time.perf_counter()
        for step in range(1, plan.steps + 1):
            rate = plan.learning_rate * _decay(step, plan.steps)
            chosen = _batch(len(data), plan.batch_size, step, config.seed)
            rows.append(policy.supervised_step([data[i] for i in chosen], step, rate))
            if step % _ROW_STEPS == 0 or step == plan.steps:
                seconds = time.perf_counter() - began
                yield _row(rows, step, seconds)
                rows, began = [], time.perf_counter()
    policy.restart_optimizer()


def _batch(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which of `count` conversations step `step` takes: a function of its place alone, so any step can be redone."""
    first = (step - 1) * batch_size
    orders: dict[int, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
    chosen = []
    for place in range(first, first + batch_size):
        epoch, index = divmod(place, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(count)
        chosen.append(int(orders[epoch][index]))
    return chosen


def _decay(step: int, steps: int) -> float:
    """The share of the peak learning rate: up in the first twentieth, then down in a straight line to a tenth."""
    warmup = max(1, round(steps * _WARMUP_SHARE))
    if step <= warmup:
        return step / warmup
    return 1.0 - (1.0 - _FINAL_RATE) * (step - warmup) / max(1, steps - warmup)


def _row(rows: Sequence[dict[str, float]], step: int, seconds: float) -> dict[str, float]:
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    tokens = sum(row["train_tokens"] for row in rows)
    return {"step": step, **means, "seconds": seconds, "tokens_per_s": tokens / seconds}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
