"""An agent at work in the `bash` tool for a hundred turns: what it set up stays, and nothing piles up."""

import asyncio
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from tools.registry import load_tools
from tools.sandbox.sandbox import Limits
from tools.tool import Context

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTING_UP = """mkdir -p work/src
cd work
export STAGE=first
greet() { echo "hello $1 from $STAGE"; }
shopt -s extglob
cat > src/count.py <<'END'
import sys
for line in sys.stdin:
    print(len(line.split()))
END
(while :; do date +%N > beat; sleep 0.2; done) &
python3 -c 'import time; time.sleep(600)' MARKER &
until [ -s beat ]; do :; done
"""


def turns() -> Iterator[tuple[str, str]]:
    """What the agent types, and what it sees."""
    for n in range(17):
        yield f"n={n}; for i in 1 2 3; do\n  echo $((n * i))\ndone", f"{n}\n{2 * n}\n{3 * n}\n"
        yield "python3 src/count.py <<END\na b c\n$STAGE one\nEND", "3\n2\n"
        yield f"greet {n}", f"hello {n} from first\n"
        yield "cd src && echo ${PWD##*/} && cd .. && echo $n >> log; wc -l < log", f"src\n{n + 1}\n"
        yield "if [[ -e beat && beat == @(beat|heart) ]]; then\n  jobs -rp | wc -l\nfi", "2\n"
        yield "greet() { echo again; }; (exit 3)", "Ended with exit code 3."
        yield f'greet; greet() {{ echo "hello $1 from $STAGE"; }}; echo {n}', f"again\n{n}\n"


async def test_a_hundred_turns(
    context: Context, processes_with: Callable[[str], list[int]], marker: str
) -> None:
    """Directory, environment, functions, options, files and jobs; loops and here-documents are read whole.

    The session takes no more memory at the end than after its first turns, and its jobs end with it.
    """
    bash = load_tools(["bash"])["bash"]
    context = replace(context, limits=Limits())
    assert context.session
    session = await context.session("bash")
    await bash(context, {"command": SETTING_UP.replace("MARKER", marker)})
    async with asyncio.timeout(20):
        while len(processes_with(marker)) != 1:  # noqa: ASYNC110 - processes send no events
            await asyncio.sleep(0.01)
    sizes = []
    for command, expected in turns():
        assert (await bash(context, {"command": command})).text == expected, command
        sizes.append(await session.memory_bytes())
    assert len(sizes) > 100
    assert sorted(sizes[-9:])[4] < sorted(sizes[:9])[4] + (1 << 20)
    await session.close()
    assert processes_with(marker) == []
