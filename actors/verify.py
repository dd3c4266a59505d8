"""`actors verify`: one pass over a run's log, live or at rest, and what became of every trajectory."""

from collections.abc import Iterator, Mapping

import click
import msgspec

from actors.accounts import Accounts
from actors.joining import reach
from actors.rules import FATES, RULES, Report
from actors.views import columns
from bus.connection import Bus
from bus.dead import dead_letters
from bus.log import open_log

BROKEN = 1
"""Exit status when a rule is broken."""

_SHOWN = 20
"""Offenders of one rule; `--json` has them all."""


async def verify(run: str | None, nats_url: str, *, as_json: bool) -> int:
    """Print the accounts of a run; returns the exit status."""
    async with reach(run, nats_url) as (bus, log):
        report = await audit(bus, log.run)
    click.echo(msgspec.json.encode(report).decode() if as_json else report_text(report))
    return 0 if report.balanced else BROKEN


async def audit(bus: Bus, run: str) -> Report:
    """The accounts of all that is in a run's log now."""
    accounts = Accounts()
    async with open_log(bus, run) as log:
        async for stored in log.read():
            accounts.observe(stored.event, stored.subject.split(".")[3])
    dead = len(await dead_letters(bus, run))
    return accounts.report(run, junk=log.junk, dead_letters=dead)


def report_text(report: Report) -> str:
    """The table of fates, then a line for each broken rule."""
    rows = [("admitted", str(report.admitted))]
    causes = {"failed": report.failed_by_cause, "filtered": report.filtered_by_reason}
    for fate in FATES:
        rows += [(f"  {fate}", str(report.fates[fate])), *_parts(causes.get(fate, {}))]
    rows += [("  in flight", str(report.in_flight)), *_parts(report.in_flight_by_stage)]
    rows += [("junk messages", str(report.junk)), ("dead letters", str(report.dead_letters))]
    width = max(len(count) for _, count in rows)
    state = "archived" if report.archived else "ended" if report.ended else "not ended"
    lines = [
        f"run {report.run}: {report.steps} steps, {state}",
        columns([(name, count.rjust(width)) for name, count in rows]),
    ]
    for rule, offenders in report.broken.items():
        more = f" and {len(offenders) - _SHOWN} more" if len(offenders) > _SHOWN else ""
        lines.append(f"{rule}: {RULES[rule]}: {', '.join(offenders[:_SHOWN])}{more}")
    lines.append("balanced: each has one fate" if report.balanced else "NOT balanced")
    return "\n".join(lines)


def _parts(counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for name in sorted(counts):
        yield f"    {name}", str(counts[name])
