"""The archive's files: what is in their columns, what their names say, and when they are whole.

    trajectories-<first>-<last>.parquet
    turns-<first>-<last>.parquet

hold what the events of one range of the log closed. A file gets its name when all of it is on the disk, and a range is
done when both of its files are there; the ranges that are done follow one another from sequence 1. So what is done is
known from the names, and a range that was cut short is written again. docs/archive.md is for those who read them.
"""

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from actors.recorder import Row, Rows

_NAME = re.compile(r"(trajectories|turns)-(\d{12})-(\d{12})\.parquet")
_ROW_GROUP_TOKENS = 1 << 20
"""Rows that hold so many tokens, of 13 bytes, are written: what is not is all that is kept in memory."""


# -- columns ---------------------------------------------------------------------------------------


def _schema(*columns: tuple[str, pa.DataType, str]) -> pa.Schema:
    return pa.schema(
        [pa.field(name, kind, metadata={"description": text}) for name, kind, text in columns]
    )


_TIME = pa.timestamp("us", tz="UTC")

TRAJECTORIES = _schema(
    ("trajectory", pa.string(), "`<group>-<member>-<attempt>`"),
    ("group", pa.string(), "trajectories of one task, compared with one another"),
    ("member", pa.int32(), "the slot in the group"),
    ("attempt", pa.int32(), "0, or more where an earlier attempt of the slot failed"),
    ("task", pa.string(), "the id of the data row"),
    ("purpose", pa.string(), "`train`, `eval` or `external`"),
    (
        "fate",
        pa.string(),
        "`trained`, `filtered`, `evaluated`, `finished`, `expired`, `failed` or `dropped`",
    ),
    ("step", pa.int64(), "the optimizer step that trained it"),
    (
        "reason",
        pa.string(),
        "why it was filtered, finished, expired or dropped; of a failure `boundary.code`",
    ),
    ("reward", pa.float64(), "null when it was never scored"),
    ("reward_parts", pa.map_(pa.string(), pa.float64()), "the reward's parts by name"),
    (
        "messages",
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        "the conversation that it began with",
    ),
    ("turns", pa.int32(), "whole turns; one that was cut into pieces counts once"),
    ("tool_calls", pa.int32(), "calls that the policy wrote"),
    ("tool_errors", pa.int32(), "results that a tool called an error"),
    ("finish_reason", pa.string(), "of the last turn"),
    ("tokens_given", pa.int64(), "tokens of prompts and observations"),
    ("tokens_sampled", pa.int64(), "tokens that the policy sampled"),
    ("version_min", pa.int64(), "the oldest policy version that sampled a token"),
    ("version_max", pa.int64(), "the newest"),
    ("min_policy_version", pa.int64(), "the version at its admission; none older sampled"),
    ("pinned_policy_version", pa.int64(), "of an evaluation: the one version that sampled"),
    ("temperature", pa.float64(), "of sampling"),
    ("seed", pa.int64(), "of sampling"),
    ("admitted_at", _TIME, "when the log stored its first event, as are all times here"),
    ("scored_at", _TIME, "when it had its reward"),
    ("closed_at", _TIME, "when it had its fate"),
    ("generating_s", pa.float64(), "seconds up to its turns, waiting in queues included"),
    ("tools_s", pa.float64(), "seconds up to its tools' results, likewise"),
    ("scoring_s", pa.float64(), "seconds up to its reward, likewise"),
    ("closing_s", pa.float64(), "seconds from its last other event to its fate"),
    ("tool_run_s", pa.float64(), "seconds that its tools ran, as they say"),
    ("replicas", pa.list_(pa.string()), "who worked on it, in the order in which they began"),
    ("admitted_seq", pa.int64(), "the log sequence of its first event"),
    ("closed_seq", pa.int64(), "the log sequence of its fate"),
)

TURNS = _schema(
    ("trajectory", pa.string(), "as in the other table"),
    ("closed_seq", pa.int64(), "as in the other table"),
    ("turn", pa.int32(), "0 for the first; each piece of a turn that was cut short has a row"),
    ("seq", pa.int64(), "its log sequence"),
    ("at", _TIME, "when the log stored it"),
    ("replica", pa.string(), "the generator"),
    ("text", pa.string(), "what was sampled, decoded"),
    ("finish_reason", pa.string(), "`stop`, `length`, or `partial`: it goes on in the next row"),
    ("last", pa.bool_(), "nothing follows but the score"),
    ("feedback", pa.string(), "what the policy was told when its calls could not be read"),
    ("ids", pa.list_(pa.int32()), "tokens given since the last turn, then those sampled"),
    ("mask", pa.list_(pa.uint8()), "1 where the policy sampled the token, 0 where it was given"),
    ("logprobs", pa.list_(pa.float32()), "the engine's log-probability of a sampled token, else 0"),
    ("versions", pa.list_(pa.int32()), "the policy version that sampled the token, else -1"),
    (
        "calls",
        pa.list_(
            pa.struct([("tool", pa.string()), ("version", pa.string()), ("arguments", pa.string())])
        ),
        "tool calls in order; the tool's version, empty for the recipe's own; arguments as JSON",
    ),
    (
        "results",
        pa.list_(
            pa.struct(
                [
                    ("call", pa.int32()),
                    ("text", pa.string()),
                    ("ok", pa.bool_()),
                    ("duration_ms", pa.float64()),
                    ("tier", pa.string()),
                    ("replica", pa.string()),
                    ("at", _TIME),
                ]
            )
        ),
        "what the calls returned; `call` is an index into `calls`, `tier` the sandbox",
    ),
)

_PACKED = {"ids", "mask", "logprobs", "versions"}
"""Columns whose rows are packed arrays, as in schemas/tokens.py."""


def table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a table; token arrays are copied bit by bit."""
    columns = []
    for field in schema:
        values = [row[field.name] for row in rows]
        columns.append(
            _lists(values, field.type) if field.name in _PACKED else pa.array(values, field.type)
        )
    return pa.table(columns, schema=schema)


def _lists(parts: Sequence[bytes], kind: pa.ListType) -> pa.ListArray:
    width = kind.value_type.bit_width // 8
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part) // width)
    buffer = pa.py_buffer(b"".join(parts))
    values = pa.Array.from_buffers(kind.value_type, ends[-1], [None, buffer])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values, type=kind)


# -- files -----------------------------------------------------------------------------------------


_SCHEMAS = {"trajectories": TRAJECTORIES, "turns": TURNS}


class Archive:
    """The files of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, first: int, last: int) -> Path:
        """Where the rows of a range are; `kind` is `trajectories` or `turns`."""
        return self.folder / f"{kind}-{first:012}-{last:012}.parquet"

    def done(self) -> int:
        """The last sequence up to which no range lacks a file; 0 at first."""
        found = [_NAME.fullmatch(path.name) for path in self.folder.glob("*.parquet")]
        ranges = {(int(name[2]), int(name[3])) for name in found if name}
        last = 0
        for first, end in sorted(ranges):
            if first == last + 1 and all(self.path(kind, first, end).exists() for kind in _SCHEMAS):
                last = end
        return last

    def prepare(self) -> int:
        """Make the folder, remove what tries cut short have left beyond what is done, and return that."""
        self.folder.mkdir(parents=True, exist_ok=True)
        last = self.done()
        for path in self.folder.iterdir():
            name = _NAME.fullmatch(path.name)
            if path.suffix == ".unfinished" or (name and int(name[2]) > last):
                path.unlink(missing_ok=True)
        return last


class RangeFiles:
    """Both files of one range while they are written, under other names."""

    def __init__(self, archive: Archive, replica: str) -> None:
        self._archive = archive
        self._stack = ExitStack()
        self._unfinished = {
            kind: archive.folder / f"{kind}-{replica}.unfinished" for kind in _SCHEMAS
        }
        self._files = {
            kind: self._stack.enter_context(path.open("wb"))
            for kind, path in self._unfinished.items()
        }
        self._writers = {
            kind: self._stack.enter_context(
                parquet.ParquetWriter(self._files[kind], schema, compression="zstd")
            )
            for kind, schema in _SCHEMAS.items()
        }
        self._rows: list[Rows] = []
        self._tokens = 0

    def add(self, found: Rows) -> None:
        """Take in a trajectory."""
        self._rows.append(found)
        self._tokens += found.tokens
        if self._tokens >= _ROW_GROUP_TOKENS:
            self._write()

    def _write(self) -> None:
        trajectories = [found.trajectory for found in self._rows]
        turns = [turn for found in self._rows for turn in found.turns]
        self._writers["trajectories"].write_table(table(trajectories, TRAJECTORIES))
        self._writers["turns"].write_table(table(turns, TURNS))
        self._rows.clear()
        self._tokens = 0

    def finish(self, first: int, last: int) -> None:
        """Put them on the disk, whole, and name them."""
        self._write()
        for kind, writer in self._writers.items():
            writer.close()
            self._files[kind].flush()
            os.fsync(self._files[kind].fileno())
        for kind, path in self._unfinished.items():
            path.rename(self._archive.path(kind, first, last))
        folder = os.open(self._archive.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.close()

    def close(self) -> None:
        """Let go of the files; without `finish` they stay unfinished."""
        self._stack.close()
