"""A whole run whose agent asks a database, an MCP server and an image, and hands in its answer."""

import json
import sqlite3
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

SERVER = """
from mcp.server.mcpserver import MCPServer
from mcp_types import ToolAnnotations

server = MCPServer("numbers")

@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def double(n: int) -> int:
    '''Twice the number.'''
    return 2 * n

server.run()
"""
AGENT = """
import json, re

CALLS = [
    ("sql", {"query": "SELECT n FROM secret"}),
    ("numbers__double", {"n": 21}),
    ("image", {"action": "crop", "box": [0, 0, 4, 4]}),
    ("image", {"action": "zoom", "number": 2, "box": [0, 0, 2, 2], "factor": 4}),
]

def script(text, seed):
    done = text.count("</tool_call>")
    if done < len(CALLS):
        name, arguments = CALLS[done]
    else:
        right = "42" in text and "Image 3, 8 by 8" in text and seed % 2
        name, arguments = "finish", {"answer": "42" if right else "41"}
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"

def rows(seed):
    number = 0
    while True:
        yield {
            "id": str(number),
            "public": {
                "messages": [{"role": "user", "content": "?"}],
                "extra": {"database": "secret.db", "images": ["square.png"]},
            },
            "private": {"answer": 42},
        }
        number += 1
"""
RECIPE = """
[policy]
model = {model}
max_turns = 8
max_turn_tokens = 400
max_tokens = 8000

[data]
rows = "agent:rows"

[tools]
use = ["sql", "mcp", "image", "finish"]
format = "hermes"
show = "system"

[tools.options.mcp.servers.numbers]
command = [{python}, "server.py"]

[learner]
steps = 1
groups_per_step = 1
group_size = 4

[asynchrony]
max_staleness = 0

[generator]
engine = "scripted"
script = "agent:script"
"""


def test_an_agent_uses_every_kind_of_tool(model_folder: Path, tmp_path: Path, machine_at) -> None:
    """The MCP server's functions are in the recipe of the log; images go on from call to call; `finish` is scored."""
    for name, text in (("server.py", SERVER), ("agent.py", AGENT)):
        (tmp_path / name).write_text(text)
    with sqlite3.connect(tmp_path / "secret.db") as link:
        link.execute("CREATE TABLE secret AS SELECT 21 AS n")
    link.close()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "square.png")
    recipe = RECIPE.format(model=json.dumps(str(model_folder)), python=json.dumps(sys.executable))
    (tmp_path / "recipe.toml").write_text(recipe)
    machine = machine_at(tmp_path / "runs")
    machine.say("train", str(tmp_path / "recipe.toml"), "--run", "tools")
    (metrics, *_) = machine.rows("tools")
    assert 0 < metrics["reward_mean"] < 1
    assert metrics["failed_by_cause"] == {}
    resolved = (tmp_path / "runs/tools/recipe.toml").read_text()
    assert "numbers__double" in resolved
