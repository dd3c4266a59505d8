"""Packing changes where tokens are computed, never what is computed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.conversations import Conversation
from learner.logprobs import sampled_logprobs
from learner.pack import MicroBatch, pack


def conversation(ids, mask):
    return Conversation(ids_T=np.array(ids, np.int32), mask_T=np.array(mask, np.bool_))


def run(model, batches: list[MicroBatch]):
    """Log-probabilities [N] in batch order, and every parameter's gradient of their weighted sum."""
    model.zero_grad()
    total = sum(len(batch.tokens_K) for batch in batches)
    logprobs_N = torch.zeros(total)
    for batch in batches:
        now = sampled_logprobs(model, batch, 1.0, torch.float32)
        weights_K = torch.from_numpy(np.cos(batch.tokens_K)).float()
        (now.logprobs_K * weights_K).sum().backward()
        logprobs_N[torch.from_numpy(batch.tokens_K)] = now.logprobs_K.detach()
    return logprobs_N, {name: p.grad.clone() for name, p in model.named_parameters()}


def run_one_by_one(model, groups):
    """The same from unpadded forward passes of the plain model, one sample each."""
    model.zero_grad()
    logprobs, first = [], 0
    for sample in (sample for group in groups for sample in group):
        ids_T = torch.from_numpy(sample.ids_T).long()
        logits_TV = model(input_ids=ids_T.unsqueeze(0)).logits[0]
        all_T = logits_TV[:-1].log_softmax(-1).gather(1, ids_T[1:, None]).squeeze(1)
        now_K = all_T[torch.from_numpy(sample.mask_T[1:])]
        weights_K = torch.from_numpy(np.cos(np.arange(first, first + len(now_K)))).float()
        (now_K * weights_K).sum().backward()
        logprobs.append(now_K.detach())
        first += len(now_K)
    return torch.cat(logprobs), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shared", [True, False], ids=["shared prompts", "no sharing"])
@pytest.mark.parametrize("budget", [10, 100, 4096])
def test_packed_equals_one_by_one(make_model, make_groups, shared: bool, budget: int) -> None:
    """Log-probabilities and gradients equal those of unpadded passes, whatever shares a row or a prompt."""
    model, groups = make_model(), make_groups()
    units = groups if shared else [[sample] for group in groups for sample in group]
    expected_N, expected_gradients = run_one_by_one(model, groups)
    logprobs_N, gradients = run(model, pack(units, budget))
    torch.testing.assert_close(logprobs_N, expected_N, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4)


def test_a_shared_prompt_is_computed_once() -> None:
    """One tree of the prompt and each member's own tokens but the last, which is only predicted."""
    prompt = [5, 6, 7, 8]
    group = [conversation([*prompt, 10 + m, 20 + m], [0, 0, 0, 0, 1, 1]) for m in range(2)]
    (batch,) = pack([group], microbatch_tokens=64)
    assert batch.ids_P.tolist() == [5, 6, 7, 8, 10, 11]
    assert batch.positions_P.tolist() == [0, 1, 2, 3, 4, 4]
    assert batch.sources_K.tolist() == [3, 4, 3, 5]
    assert batch.targets_K.tolist() == [10, 20, 11, 21]
    assert batch.lengths_S.tolist() == [4, 1, 1]
    assert batch.seen_lengths_S.tolist() == [4, 5, 5]
    assert batch.seen_J.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 3, 5]


def test_members_share_only_what_all_begin_with() -> None:
    """A prompt that differs in its third token is shared up to there."""
    group = [conversation([5, 6, third, 8, 9], [0, 0, 0, 0, 1]) for third in (1, 2)]
    (batch,) = pack([group], microbatch_tokens=64)
    assert batch.ids_P.tolist() == [5, 6, 1, 8, 2, 8]


def test_a_group_above_the_budget_is_cut() -> None:
    """As many members as fit share a row and the prompt; the prompt is computed again for the others."""
    group = [conversation([*range(10), m, m], [0] * 10 + [1, 1]) for m in range(5)]
    batches = pack([group], microbatch_tokens=12)
    assert [len(batch.ids_P) for batch in batches] == [12, 12, 11]
    assert [batch.lengths_S.tolist() for batch in batches] == [[10, 1, 1], [10, 1, 1], [10, 1]]


def test_a_sample_above_the_budget_stands_alone() -> None:
    """It gets a micro-batch of its own; the others keep to the budget."""
    units = [[conversation(range(length), [0] + [1] * (length - 1))] for length in (9, 41, 8)]
    batches = pack(units, microbatch_tokens=20)
    assert [len(batch.ids_P) for batch in batches] == [40, 8 + 7]


def test_a_sample_without_sampled_tokens_takes_no_part() -> None:
    """Nothing is computed for it, and the others keep their numbers."""
    silent = conversation([3, 4], [0, 0])
    speaking = conversation([3, 4], [0, 1])
    (batch,) = pack([[silent, speaking]], microbatch_tokens=16)
    assert batch.ids_P.tolist() == [3]
    assert batch.tokens_K.tolist() == [0]
    assert pack([[silent]], microbatch_tokens=16) == []


MEMBERS = st.lists(st.tuples(st.integers(0, 5), st.lists(st.booleans(), min_size=1, max_size=20)))


def places_seen(batch: MicroBatch) -> list[list[int]]:
    """What each place sees: its segment's, but for those of the segment's own that come after it."""
    seen, first = [], 0
    for own, length in zip(batch.lengths_S, batch.seen_lengths_S, strict=True):
        places = batch.seen_J[first : first + length].tolist()
        seen += [places[: length - own + 1 + place] for place in range(own)]
        first += length
    return seen


@settings(deadline=None, max_examples=60)
@given(groups=st.lists(MEMBERS, max_size=5), budget=st.integers(1, 80))
def test_every_sampled_token_is_predicted_once_from_its_own_past(groups, budget) -> None:
    """For any groups: what a sampled token's place can see is exactly its sample's tokens before it, in order."""
    units, expected = [], []
    for group in groups:
        unit = []
        for number, (seed, flags) in enumerate(group):
            ids = np.random.default_rng(seed).integers(0, 3, len(flags) + 1)
            unit.append(conversation(ids, [False, *flags]))
            expected += [
                (*ids[:place].tolist(), int(ids[place]))
                for place in np.flatnonzero(unit[number].mask_T)
            ]
        units.append(unit)
    longest = max((len(past) - 1 for past in expected), default=0)
    found: dict[int, tuple[int, ...]] = {}
    for batch in pack(units, budget):
        assert len(batch.ids_P) <= max(budget, longest)
        seen = places_seen(batch)
        assert [places[-1] for places in seen] == list(range(len(batch.ids_P)))
        for source, target, token in zip(
            batch.sources_K, batch.targets_K, batch.tokens_K, strict=True
        ):
            places = seen[source]
            assert batch.positions_P[places].tolist() == list(range(len(places)))
            assert int(token) not in found
            found[int(token)] = (*batch.ids_P[places].tolist(), int(target))
    assert [found[token] for token in range(len(expected))] == expected
    assert len(found) == len(expected)
