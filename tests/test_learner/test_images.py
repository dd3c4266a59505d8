"""Images among the tokens: the learner sees what the model itself sees, and the gradient reaches the vision tower."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.images import Processor
from learner.errors import UnsupportedModel
from learner.logprobs import sampled_logprobs
from learner.models import load_model
from learner.pack import pack
from learner.policy import Policy
from learner.samples import Sample, batch_sha256
from schemas import algorithm, recipe
from schemas.images import SEEING_MODELS, ImageInput
from schemas.names import find

SEEING = str(Path(__file__).parents[1] / "seeing")
picture: Callable[..., bytes] = find("seeing:picture", SEEING)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind in SEEING_MODELS:
        made[kind] = tmp_path_factory.mktemp(kind)
        find("seeing:model", SEEING)(made[kind], kind)
    return made


def samples(folder: Path, prompt_image: bool = False) -> list[list[Sample]]:
    """Two groups of three: a prompt, a sampled turn, an image of another shape for each member, a sampled turn.

    A sampled token of the first turn is the image's own, which the policy may write: it shows nothing.
    """
    processor, random = Processor(folder), np.random.default_rng(0)
    groups = []
    for group in range(2):
        prompt = random.integers(60, 200, 5).tolist()
        members = []
        for member in range(3):
            colour = ("red", "blue", "green")[member]
            shapes = [(8, 8), (20, 8 + 8 * member)][: 1 + group]
            seen = [processor.process(picture(colour, *shape)) for shape in shapes]
            if prompt_image:
                seen[0] = processor.process(picture("yellow" if member < 2 else "white"))
            parts = [(prompt, 0), ([processor.token_id, *random.integers(60, 200, 3)], 1)]
            for index, image in enumerate(seen):
                parts.insert(1 if prompt_image and not index else len(parts), (image.ids, 0))
            parts += [(random.integers(60, 200, 2).tolist(), 0), ([70 + member, 81, 82], 1)]
            ids = [int(id_) for part, _ in parts for id_ in part]
            mask = [own for part, own in parts for _ in part]
            places = [
                place
                for place, (id_, own) in enumerate(zip(ids, mask, strict=True))
                if id_ == processor.token_id and not own
            ]
            images = []
            for image in seen:
                count = image.ids.count(processor.token_id)
                images.append(ImageInput(places=places[:count], pixels=image.pixels))
                places = places[count:]
            mask_T = np.array(mask, np.bool_)
            members.append(
                Sample(
                    trajectory=f"g{group}-{member}-0",
                    group=f"g{group}",
                    ids_T=np.array(ids, np.int32),
                    mask_T=mask_T,
                    logprobs_T=np.where(mask_T, -6.0, 0.0).astype(np.float32),
                    versions_T=np.where(mask_T, 0, -1).astype(np.int32),
                    reward=float(member % 2),
                    images=tuple(images),
                )
            )
        groups.append(members)
    return groups


def one_by_one(model: Any, folder: Path, groups: list[list[Sample]]) -> torch.Tensor:
    """Log-probabilities [N] of the model's own forward pass with its own merging of images, sample by sample.

    Its own takes every token of an image for an image, so that a sampled one is given by its neighbour's name.
    """
    from safetensors.torch import load

    token_id, found = Processor(folder).token_id, []
    for sample in (sample for group in groups for sample in group):
        ids_T = torch.from_numpy(sample.ids_T).long()
        features = [
            torch.cat(list(model.model.get_image_features(**load(image.pixels)).pooler_output))
            for image in sample.images
        ]
        embedded_TC = model.get_input_embeddings()(ids_T)
        at_T = (ids_T == token_id) & ~torch.from_numpy(sample.mask_T)
        embedded_TC = embedded_TC.masked_scatter(at_T[:, None], torch.cat(features))
        logits_TV = model(inputs_embeds=embedded_TC[None]).logits[0]
        all_T = logits_TV[:-1].log_softmax(-1).gather(1, ids_T[1:, None]).squeeze(1)
        found.append(all_T[torch.from_numpy(sample.mask_T[1:])])
    return torch.cat(found)


def weighted_gradient(model: Any, logprobs_N: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logprobs_N * torch.cos(torch.arange(len(logprobs_N)))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", SEEING_MODELS)
@pytest.mark.parametrize("prompt_image", [False, True], ids=["observed", "in the prompt"])
@pytest.mark.parametrize("budget", [24, 4096])
def test_packed_equals_one_by_one(
    folders: dict[str, Path], kind: str, prompt_image: bool, budget: int
) -> None:
    """Log-probabilities and all gradients; members share a prompt only up to an image that differs."""
    model, groups = load_model(folders[kind]).eval(), samples(folders[kind], prompt_image)
    expected_N = one_by_one(model, folders[kind], groups)
    expected = weighted_gradient(model, expected_N)
    logprobs_N = torch.zeros(len(expected_N))
    for batch in pack(groups, budget):
        now_K = sampled_logprobs(model, batch, 1.0, torch.float32).logprobs_K
        logprobs_N = logprobs_N.index_put((torch.from_numpy(batch.tokens_K),), now_K)
    torch.testing.assert_close(logprobs_N, expected_N, rtol=1e-4, atol=1e-5)
    found = weighted_gradient(model, logprobs_N)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


def test_the_model_itself_agrees(folders: dict[str, Path]) -> None:
    """Where no image's token was sampled, the model's own forward pass of tokens and pixels says the same."""
    from safetensors.torch import load

    model, token_id = load_model(folders["llava"]).eval(), Processor(folders["llava"]).token_id
    (sample, *_), _ = samples(folders["llava"])
    ids_T = sample.ids_T.copy()
    ids_T[sample.mask_T & (ids_T == token_id)] = 99
    sample = Sample(**{name: getattr(sample, name) for name in sample.__slots__} | {"ids_T": ids_T})
    (batch,) = pack([[sample]], 4096)
    ours_K = sampled_logprobs(model, batch, 1.0, torch.float32).logprobs_K
    tensor_T = torch.from_numpy(ids_T).long()
    logits_TV = model(input_ids=tensor_T[None], **load(sample.images[0].pixels)).logits[0]
    all_T = logits_TV[:-1].log_softmax(-1).gather(1, tensor_T[1:, None]).squeeze(1)
    torch.testing.assert_close(ours_K, all_T[torch.from_numpy(sample.mask_T[1:])])


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "adapters"])
def test_a_step_trains_what_sees(folders: dict[str, Path], tmp_path: Path, rank: int) -> None:
    """The projector and the vision tower move; the trained model is a folder that loads again and says the same."""
    config = recipe.Recipe(
        policy=recipe.Policy(model=str(folders["llava"]), max_tokens=256),
        learner=recipe.Learner(
            learning_rate=1e-2,
            gradient_checkpointing=True,
            lora=recipe.Lora(rank=rank),
            correction=algorithm.Correction(token="none", sequence="none"),
        ),
    )
    policy = Policy.open(folders["llava"], config)
    groups = samples(folders["llava"])
    before = {name: tensor.clone() for name, tensor in policy._state().items()}
    row = policy.train_step(groups, 1)
    policy.train_step(groups, 2)  # adapters' B begins at 0, and with it the gradient of A
    assert row["train_tokens"] == sum(sample.sampled_count for group in groups for sample in group)
    moved = {name for name, tensor in policy._state().items() if not tensor.equal(before[name])}
    assert any("vision_tower" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved)
    policy.export(tmp_path / "out")
    again = load_model(tmp_path / "out").eval()
    (batch,) = pack(groups, 4096)
    with torch.no_grad():
        ours_K = sampled_logprobs(policy.model, batch, 1.0, torch.float32).logprobs_K
        theirs_K = sampled_logprobs(again, batch, 1.0, torch.float32).logprobs_K
    torch.testing.assert_close(ours_K, theirs_K, rtol=1e-4, atol=1e-5)


def test_a_batch_hash_knows_its_images(folders: dict[str, Path]) -> None:
    """Two batches of the same tokens and other pictures differ."""
    (sample, other, _), _ = samples(folders["llava"])
    values = {name: getattr(sample, name) for name in sample.__slots__}
    swapped = Sample(**values | {"images": other.images})
    assert batch_sha256([[sample]]) != batch_sha256([[swapped]])
    assert batch_sha256([[sample]]) == batch_sha256([[Sample(**values)]])


def test_other_models_that_see_are_refused_by_name(tmp_path: Path) -> None:
    """Positions of Qwen2-VL's images are of three dimensions: one line says which models there are."""
    from transformers import Qwen2VLConfig

    Qwen2VLConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"type qwen2_vl.*: llava, idefics3$"):
        load_model(tmp_path)
