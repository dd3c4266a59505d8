"""The engine that a recipe names is the one that is opened."""

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from engines.engine import SampleRequest
from engines.errors import EngineError
from engines.open import open_engine
from engines.scripted import ScriptedEngine
from engines.transformers_engine import TransformersEngine
from schemas.recipe import Generator, Policy

MakeFolder = Callable[..., Path]
POLICY = Policy(model="tiny")


async def test_the_script_is_found_beside_the_recipe(
    make_folder: MakeFolder, tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`module:function`, given the text so far and the seed; its turn ends with the end token."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "oracle_script.py").write_text(
        "def reply(text, seed):\n    return f'{text!r} {seed}'\n"
    )
    config = Generator(engine="scripted", script="oracle_script:reply")
    engine = open_engine(config, POLICY, make_folder("llama"), str(tmp_path))
    assert isinstance(engine, ScriptedEngine)
    sample = await engine.sample(SampleRequest(ids=[67, 68], max_tokens=50, seed=8))
    assert tokenizer.decode(sample.ids) == "'ab' 8<|im_end|>"  # type: ignore[attr-defined]
    assert sample.finish_reason == "stop"
    assert set(sample.logprobs) == {0.0}


@pytest.mark.parametrize("script", ["", "json", "no_such_module:f", "json:no_such_function"])
def test_a_wrong_script_is_named(make_folder: MakeFolder, script: str) -> None:
    """Before anything is sampled."""
    config = Generator(engine="scripted", script=script)
    with pytest.raises(EngineError, match="bad_script"):
        open_engine(config, POLICY, make_folder("llama"), ".")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_vllm_that_is_not_installed_is_said(make_folder: MakeFolder) -> None:
    """With what to install."""
    with pytest.raises(EngineError, match=r"needs vLLM: pip install vllm==0\.32\.0"):
        open_engine(Generator(engine="vllm"), POLICY, make_folder("llama"), ".")


async def test_transformers_is_the_default(make_folder: MakeFolder) -> None:
    """With the recipe's slots and threads."""
    engine = open_engine(Generator(slots=2), POLICY, make_folder("llama"), ".")
    assert isinstance(engine, TransformersEngine)
    assert len((await engine.sample(SampleRequest(ids=[5], max_tokens=1))).ids) == 1
    await engine.close()


def test_naming_an_engine_does_not_import_torch() -> None:
    """So that the command line starts fast."""
    code = "import sys, engines.open, engines.engine, engines.errors; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
