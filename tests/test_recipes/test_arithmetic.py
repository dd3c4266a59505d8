"""The arithmetic recipe: its rows, its demonstrations, its model."""

import re
from itertools import islice
from pathlib import Path

import msgspec
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import arithmetic
from schemas.recipe import Recipe
from schemas.task import ChatMessage

FOLDER = Path(arithmetic.__file__).parent


def operands(question: str) -> tuple[int, int]:
    match = re.fullmatch(r"What is (\d\d) \* (\d\d)\?", question)
    assert match, question
    return int(match[1]), int(match[2])


def is_right(conversation: list[ChatMessage]) -> bool:
    a, b = operands(conversation[0].content)
    return conversation[-1].content == str(a * b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    arithmetic.model(folder)
    return folder


def test_rows_ask_for_a_product_and_hide_it() -> None:
    """The public part holds the question alone, the private part the product, and each problem has its own id."""
    rows = list(islice(arithmetic.rows(0), 2000))
    for row in rows:
        assert [message.role for message in row.public.messages] == ["user"]
        a, b = operands(row.public.messages[0].content)
        assert row.private == {"answer": str(a * b)}
    assert (
        len({row.id for row in rows}) == len({r.public.messages[0].content for r in rows}) == 2000
    )


def test_rows_never_end_and_repeat_only_after_all_have_come() -> None:
    """An epoch holds every training problem once; the next has another order."""
    pairs = sum(
        not arithmetic.is_held_out(a, b) for a in arithmetic.OPERANDS for b in arithmetic.OPERANDS
    )
    ids = [row.id for row in islice(arithmetic.rows(0), 2 * pairs)]
    assert len(set(ids[:pairs])) == pairs
    assert sorted(ids[:pairs]) == sorted(ids[pairs:])
    assert ids[:pairs] != ids[pairs:]


def test_held_out_problems_are_in_no_other_place() -> None:
    """Neither rows nor demonstrations ask for a held-out product, in either order of its operands."""
    held_out = {frozenset(operands(r.public.messages[0].content)) for r in arithmetic.held_out(0)}
    trained = {r.public.messages[0].content for r in islice(arithmetic.rows(0), 10_000)}
    shown = {c[0].content for c in islice(arithmetic.demonstrations(0), 10_000)}
    assert len(held_out) > 128
    assert held_out.isdisjoint(frozenset(operands(question)) for question in trained | shown)


@pytest.mark.parametrize("function", ["rows", "held_out", "demonstrations"])
def test_the_seed_decides_everything(function: str) -> None:
    """The same seed gives the same sequence, another seed another."""
    make = getattr(arithmetic, function)
    first, again, other = (list(islice(make(seed), 50)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_demonstrations_are_careless_but_show_every_skill() -> None:
    """Between a seventh and a third answer rightly; all that do have asked Python for the product."""
    conversations = list(islice(arithmetic.demonstrations(0), 3000))
    right = [conversation for conversation in conversations if is_right(conversation)]
    assert 3000 / 7 < len(right) < 3000 / 3
    for conversation in right:
        question, call, result, answer = conversation
        a, b = operands(question.content)
        assert call.content == f"<python>{a}*{b}</python>"
        assert (result.role, result.content) == ("tool", answer.content)


def test_demonstrations_err_in_several_ways() -> None:
    """Guesses without the tool, sums instead of products, and results copied wrongly all occur."""
    conversations = list(islice(arithmetic.demonstrations(0), 1000))
    called = [conversation for conversation in conversations if len(conversation) == 4]
    assert any(len(conversation) == 2 for conversation in conversations)
    assert any("+" in conversation[1].content for conversation in called)
    assert any(conversation[2].content != conversation[3].content for conversation in called)


def test_tool_results_are_what_python_says() -> None:
    """A demonstrated result is the value of the demonstrated expression."""
    for conversation in islice(arithmetic.demonstrations(0), 1000):
        if len(conversation) == 4:
            code = conversation[1].content.removeprefix("<python>").removesuffix("</python>")
            assert str(eval(code)) == conversation[2].content


def test_the_model_is_an_ordinary_folder(folder: Path) -> None:
    """transformers opens it without knowing of us: about a million parameters, an embedding for each token."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 0.5e6 < model.num_parameters() < 1.5e6
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert (folder / "model.safetensors").exists()


def test_the_model_is_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    """Two calls write the same bytes, whatever the state of torch's generator."""
    arithmetic.model(tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_conversation_survives_the_tokenizer_in_few_tokens(folder: Path) -> None:
    """Every demonstration decodes to the text it came from, in at most 30 tokens, ten of them the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for conversation in islice(arithmetic.demonstrations(0), 200):
        chat = [msgspec.to_builtins(message) for message in conversation]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) <= 30
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        assert ids[: len(tokenizer.encode(prompt))] == tokenizer.encode(prompt)
        assert len(tokenizer.encode(prompt)) == 10


@pytest.mark.parametrize("text", ["SyntaxError: invalid syntax", "naïve ≠ 12\n\t<b>", "  a  b "])
def test_any_text_survives_the_tokenizer(folder: Path, text: str) -> None:
    """What a tool may say is in no vocabulary; bytes are."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tags_and_marks_are_single_tokens(folder: Path) -> None:
    """Tags are text that decoding keeps; marks of the template are special, and decoding can leave them out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("<|assistant|><python>47*86</python><|end|>")
    assert len(ids) == 9
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<python>47*86</python>"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("arithmetic*.toml")), ids=lambda p: p.name)
def test_recipes_are_valid(path: Path) -> None:
    """Each file is a schemas.Recipe without unknown keys; what it names exists."""
    recipe = msgspec.toml.decode(path.read_bytes(), type=Recipe)
    names = [
        recipe.policy.model,
        recipe.data.rows,
        recipe.evaluation.rows,
        recipe.cold_start.demonstrations,
    ]
    for name in filter(None, names):
        module, _, function = name.partition(":")
        assert (FOLDER.parent / f"{module.replace('.', '/')}.py").exists()
        assert callable(getattr(__import__(module, fromlist=[function]), function))
