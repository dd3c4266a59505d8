"""Models beside the policy: the value head, a reference, a teacher; and several updates in a step."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from learner.checkpoints import write_folder
from learner.errors import BadCheckpoint, LearnerError, UnsupportedModel
from learner.logprobs import hidden_states
from learner.models import ValueHead, recompute_layers
from learner.pack import pack
from learner.policy import Policy
from schemas import recipe


def with_learner(config: recipe.Recipe, **keys) -> recipe.Recipe:
    tables = msgspec.to_builtins(config)
    for name, value in keys.items():
        if isinstance(value, dict):
            tables["learner"][name] |= value
        else:
            tables["learner"][name] = value
    return msgspec.convert(tables, recipe.Recipe)


# -- values ----------------------------------------------------------------------------------------


def gae(config: recipe.Recipe) -> recipe.Recipe:
    advantage = {"estimator": "gae", "value_learning_rate": 0.05}
    return with_learner(config, advantage=advantage, learning_rate=1e-9)


def test_values_of_an_untrained_head_are_zero() -> None:
    """So that the first advantages are the returns."""
    assert ValueHead(4)(torch.randn(3, 4)).tolist() == [0, 0, 0]


def test_the_value_head_learns_the_returns(folder: Path, config, make_groups) -> None:
    """With the policy standing still its error falls below that of the best constant, half of the returns' variance.

    The weights that leave do not contain it.
    """
    policy = Policy.open(folder, gae(config))
    losses = [policy.train_step(make_groups(), step)["value_loss"] for step in range(1, 41)]
    rewards = [s.reward for group in make_groups() for s in group for _ in range(s.sampled_count)]
    assert losses[0] == pytest.approx(np.mean(rewards) / 2, rel=1e-4)  # values 0, returns 0 or 1
    assert losses[-1] < 0.9 * np.var(rewards) / 2
    assert b"value_head" not in policy.weights()


def test_no_gradient_of_the_values_reaches_the_policy(folder: Path, config, make_groups) -> None:
    """With advantages of 0 (all rewards 0, values 0 at first) the policy's gradient is 0 as well."""
    policy = Policy.open(folder, gae(config))
    groups = [[replace(sample, reward=0.0) for sample in group] for group in make_groups()]
    assert policy.train_step(groups, 1)["grad_norm"] == 0


def test_a_checkpoint_holds_the_value_head(
    folder: Path, config, make_groups, tmp_path: Path
) -> None:
    """With its optimizer's moments: the next step is the same to the bit. Without the file it is refused."""
    policy, again = (Policy.open(folder, gae(config)) for _ in range(2))
    policy.train_step(make_groups(), 1)
    write_folder(tmp_path / "step-000001", policy.checkpoint_files(1))
    assert again.load_checkpoint(tmp_path / "step-000001") == 1
    assert again.train_step(make_groups(), 2) == policy.train_step(make_groups(), 2)
    assert again.value_head is not None
    assert policy.value_head is not None
    assert torch.equal(again.value_head.output.weight, policy.value_head.output.weight)
    (tmp_path / "step-000001" / "value_head.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="value_head"):
        again.load_checkpoint(tmp_path / "step-000001")


# -- reference and teacher -------------------------------------------------------------------------


def test_the_divergence_from_oneself_is_zero(folder: Path, config, make_groups) -> None:
    """At version 0 the reference says what the policy says; after a step it does not."""
    policy = Policy.open(folder, with_learner(config, kl={"coefficient": 0.1}))
    policy.hold_reference(folder)
    assert policy.train_step(make_groups(), 1)["kl_reference"] == pytest.approx(0, abs=1e-6)
    assert policy.train_step(make_groups(), 2)["kl_reference"] > 1e-4


def test_a_reference_holds_the_policy_back(folder: Path, config, make_groups) -> None:
    """The same steps with a heavy weight end nearer to it."""
    ends = []
    for coefficient in (1e-9, 3.0):
        policy = Policy.open(folder, with_learner(config, kl={"coefficient": coefficient}))
        policy.hold_reference(folder)
        ends.append([policy.train_step(make_groups(), s)["kl_reference"] for s in range(1, 9)][-1])
    assert ends[1] < ends[0] / 2


def test_distillation_brings_the_teacher_nearer(
    folder: Path, config, make_groups, tmp_path: Path
) -> None:
    """On-policy, without rewards: the mean of log(teacher) - log(policy) on the policy's own tokens falls.

    The teacher is the policy with other weights in its first layer; the data are drawn anew from the policy.
    """
    base = Policy.open(folder, config)
    with torch.no_grad():
        base.model.model.layers[0].mlp.down_proj.weight.mul_(-1.0)
    base.export(tmp_path / "teacher")
    keys = {
        "teacher": {"folder": "teacher"},
        "advantage": {"estimator": "none"},
        "loss": {"method": "reinforce"},
        "filter": {"zero_variance": False},
    }
    policy = Policy.open(folder, with_learner(config, **keys))
    policy.hold_teacher(tmp_path / "teacher")
    gaps = []
    for step in range(1, 26):
        groups, gap = _drawn(policy, base, make_groups(), step)
        gaps.append(gap)
        policy.train_step(groups, step)
    assert np.mean(gaps[-4:]) < 0.8 * np.mean(gaps[:4])


def _drawn(policy: Policy, teacher: Policy, groups, seed: int):
    """Completions of the groups' prompts sampled from the policy, and their mean reverse KL from the teacher."""
    generator = torch.Generator().manual_seed(seed)
    drawn, gaps = [], []
    for group in groups:
        prompt = group[0].ids_T[: group[0].prompt_length]
        ids_BT = torch.from_numpy(np.tile(prompt, (8, 1))).long()
        logprobs = torch.zeros(ids_BT.shape)
        with torch.no_grad():
            for _ in range(8):
                logits_BV = policy.model(input_ids=ids_BT).logits[:, -1].log_softmax(-1)
                next_B1 = torch.multinomial(logits_BV.exp(), 1, generator=generator)
                ids_BT = torch.cat([ids_BT, next_B1], 1)
                logprobs = torch.cat([logprobs, logits_BV.gather(1, next_B1)], 1)
            taught = teacher.model(input_ids=ids_BT).logits[:, :-1].log_softmax(-1)
            taught = taught.gather(2, ids_BT[:, 1:, None]).squeeze(2)
        gaps.append((logprobs[:, 1:] - taught)[:, len(prompt) - 1 :].mean().item())
        drawn.append(
            [
                replace(
                    group[0],
                    ids_T=ids_T.numpy().astype(np.int32),
                    mask_T=np.arange(len(ids_T)) >= len(prompt),
                    logprobs_T=logprobs_T.numpy(),
                    versions_T=np.where(np.arange(len(ids_T)) >= len(prompt), seed - 1, -1),
                )
                for ids_T, logprobs_T in zip(ids_BT, logprobs, strict=True)
            ]
        )
    return drawn, float(np.mean(gaps))


def test_a_missing_model_is_named(folder: Path, config, make_groups) -> None:
    """Before anything is computed."""
    policy = Policy.open(folder, with_learner(config, kl={"coefficient": 0.1}))
    with pytest.raises(LearnerError, match="needs a reference: call hold_reference"):
        policy.train_step(make_groups(), 1)


def test_another_vocabulary_is_refused(folder: Path, config, tmp_path: Path) -> None:
    """Its log-probabilities would be of other tokens."""
    small = LlamaConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    LlamaForCausalLM(small).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="its vocabulary has 100 tokens, the policy's 300"):
        Policy.open(folder, config).hold_teacher(tmp_path)


# -- layers computed again ----------------------------------------------------------------------


def kept_bytes(policy: Policy, groups) -> int:
    """What a forward pass keeps for the backward pass, weights not counted."""
    weights = {parameter.data_ptr() for parameter in policy.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    (batch,) = pack(groups, 4096)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = hidden_states(policy.model, batch, torch.float32)
    assert hidden.requires_grad
    return sum(kept.values())


def test_layers_computed_again_are_the_same(folder: Path, config, make_groups) -> None:
    """With gradient checkpointing a step gives the same row and weights to the bit, and keeps far less."""
    policies = [
        Policy.open(folder, with_learner(config, gradient_checkpointing=again))
        for again in (False, True)
    ]
    rows = [policy.train_step(make_groups(), 1) for policy in policies]
    assert rows[0] == rows[1]
    assert policies[0].weights() == policies[1].weights()
    plain, again = (kept_bytes(policy, make_groups()) for policy in policies)
    assert again < plain / 4


def test_dropout_stays_off_where_layers_are_computed_again() -> None:
    """A model that would drop in training is asked as it is."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5
    )
    model = GPT2LMHeadModel(config).eval()
    ids = torch.arange(8).unsqueeze(0)
    expected = model(ids).logits
    recompute_layers(model)
    assert torch.equal(model(ids).logits, expected)


def test_dropout_stays_off_in_layers_that_drop_by_themselves() -> None:
    """Not by modules of theirs but by functions, as OPT's do."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, max_position_embeddings=64, hidden_size=16, num_hidden_layers=2, ffn_dim=32,
        num_attention_heads=2, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    ids = torch.arange(8).unsqueeze(0)
    expected = model(ids).logits
    recompute_layers(model)
    assert torch.equal(model(ids).logits, expected)


# -- several updates -------------------------------------------------------------------------------


def test_updates_share_the_batch(folder: Path, config, make_groups) -> None:
    """Three groups in two updates: all tokens once, and the optimizer moves twice; never more often than groups."""
    whole = Policy.open(folder, config).train_step(make_groups(), 1)["train_tokens"]
    for updates, moves in ((2, 2), (3, 3), (9, 3)):
        policy = Policy.open(folder, with_learner(config, updates_per_step=updates))
        row = policy.train_step(make_groups(), 1)
        assert row["train_tokens"] == whole
        assert {state["step"].item() for state in policy.optimizer.state.values()} == {moves}


def test_the_proximal_policy_is_the_one_before_the_first_update(
    folder: Path, config, make_groups
) -> None:
    """In the second update its ratio is no longer 1: some tokens are clipped, in the first none."""
    keys = {"correction": {"proximal": "start"}, "learning_rate": 0.02, "updates_per_step": 2}
    policy = Policy.open(folder, with_learner(config, **keys))
    clipped = []
    policy._update, update = (
        lambda *part: clipped.append(update(*part)) or clipped[-1],
        policy._update,
    )
    policy.train_step(make_groups(), 1)
    assert clipped[0]["clip_fraction"] == 0
    assert clipped[1]["clip_fraction"] > 0
