"""The `finish` tool: ends the trajectory with an answer. The call is the answer; nothing runs."""

from tools.function import tool
from tools.tool import Context


@tool(ends=True)
async def finish(context: Context, answer: str) -> str:  # noqa: ARG001 (it needs nothing)
    """End the task and hand in the answer.

    Args:
        answer: The final answer, complete: nothing can be added afterwards.
    """
    return answer
