"""What the model may call. One tool, one file; knows no actor, no bus.

tool         the seam: functions with schemas, options, an async call
function     an async function as a tool; read this to write one
registry     names to tools
formats/     how a policy writes calls in its text
observation  makes results fit to be seen
python, bash, repo, sql, search, web_search, visit, image, mcp, finish      the tools
databases    asks a database             pictures    works on an image          page    a web page as text
web          fetches public pages        mcp_client  a connection to a server
repositories fetches commits             worktree    what `repo` does in its sandbox
workers      child processes for blocking work; databases, pictures and page run there
sandbox/     where model-written code runs; read sandbox/sandbox.py first
"""
