"""A result's images among the policy's tokens: once, in order, and never twice."""

import io
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import safetensors.torch
import torch
from transformers import AutoProcessor

from actors.actor import HopFailed
from actors.pictures import Pictures
from engines.chat import Chat
from engines.images import Processor
from schemas.events import Result
from schemas.images import SEEING_MODELS, StoredImage
from schemas.names import find
from schemas.task import ChatMessage
from schemas.tokens import Tokens
from tools.tool import Image

SEEING = str(Path(__file__).parents[1] / "seeing")
picture: Callable[..., bytes] = find("seeing:picture", SEEING)

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = tmp_path_factory.mktemp("llava")
    find("seeing:model", SEEING)(folder)
    return Processor(folder)


@pytest.fixture
def pictures(processor: Processor) -> Pictures:
    async def load(stored: StoredImage) -> Image:
        data = b"broken" if stored.sha256 == "broken" else picture(stored.sha256)
        return Image(data=data, media_type="image/png")

    return Pictures(processor, load)


def stored(*colours: str) -> list[StoredImage]:
    return [
        StoredImage(sha256=name, media_type="image/png", size_bytes=1, width=8, height=8)
        for name in colours
    ]


def result(text: str, *colours: str) -> Result:
    return Result(trajectory="g0-0-0", turn=0, call=0, text=text, images=stored(*colours))


async def test_a_result_as_the_policy_sees_it(pictures: Pictures, processor: Processor) -> None:
    """An image stands at its placeholder, or after the text; other placeholders are words."""
    ids = processor.process(picture("red")).ids
    assert await pictures.content(result("no image: <image>")) == "no image: <image>"
    assert await pictures.content(result("a <image> b <image>", "red")) == [
        "a ",
        ids,
        " b <image>",
    ]
    assert await pictures.content(result("a <image> b", "red", "blue")) == ["a ", ids, " b", ids]


async def test_images_find_their_places(pictures: Pictures, processor: Processor) -> None:
    """Given tokens alone stand for images; what the policy has not seen yet has no place."""
    ids, image = processor.process(picture("red")).ids, processor.token_id
    tokens = (
        Tokens.given([7])
        + Tokens.sampled([image, 8], [-1.0, -1.0], [0, 0])
        + Tokens.given([9, *ids, 9, *ids])
        + Tokens.sampled([8], [-1.0], [0])
    )
    red, blue = await pictures.inputs(stored("red", "blue", "green"), tokens)
    assert [tokens.ids_T[at] for at in (*red.places, *blue.places)] == [image] * 2 * len(ids)
    assert not any(tokens.mask[at] for at in (*red.places, *blue.places))
    assert red.places[-1] < blue.places[0]
    assert red.pixels != blue.pixels
    with pytest.raises(HopFailed, match="image_in_messages"):
        await pictures.inputs(stored("red"), tokens)


async def test_what_cannot_be_seen_is_named(pictures: Pictures, processor: Processor) -> None:
    """A broken picture fails the trajectory, as does a prompt with more or fewer images than its messages have."""
    with pytest.raises(HopFailed, match="bad_image"):
        await pictures.content(result("<image>", "broken"))
    for ids, images in (([70, processor.token_id], []), ([70], stored("red"))):
        with pytest.raises(HopFailed, match=r"public\.messages have \d images, and the prompt \d"):
            await pictures.prompt(ids, images)


IN_PARTS = (
    "{% for message in messages %}<|{{ message.role }}|>{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("kind", SEEING_MODELS)
@pytest.mark.parametrize("in_parts", [True, False], ids=["parts", "text"])
async def test_a_prompt_is_as_the_processor_writes_it(
    tmp_path: Path, kind: str, in_parts: bool
) -> None:
    """The tokens and the pixels that it makes of the messages and their images, whatever the chat template reads."""
    find("seeing:model", SEEING)(tmp_path, kind)
    if in_parts:
        (tmp_path / "chat_template.jinja").write_text(IN_PARTS)
    text, look = {"type": "text", "text": "Which?"}, {"type": "image"}
    theirs = AutoProcessor.from_pretrained(tmp_path)
    contents = [[look, text, look], [text]] if in_parts else ["<image>Which?<image>", "Which?"]
    messages = [{"role": "user", "content": content} for content in contents]
    images = [PIL.Image.open(io.BytesIO(picture(*each))) for each in (("red", 20, 9), ("blue",))]
    made = theirs(
        text=theirs.apply_chat_template(messages, add_generation_prompt=True),
        images=images,
        add_special_tokens=False,
        return_tensors="pt",
    )

    async def load(stored: StoredImage) -> Image:
        size = (20, 9) if stored.sha256 == "red" else (8, 8)
        return Image(data=picture(stored.sha256, *size), media_type="image/png")

    shown = stored("red", "blue")
    asked = ChatMessage(role="user", content="<image>Which?<image>", images=shown)
    pictures = Pictures(Processor(tmp_path), load)
    plain = Chat(tmp_path).prompt_ids([asked, ChatMessage(role="user", content="Which?")])
    ids = await pictures.prompt(plain, shown)
    assert ids == made["input_ids"][0].tolist()
    inputs = await pictures.inputs(shown, Tokens.given(ids))
    seen = [safetensors.torch.load(each.pixels)["pixel_values"].flatten() for each in inputs]
    assert torch.equal(torch.cat(seen), made["pixel_values"].flatten())
