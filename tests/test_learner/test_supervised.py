"""The cold start: demonstrations become the tokens that sampling sees, and the policy learns them."""

from itertools import count
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from engines.chat import Chat
from learner.conversations import Segmenter
from learner.errors import BadConversation
from learner.policy import Policy
from learner.supervised import cold_start
from schemas.recipe import ColdStart, Recipe
from schemas.task import ChatMessage


@pytest.fixture(scope="session")
def chat(folder: Path) -> Chat:
    return Chat(folder)


def messages(*pairs: tuple[str, str]) -> list[ChatMessage]:
    return [ChatMessage(role=role, content=content) for role, content in pairs]


TOOL_USE = messages(
    ("system", "Be brief."),
    ("user", "What is 12 * 34?"),
    ("assistant", "<python>print(12 * 34)</python>"),
    ("tool", "408"),
    ("assistant", "The answer is 408."),
)


def test_the_tokens_are_those_of_sampling(policy: Policy, chat: Chat) -> None:
    """The assistant's contents and the last end of turn are trained; the rest, the first end of turn too, is given."""
    tokenizer = policy.tokenizer()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    conversation = Segmenter(chat, encode, "tool").conversation(TOOL_USE)
    assert tokenizer.decode(conversation.ids_T) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 12 * 34?<|im_end|>\n"
        "<|im_start|>assistant\n<python>print(12 * 34)</python><|im_end|>\n"
        "<|im_start|>tool\n408<|im_end|>\n"
        "<|im_start|>assistant\nThe answer is 408.<|im_end|>"
    )
    trained = tokenizer.decode(conversation.ids_T[conversation.mask_T])
    assert trained == "<python>print(12 * 34)</python>The answer is 408.<|im_end|>"
    # Segment by segment, as a generator's turns are made.
    call = encode("<python>print(12 * 34)</python>")
    assert conversation.ids_T.tolist() == [
        *chat.prompt_ids(TOOL_USE[:2]),
        *call,
        *chat.observation_ids(["408"], "tool", ended=False),
        *encode("The answer is 408."),
        tokenizer.eos_token_id,
    ]


def test_observations_are_shown_in_the_recipes_role(policy: Policy, chat: Chat) -> None:
    """A tool's message becomes a user's where the recipe says so."""
    tokenizer = policy.tokenizer()
    segmenter = Segmenter(chat, tokenizer.encode, "user")
    conversation = segmenter.conversation(TOOL_USE)
    assert "<|im_start|>user\n408<|im_end|>" in tokenizer.decode(conversation.ids_T)


@pytest.mark.parametrize(
    "bad",
    [
        messages(("user", "?")),
        messages(("assistant", "!")),
        messages(("user", "?"), ("assistant", "!"), ("user", "?")),
        messages(("user", "?"), ("assistant", "!"), ("assistant", "!")),
        messages(
            ("user", "?"), ("assistant", "!"), ("tool", "4"), ("user", "?"), ("assistant", "!")
        ),
        [],
    ],
)
def test_conversations_that_sampling_could_not_make_are_refused(chat: Chat, bad) -> None:
    """From a prompt to an assistant, one assistant message at a time, one role between two of them."""
    segmenter = Segmenter(chat, lambda text: [5] * len(text), "tool")
    with pytest.raises(BadConversation):
        segmenter.conversation(bad)


def with_cold_start(config: Recipe, **changes) -> Recipe:
    return replace(config, cold_start=ColdStart(**{"batch_size": 4, "threads": 1, **changes}))


def test_the_loss_falls(policy: Policy, config: Recipe, chat: Chat) -> None:
    """120 steps on one demonstration: rows after 50, 100 and 120 steps, a loss near 0, and a fresh optimizer."""
    config = with_cold_start(config, steps=120, learning_rate=3e-3)
    rows = list(cold_start(policy, [TOOL_USE], config, chat))
    assert [row["step"] for row in rows] == [50, 100, 120]
    assert rows[0]["loss"] > rows[1]["loss"] > rows[2]["loss"]
    assert rows[2]["loss"] < 0.1
    assert rows[2]["learning_rate"] < rows[0]["learning_rate"]
    assert rows[2]["tokens_per_s"] > 0
    assert not policy.optimizer.state


def test_endless_demonstrations_and_their_threads(
    policy: Policy, config: Recipe, chat: Chat
) -> None:
    """No more are taken than the steps need; torch's thread count is as before when the last row is out."""
    config = with_cold_start(config, steps=3, threads=2)
    taken = count()
    before = torch.get_num_threads()
    demonstrations = (TOOL_USE for _ in taken)
    (row,) = cold_start(policy, demonstrations, config, chat)
    assert row["step"] == 3
    assert next(taken) == 12
    assert torch.get_num_threads() == before


def test_the_same_seed_gives_the_same_weights(folder: Path, config: Recipe, chat: Chat) -> None:
    """The order of demonstrations comes from the run's seed, and the epochs differ in it."""
    demonstrations = [
        messages(("user", f"Add {n} and 7."), ("assistant", f"The answer is {n + 7}."))
        for n in range(7)
    ]

    def weights(seed: int) -> bytes:
        policy = Policy.open(folder, config)
        recipe = replace(with_cold_start(config, steps=5), seed=seed)
        list(cold_start(policy, demonstrations, recipe, chat))
        return policy.weights()

    assert weights(0) == weights(0)
    assert weights(0) != weights(1)


def test_no_demonstrations(policy: Policy, config: Recipe, chat: Chat) -> None:
    """Steps without anything to learn from are a mistake of the recipe; no steps are not."""
    with pytest.raises(BadConversation, match="no demonstrations"):
        list(cold_start(policy, [], with_cold_start(config, steps=1), chat))
    assert list(cold_start(policy, [], with_cold_start(config, steps=0), chat)) == []
