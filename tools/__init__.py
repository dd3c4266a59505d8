"""What the model may call. One tool, one file; knows no actor, no bus.

tool        the seam: a name, a schema, an async function
registry    names to tools
formats     how a policy writes calls in its text
python      the `python` tool
observation cuts long observations
sandbox/    where model-written code runs; read sandbox/sandbox.py first
"""
