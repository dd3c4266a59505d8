"""The graph of roles and messages, drawn from the subject table."""

from bus.subjects import TABLE


def draw() -> str:
    """Each subject with who publishes it and who reads it, as the table has it."""
    rows = [("SUBJECT", "STREAM", "FROM", "TO")]
    rows += [
        (row.subject, row.stream or "-", ", ".join(row.publishes), ", ".join(row.consumes))
        for row in TABLE
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return f"{_PICTURE}\n{table}"


_PICTURE = """\
                 weights (version v is ready)
      ┌──────────────────────────────────────────────────┐
      ▼                                                  │
 dispatcher ──gen──► generator ──tool──► toolbox         │
 (admits, paces,      ▲      │              │            │
  replaces, sweeps)   └──────┼─────gen──────┘            │
                             └──score──► scorer          │
      every hop appends its event to the LOG             │
      ════════════════════════════════════════► learner ─┘   recorder, dashboards, anyone
"""
