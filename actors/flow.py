"""The graph of roles and messages, drawn from the subject table."""

from actors.views import columns
from bus.subjects import TABLE


def draw() -> str:
    """Each subject with who publishes it and who reads it, as the table has it."""
    rows = [("SUBJECT", "STREAM", "FROM", "TO")]
    rows += [
        (row.subject, row.stream or "-", ", ".join(row.publishes), ", ".join(row.consumes))
        for row in TABLE
    ]
    return f"{_PICTURE}\n{columns(rows)}"


_PICTURE = """\
                 weights (version v is ready)
      ┌──────────────────────────────────────────────────┐
      ▼                                                  │
 dispatcher ──gen──► generator ──tool──► toolbox         │
 (admits, paces,      ▲      │              │            │
  replaces, sweeps)   └──────┼─────gen──────┘            │
                             └──score──► scorer          │
      every hop appends its event to the LOG             │
      ════════════════════════════════════════► learner ─┘   recorder ──► archive, dashboards, anyone
"""
