"""A tool of your own: `tools.use = ["shout_tool:shout"]` in a recipe beside this file.

The policy calls it as <shout>…</shout>. The docstring and the types are what it is told. `context.task` is the
row's `public.extra`; `context.run` runs Python code in a sandbox.
"""

from tools.tool import Context, Observation


async def shout(context: Context, text: str, marks: int = 1) -> str | Observation:
    """Say the text louder."""
    if not text.strip():
        return Observation(text="There is nothing to shout.", ok=False)
    return text.upper() + context.task.get("mark", "!") * marks
