"""Adapters: what is trained, kept and published is they alone, and merged they are the same policy."""

import hashlib
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

from learner.checkpoints import write_folder
from learner.errors import BadCheckpoint, UnsupportedModel
from learner.policy import Policy
from schemas.algorithm import Kl
from schemas.recipe import Lora, Recipe

RANK = 2


def with_learner(config: Recipe, **changes) -> Recipe:
    return replace(config, learner=replace(config.learner, **changes))


@pytest.fixture
def lora(config: Recipe) -> Recipe:
    return with_learner(config, lora=Lora(rank=RANK, alpha=8.0), learning_rate=1e-2)


def sha(policy: Policy) -> str:
    return hashlib.sha256(policy.weights()).hexdigest()


def logprobs(model, sample) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(sample.ids_T).long()[None]).logits.log_softmax(-1)


def test_fresh_adapters_change_nothing(folder: Path, lora: Recipe, make_groups) -> None:
    """Version 0 with adapters is the model itself."""
    sample = make_groups()[0][0]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logprobs(Policy.open(folder, lora).model, sample), logprobs(plain, sample))


def test_only_adapters_learn(folder: Path, lora: Recipe, make_groups) -> None:
    """Steps change them and nothing else; what is published is small and holds two matrices for each linear layer."""
    policy = Policy.open(folder, lora)
    base = policy.adapters.base()
    before = sha(policy)
    for step in (1, 2):
        assert policy.train_step(make_groups(), step)["grad_norm"] > 0
    assert policy.adapters.base() == base
    assert sha(policy) != before
    published = load(policy.weights())
    assert published.pop("scale").item() == 8.0 / RANK
    assert len(published) == 2 * 7 * 2  # two layers of seven
    assert all(".lora_A." in name or ".lora_B." in name for name in published)
    assert len(policy.weights()) < len(base) / 3
    assert len(policy.optimizer.state) == len(published)


def test_merged_equals_unmerged(folder: Path, lora: Recipe, make_groups, tmp_path: Path) -> None:
    """An export is a plain folder whose model gives the log-probabilities that the policy gives."""
    policy = Policy.open(folder, lora)
    groups = make_groups()
    for step in (1, 2, 3):
        policy.train_step(groups, step)
    policy.export(tmp_path / "merged", {"README.md": b"# merged"})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "README.md").read_bytes() == b"# merged"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for sample in groups[0]:
        unmerged = logprobs(policy.model, sample)
        torch.testing.assert_close(logprobs(merged, sample), unmerged, rtol=1e-4, atol=1e-4)
        assert (logprobs(plain, sample) - unmerged).abs().max() > 0.1


def test_a_resumed_policy_is_the_same_to_the_bit(
    folder: Path, lora: Recipe, make_groups, tmp_path: Path
) -> None:
    """A checkpoint holds adapters and their moments alone, and the next steps equal the uninterrupted ones."""
    policy = Policy.open(folder, with_learner(lora, lora=Lora(rank=RANK, dropout=0.5)))
    policy.train_step(make_groups(seed=1), 1)
    path = tmp_path / "step-000001"
    write_folder(path, policy.checkpoint_files(1))
    expected = [policy.train_step(make_groups(seed=step), step) for step in (2, 3)]
    resumed = Policy.open(folder, policy.config)
    assert resumed.load_checkpoint(path) == 1
    assert [resumed.train_step(make_groups(seed=step), step) for step in (2, 3)] == expected
    assert sha(resumed) == sha(policy)
    assert not (path / "model.safetensors").exists()
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        assert all(".lora_" in name for name in load_file(path / file))


def test_adapters_of_another_base_are_refused(
    folder: Path, lora: Recipe, make_groups, tmp_path: Path
) -> None:
    """They would load, and mean nothing."""
    policy = Policy.open(folder, lora)
    write_folder(tmp_path / "step-000000", policy.checkpoint_files(0))
    full = Policy.open(folder, with_learner(lora, lora=Lora()))
    full.train_step(make_groups(), 1)
    full.export(tmp_path / "other")
    other = Policy.open(tmp_path / "other", lora)
    with pytest.raises(BadCheckpoint, match="of other weights than these"):
        other.load_checkpoint(tmp_path / "step-000000")


def test_the_reference_is_the_base(folder: Path, lora: Recipe, make_groups) -> None:
    """Without a model of its own: no divergence at first, then some, as from a second copy of the base."""
    kl = with_learner(lora, kl=Kl(coefficient=0.5))
    policy, twice = Policy.open(folder, kl), Policy.open(folder, kl)
    twice.hold_reference(folder)
    rows = [[each.train_step(make_groups(), step) for step in (1, 2)] for each in (policy, twice)]
    assert rows[0][0]["kl_reference"] == 0 < rows[0][1]["kl_reference"]
    assert rows[0] == rows[1]


def test_dropout_is_of_the_step(folder: Path, lora: Recipe, make_groups) -> None:
    """The same step drops the same inputs, whatever else drew random numbers; without dropout it is another step."""
    config = with_learner(lora, lora=Lora(rank=RANK, dropout=0.5))
    shas = []
    for draws in (0, 5):
        policy = Policy.open(folder, config)
        for step in (1, 2):
            torch.rand(draws)
            policy.train_step(make_groups(), step)
        shas.append(sha(policy))
    plain = Policy.open(folder, with_learner(config, lora=Lora(rank=RANK)))
    for step in (1, 2):
        plain.train_step(make_groups(), step)
    assert shas[0] == shas[1]
    tensors = [plain.adapters.tensors(), policy.adapters.tensors()]
    assert any(not torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_targets(folder: Path, lora: Recipe) -> None:
    """Modules by their names; a name that the model does not have is refused."""
    some = Policy.open(folder, with_learner(lora, lora=Lora(rank=RANK, target=["q_proj"])))
    assert all(".q_proj." in name for name in some.adapters.tensors())
    with pytest.raises(UnsupportedModel, match=r"learner\.lora\.target"):
        Policy.open(folder, with_learner(lora, lora=Lora(rank=RANK, target=["nothing"])))


def test_the_base_is_what_others_hold(folder: Path, lora: Recipe) -> None:
    """In bfloat16 it is rounded before adapters are trained on it, so that its hash is the published one's."""
    config = replace(lora, policy=replace(lora.policy, dtype="bfloat16"))
    policy = Policy.open(folder, config)
    base = load(policy.adapters.base())
    assert {tensor.dtype for tensor in base.values()} == {torch.bfloat16}
    assert hashlib.sha256(policy.adapters.base()).hexdigest() == policy.adapters.base_sha256
    embedded = policy.model.get_input_embeddings().weight
    assert torch.equal(embedded, base["model.embed_tokens.weight"].float())
