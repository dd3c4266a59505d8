"""`python` runs each call in a fresh sandbox; the calls of `python_session` share their variables."""

from tools.function import tool
from tools.outcome import observe, session_of, with_figures
from tools.tool import Context, Observation


async def python(context: Context, code: str, stdin: str = "") -> Observation:
    """Run Python code and return what it prints; a last expression is printed too, and matplotlib figures are shown.

    Nothing is kept for the next call.

    Args:
        code: The program.
        stdin: What the program reads from its standard input.
    """
    limits = with_figures(context.limits)
    return observe(await context.run(code, stdin=stdin.encode(), limits=limits), limits)


@tool(session=True)
async def python_session(context: Context, code: str, stdin: str = "") -> Observation:
    """Run Python code like a notebook cell: variables, imports, files and processes are kept for later calls.

    What it prints is returned; a last expression is printed too, and matplotlib figures are shown.

    Args:
        code: The cell.
        stdin: What the code reads from its standard input.
    """
    limits = with_figures(context.limits)
    session = await session_of(context, "python")
    return observe(await session.run(code, stdin=stdin.encode(), limits=limits), limits)
