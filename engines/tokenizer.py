"""What the engines need of a Hugging Face folder beside its weights."""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer, GenerationConfig


class Vocabulary(NamedTuple):
    """A tokenizer and the tokens that end a turn."""

    tokenizer: Any
    end_ids: frozenset[int]


def open_vocabulary(folder: Path) -> Vocabulary:
    """Read a folder's tokenizer. A turn ends with its end token or generation_config.json's; else config.json's."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = _ids(tokenizer.eos_token_id)
    if (folder / "generation_config.json").exists():
        ends |= _ids(GenerationConfig.from_pretrained(folder).eos_token_id)
    if not ends:
        ends = _ids(AutoConfig.from_pretrained(folder).eos_token_id)
    return Vocabulary(tokenizer, ends)


def _ids(given: int | list[int] | None) -> frozenset[int]:
    if given is None:
        return frozenset()
    return frozenset({given} if isinstance(given, int) else given)
