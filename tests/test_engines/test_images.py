"""An engine that sees: the images of a turn are its own, and its log-probabilities are the model's."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForImageTextToText

from engines.chat import Chat
from engines.engine import Sample, SampleRequest
from engines.errors import EngineError
from engines.images import Processor, open_processor
from engines.transformers_engine import TransformersEngine
from schemas.images import SEEING_MODELS, ImageInput
from schemas.names import find
from schemas.task import ChatMessage

SEEING = str(Path(__file__).parents[1] / "seeing")
picture: Callable[..., bytes] = find("seeing:picture", SEEING)

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module", params=SEEING_MODELS)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    find("seeing:model", SEEING)(made, request.param)
    return made


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[TransformersEngine]:
    opened = TransformersEngine.open(folder, dtype="float32", slots=4, threads=1, device="cpu")
    yield opened
    await opened.close()


def request_of(
    folder: Path, *parts: list[int] | bytes, seed: int = 0, key: str = ""
) -> SampleRequest:
    """Tokens and pictures as one prompt."""
    processor = Processor(folder)
    ids: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, bytes):
            image = processor.process(part)
            places = [
                len(ids) + at for at, id_ in enumerate(image.ids) if id_ == processor.token_id
            ]
            images.append(ImageInput(places=places, pixels=image.pixels))
            ids += image.ids
        else:
            ids += part
    return SampleRequest(ids=ids, images=images, max_tokens=4, seed=seed, cache_key=key)


def own_logprobs(folder: Path, request: SampleRequest, sample: Sample) -> torch.Tensor:
    """What the model's own forward pass says of the sampled tokens [N]."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ids_T = torch.tensor([*request.ids, *sample.ids])
    embedded_TC = model.get_input_embeddings()(ids_T)
    for image in request.images:
        found = model.model.get_image_features(**load(image.pixels)).pooler_output
        embedded_TC[image.places] = torch.cat(list(found))
    logprobs_TV = model(inputs_embeds=embedded_TC[None]).logits[0].log_softmax(-1)
    return logprobs_TV[len(request.ids) - 1 : -1].gather(1, ids_T[len(request.ids) :, None])[:, 0]


async def test_sampled_as_the_model_says(engine: TransformersEngine, folder: Path) -> None:
    """Turns that differ in a picture alone are sampled together, each by its own."""
    requests = [
        request_of(folder, [70, 71], picture(colour, 20, 12), [72, 73], seed=seed)
        for colour, seed in (("red", 0), ("blue", 0), ("red", 1), ("red", 0))
    ]
    samples = await asyncio.gather(*map(engine.sample, requests))
    for request, sample in zip(requests, samples, strict=True):
        expected_N = own_logprobs(folder, request, sample)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected_N, rtol=1e-3, atol=1e-4)
    assert samples[0].ids == samples[3].ids
    assert abs(samples[0].logprobs[0] - samples[1].logprobs[0]) > 1e-3


async def test_a_trajectory_goes_on(engine: TransformersEngine, folder: Path) -> None:
    """Its next turn begins with what is kept of the last, and shows one more picture."""
    parts: list[list[int] | bytes] = [[70, 71], picture("red"), [72]]
    first = await engine.sample(request_of(folder, *parts, key="g0-0-0"))
    parts += [first.ids, picture("blue", 30, 10), [73]]
    again = request_of(folder, *parts, seed=1, key="g0-0-0")
    second = await engine.sample(again)
    expected_N = own_logprobs(folder, again, second)
    torch.testing.assert_close(torch.tensor(second.logprobs), expected_N, rtol=1e-3, atol=1e-4)


async def test_an_observation_is_tokenised_with_its_images(folder: Path) -> None:
    """As the processor would tokenise the whole; a placeholder spelled out in a text is words."""
    chat, processor = Chat(folder), Processor(folder)
    image = processor.process(picture("red"))
    ids = chat.observation_ids([["Image 2:\n", image.ids, " <image> "]], "tool", ended=False)
    assert ids.count(processor.token_id) == image.ids.count(processor.token_id)
    assert chat._tokenizer.decode(ids) == (
        f"<|end|><|tool|>Image 2:\n{chat._tokenizer.decode(image.ids)} <image><|end|><|assistant|>"
    )
    whole = chat.observation_ids([["Image 2:\n", image.ids]], "tool", ended=False)
    text = chat._tokenizer.decode(whole)
    assert whole == chat._tokenizer.encode(text, add_special_tokens=False)


async def test_a_template_that_reads_parts(folder: Path, tmp_path: Path) -> None:
    """Its texts are given to it as lists of parts, and come out the same."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    content = "message.content | trim"
    template = (tmp_path / "chat_template.jinja").read_text()
    assert content in template
    parts = "message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join"
    (tmp_path / "chat_template.jinja").write_text(template.replace(content, f"({parts}) | trim"))
    chats = [Chat(folder), Chat(tmp_path)]
    messages = [ChatMessage(role="system", content="Look."), ChatMessage(role="user", content="?")]
    plain, in_parts = (chat.prompt_ids(messages) for chat in chats)
    assert plain == in_parts
    plain, in_parts = (chat.observation_ids([["a", [77]]], "tool", ended=True) for chat in chats)
    assert plain == in_parts


async def test_no_picture(engine: TransformersEngine, folder: Path, make_folder: Any) -> None:
    """A broken file is named; a model that sees nothing takes no image, and has no processor."""
    with pytest.raises(EngineError, match="bad_image"):
        Processor(folder).process(b"no picture")
    blind = make_folder("llama")
    assert open_processor(blind) is None
    request = request_of(folder, [70], picture("red"), [71])
    opened = TransformersEngine.open(blind, dtype="float32", slots=4, threads=1, device="cpu")
    with pytest.raises(EngineError, match="bad_request"):
        await opened.sample(request)
    await opened.close()
