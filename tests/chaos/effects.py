"""A tool that acts on the world, and kills its toolbox while it does: before it has acted, and after."""

import os
import signal
from pathlib import Path

from tools.function import tool
from tools.tool import Context

FOLDER_VARIABLE = "CHAOS_EFFECTS"
KILLS = 2
"""Of each kind."""


def script(text: str, seed: int) -> str:
    """One call, with a text that no other trajectory has, then an answer."""
    return "1" if "</post>" in text else f"<post>{seed % 10**9}</post>"


@tool(effects="external")
async def post(_context: Context, text: str) -> str:
    """Send a letter; it cannot be taken back."""
    _die_sometimes("before")
    _write(text)
    _die_sometimes("after")
    return "sent"


def _write(letter: str) -> None:
    with Path(os.environ[FOLDER_VARIABLE], "letters").open("a") as file:
        file.write(f"{letter}\n")


def _die_sometimes(when: str) -> None:
    for number in range(KILLS):
        try:
            Path(os.environ[FOLDER_VARIABLE], f"{when}.{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)
