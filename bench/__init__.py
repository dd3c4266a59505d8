"""What it costs and what it brings: one program for each figure, beside its peer or its limit, as a ratio.

Each is run as `python -m bench.<name>`, prints a short table and, as its last line, one JSON object.
"""
