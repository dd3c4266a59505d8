"""How messages reach an MCP server and come back: over pipes and over HTTP, with bounds. Imported with mcp_client.py.

Over pipes, the SDK's own reader copies what it has of a line with every piece that comes: 10 MB take seconds of the
event loop, 40 MB a minute. Over HTTP, it takes an answer of any size, and what it makes of a status or of a lost link
looks like an error that the server tells the policy, or ends the calls of everybody on the connection.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import pydantic
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage
from mcp_types import (
    HEADER_MISMATCH,
    INVALID_PARAMS,
    UNSUPPORTED_PROTOCOL_VERSION,
    jsonrpc_message_adapter,
)

MAX_ANSWER_BYTES = 24 << 20
"""Of one answer: what an image of tools/mcp.py's limit takes, in base64."""
TOO_LARGE = f"an answer of more than {MAX_ANSWER_BYTES >> 20} MB"
HTTP_FAILED = -32090
"""Our own code: the server, or what is before it, has not answered."""
SESSION_UNKNOWN = -32091
"""The same, where a new session may help: it has not run the call."""

_PIECE_BYTES = 1 << 20
_LEAVE_S = 2.0
"""For a program to end when its input ends; and again when it is asked to."""
_GOODBYE_S = 5.0
_HEAD_BYTES = 64 << 10
_SPOKEN = {INVALID_PARAMS, HEADER_MISMATCH, UNSUPPORTED_PROTOCOL_VERSION}
"""Errors that the protocol sends with a status of its own: they are the server's words."""
_UNKNOWN_STATUSES = {400, 404, 410}
"""404 by the specification ("Session Management"); the others by many servers."""

Answers = MemoryObjectReceiveStream[SessionMessage | Exception]
Requests = MemoryObjectSendStream[SessionMessage]


@asynccontextmanager
async def over_pipes(
    command: Sequence[str], environment: Mapping[str, str], folder: Path
) -> AsyncIterator[tuple[Answers, Requests]]:
    """A program of its own, ended with the block. Raises OSError; also at the end, where an answer was too large."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=get_default_environment() | dict(environment),
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_PIECE_BYTES,
        start_new_session=True,
    )
    answers_in, answers = anyio.create_memory_object_stream[SessionMessage | Exception]()
    requests, requests_out = anyio.create_memory_object_stream[SessionMessage]()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_read, process, answers_in)
            tasks.start_soon(_write, process, requests_out, answers_in)
            try:
                yield answers, requests
            finally:
                tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await _end(process)
        for stream in (answers_in, answers, requests, requests_out):
            stream.close()


async def _read(
    process: asyncio.subprocess.Process,
    answers: MemoryObjectSendStream[SessionMessage | Exception],
) -> None:
    """Line by line, until the program closes its output. Raises OSError when a line is too large."""
    assert process.stdout
    parts: list[bytes] = []
    async with answers:
        while piece := await process.stdout.read(_PIECE_BYTES):
            *ends, rest = piece.split(b"\n")
            for end in ends:
                await answers.send(_message(b"".join((*parts, end))))
                parts.clear()
            parts.append(rest)
            if sum(map(len, parts)) > MAX_ANSWER_BYTES:
                raise OSError(TOO_LARGE)


def _message(line: bytes) -> SessionMessage | Exception:
    """Programs print other things too: those are not answers."""
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except pydantic.ValidationError as error:
        return error


async def _write(
    process: asyncio.subprocess.Process,
    requests: MemoryObjectReceiveStream[SessionMessage],
    answers: MemoryObjectSendStream[SessionMessage | Exception],
) -> None:
    assert process.stdin
    try:
        async for request in requests:
            line = request.message.model_dump_json(by_alias=True, exclude_unset=True)
            process.stdin.write(line.encode() + b"\n")
            await process.stdin.drain()
    except ConnectionError:
        answers.close()  # who reads nothing will answer nothing


async def _end(process: asyncio.subprocess.Process) -> None:
    """As the specification has it ("Lifecycle", shutdown): its input ends; it is asked to end; it is killed."""
    assert process.stdin
    assert process.stdout
    process.stdin.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                while await process.stdout.read(_PIECE_BYTES):
                    pass  # it could not end while it writes
                await process.wait()
                return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    with suppress(TimeoutError):  # what it has started and let go may hold its output for ever
        async with asyncio.timeout(_LEAVE_S):
            await process.wait()


class HttpClient(httpx2.AsyncClient):
    """Posts requests; what fails is the answer to the one request that it failed for, by a code of ours."""

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """As the SDK calls it: `stream=True`."""
        if request.method == "DELETE":  # of a session: a courtesy
            request.extensions["timeout"] = httpx2.Timeout(_GOODBYE_S).as_dict()
        if request.method != "POST":
            return await super().send(request, **options)
        try:
            response = await super().send(request, **options)
            if response.status_code >= 400:
                return await _failure(response)
        except httpx2.TransportError as error:
            return _answer(request, HTTP_FAILED, _told(error))
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            return _answer(request, HTTP_FAILED, "an answer that is compressed, unasked")
        if int(response.headers.get("content-length", 0)) > MAX_ANSWER_BYTES:
            await response.aclose()
            return _answer(request, HTTP_FAILED, TOO_LARGE)
        response.stream = _Bounded(response)
        return response


class _Bounded(httpx2.AsyncByteStream):
    """An answer's bytes; those of an answer that is too large, or cut, end with an error that the SDK expects."""

    def __init__(self, response: httpx2.Response) -> None:
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        self._stream = response.stream
        self._events = response.headers.get("content-type", "").startswith("text/event-stream")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left_bytes = MAX_ANSWER_BYTES
        try:
            async for part in self._stream:
                left_bytes -= len(part)
                if left_bytes < 0:
                    break
                yield part
        except httpx2.TransportError as error:
            raise httpx2.StreamError(_told(error)) from error
        if left_bytes < 0:
            raise httpx2.SSEError(TOO_LARGE) if self._events else httpx2.StreamError(TOO_LARGE)

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Error(msgspec.Struct):
    code: int
    message: str


class _Refusal(msgspec.Struct):
    """JSON-RPC's, as some servers send it with a status."""

    error: _Error


async def _failure(response: httpx2.Response) -> httpx2.Response:
    """An answer that says what the status says, or what the server says of the call itself."""
    head = b""
    async for part in response.aiter_raw():
        head += part
        if len(head) > _HEAD_BYTES:
            break
    await response.aclose()
    status = f"HTTP {response.status_code} {response.reason_phrase}".strip()
    try:
        error = msgspec.json.decode(head, type=_Refusal).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    else:
        if error.code in _SPOKEN:
            as_it_came = {"content-type": "application/json"}
            return httpx2.Response(
                response.status_code, headers=as_it_came, content=head, request=response.request
            )
        status += f": {error.message}"
    unknown = response.status_code in _UNKNOWN_STATUSES
    return _answer(response.request, SESSION_UNKNOWN if unknown else HTTP_FAILED, status)


def _answer(request: httpx2.Request, code: int, message: str) -> httpx2.Response:
    """An error for this request alone."""
    error = {"jsonrpc": "2.0", "id": None, "error": {"code": code, "message": message}}
    return httpx2.Response(503, json=error, request=request)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
