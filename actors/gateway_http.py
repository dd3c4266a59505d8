"""The gateway's door: HTTP in front of actors/gateway.py, with back-pressure, health and figures.

POST /get_observation   as VerlTool's; 422 what cannot be read, 413 what is too large, 503 later, please
GET  /health            200 when a toolbox is heard and the bus is there, else 503
GET  /metrics           for Prometheus
"""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import structlog
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from structlog.contextvars import bound_contextvars

from actors.calling import Toolset, run_events
from actors.errors import RecipeError
from actors.fleet import Fleet
from actors.gateway import Gateway, NotNow, TooLarge
from actors.gateway_actions import Actions
from actors.gateway_requests import Action, Answer, BadRequest, read_request, reply_to
from actors.heartbeat import STARTING
from actors.metrics import including
from actors.process import Process
from bus.errors import BusError
from schemas import recipe
from schemas.events import AnyEvent
from schemas.messages import Heartbeat
from tools.errors import ToolError
from tools.remote import all_tools

log = structlog.get_logger()

_PORTS = 16
_BODY_BYTES = 64 << 20
_RETRY_AFTER_S = "1"
_BACKLOG = 4096
_KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection, so that none is closed under a request."""
_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Figures:
    """What `/metrics` tells."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter(
            "gateway_calls",
            "Actions by the tool called.",
            ["tool", "valid"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "gateway_call_seconds",
            "From an action's slot to its answer.",
            ["tool"],
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self.failures = Counter(
            "gateway_failures",
            "Actions that infrastructure failed.",
            ["cause"],
            registry=self.registry,
        )
        self.refused = Counter(
            "gateway_refused", "Requests refused, by status.", ["status"], registry=self.registry
        )
        self.in_flight = Gauge(
            "gateway_in_flight", "Actions that hold a slot.", registry=self.registry
        )
        self.waiting = Gauge(
            "gateway_waiting", "Actions that wait for a slot.", registry=self.registry
        )

    def count(self, answer: Answer, seconds: float) -> None:
        """Take one answer in."""
        tool = answer.tool or "none"
        self.calls.labels(tool, str(answer.valid).lower()).inc()
        self.seconds.labels(tool).observe(seconds)
        if answer.cause:
            self.failures.labels(answer.cause).inc()


class Refused(Exception):
    """A request that is not answered with observations."""

    def __init__(self, status: int, detail: object) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail


class Door:
    """The HTTP application."""

    def __init__(self, process: Process, gateway: Gateway, fleet: Fleet, toolset: Toolset) -> None:
        self._process = process
        self._gateway = gateway
        self._fleet = fleet
        self._toolset = toolset
        self._config = process.recipe.gateway
        self._slots = asyncio.Semaphore(self._config.slots)
        self._inside = 0
        """Actions taken in: under way, or waiting for a slot."""
        self._active = 0
        """Those under way."""
        self._figures = Figures()
        self.registry = self._figures.registry
        self._figures.in_flight.set_function(lambda: self._active)
        self._figures.waiting.set_function(lambda: self._inside - self._active)
        self._begun_s = time.monotonic()
        self.app = Starlette(
            routes=[
                Route("/get_observation", self._get_observation, methods=["POST"]),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ]
        )

    async def _get_observation(self, request: Request) -> Response:
        begun_s = time.monotonic()
        try:
            if "origin" in request.headers:
                # a trainer has none; a page in a browser nearby could run anything
                raise Refused(403, "web pages are refused: leave the header Origin out")
            actions = read_request(await _body(request))
            with self._taken_in(len(actions)):
                answers, queue_s = await self._answers(actions)
        except BadRequest as error:
            return self._refusal(Refused(422, error.detail))
        except Refused as error:
            return self._refusal(error)
        if not await request.is_disconnected():
            for action in actions:
                self._gateway.told(action.trajectory)
        seconds = time.monotonic() - begun_s
        body = reply_to(answers, (seconds - queue_s) * 1e3, queue_s * 1e3)
        headers = {"X-Process-Time": str(seconds)}
        return Response(body, media_type="application/json", headers=headers)

    @contextmanager
    def _taken_in(self, count: int) -> Iterator[None]:
        """Room for so many actions; a request larger than all of it is alone. Raises Refused."""
        if self._inside and self._inside + count > self._config.slots + self._config.waiting:
            raise Refused(503, f"{self._inside} actions are under way or wait: try again later")
        self._inside += count
        try:
            yield
        finally:
            self._inside -= count

    async def _answers(self, actions: Sequence[Action]) -> tuple[list[Answer], float]:
        """The answers in order, and how long the last of them has waited for a slot. Raises Refused."""
        found = await asyncio.gather(*map(self._answer, actions), return_exceptions=True)
        done: list[tuple[Answer, float]] = []
        for each in found:
            if isinstance(each, BusError | NotNow | TooLarge):
                log.warning("request refused", error=str(each))
                raise Refused(413 if isinstance(each, TooLarge) else 503, str(each)) from each
            if isinstance(each, BaseException):
                raise each
            done.append(each)
        return [answer for answer, _ in done], max(waited_s for _, waited_s in done)

    async def _answer(self, action: Action) -> tuple[Answer, float]:
        """The answer, and how long it has waited for a slot."""
        arrived_s = time.monotonic()
        async with self._slots:
            begun_s = time.monotonic()
            self._active += 1
            try:
                with bound_contextvars(stage="gateway", trajectory=action.trajectory):
                    answer = await self._gateway.answer(action)
            finally:
                self._active -= 1
        self._figures.count(answer, time.monotonic() - begun_s)
        return answer, begun_s - arrived_s

    def _refusal(self, refused: Refused) -> Response:
        self._figures.refused.labels(str(refused.status)).inc()
        headers = {"Retry-After": _RETRY_AFTER_S} if refused.status == 503 else {}
        return JSONResponse({"detail": refused.detail}, refused.status, headers)

    async def _health(self, _: Request) -> Response:
        toolboxes = [beat for beat in self._fleet.alive() if _serves(beat)]
        problem = "" if toolboxes else "no toolbox is heard"
        if not self._process.bus.client.is_connected:
            problem = "no NATS server is reached"
        body = {
            "status": problem or "healthy",
            "concurrent_requests": self._inside,
            "thread_pool_size": len(toolboxes) * self._process.recipe.toolbox.slots,
            "active_tasks": self._active,
            "max_concurrent": self._config.slots,
            "tools": list(self._toolset.present),
            "uptime_seconds": time.monotonic() - self._begun_s,
        }
        return JSONResponse(body, 503 if problem else 200)

    async def _metrics(self, _: Request) -> Response:
        return Response(
            generate_latest(self._figures.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4
        )


def _serves(beat: Heartbeat) -> bool:
    return beat.role == "toolbox" and beat.phase not in STARTING


async def _body(request: Request) -> bytes:
    """All of it. Raises Refused when it is too large, or not all comes."""
    pieces, size = [], 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > _BODY_BYTES:
                raise Refused(413, f"a request may have {_BODY_BYTES} bytes")
            pieces.append(piece)
    except ClientDisconnect as error:
        raise Refused(400, "the connection was closed") from error
    return b"".join(pieces)


class _Server(uvicorn.Server):
    """Signals are the replica's, not the server's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(process: Process) -> None:
    """Answer until told to stop; then finish what is under way, as long as a replica may. Raises RecipeError."""
    config = process.recipe.gateway
    toolset = _open_toolset(process)
    fleet = Fleet()
    gateway = Gateway(process, toolset, fleet)
    events = run_events(process.log)
    async for event in events:
        if event is None:
            break
        gateway.observe(event)
    await gateway.hear()
    await fleet.hear(process.bus, process.run)
    door = Door(process, gateway, fleet, toolset)
    with listen(config) as listener, including(door.registry):
        host, port = listener.getsockname()[:2]
        server = _Server(
            uvicorn.Config(
                door.app,
                http="h11",
                lifespan="off",
                log_config=None,
                access_log=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(process.recipe.deadlines.drain_s),
            )
        )
        async with asyncio.TaskGroup() as group:
            followers = [
                group.create_task(_follow_run(gateway, events)),
                group.create_task(gateway.watch_room()),
            ]
            serving = group.create_task(server.serve(sockets=[listener]))
            process.vitals.phase = f"at http://{host}:{port}"
            await process.stopping.wait()
            server.should_exit = True
            await serving
            for follower in followers:
                follower.cancel()


def _open_toolset(process: Process) -> Toolset:
    try:
        return Toolset(all_tools(process.recipe.tools, process.recipe_dir), Actions.of)
    except ToolError as error:
        raise RecipeError("recipe", "tools.use", error.detail) from error


async def _follow_run(gateway: Gateway, events: AsyncIterator[AnyEvent | None]) -> None:
    async for event in events:
        gateway.observe(event)


@contextmanager
def listen(config: recipe.Gateway) -> Iterator[socket.socket]:
    """The first free port from the recipe's on. Raises RecipeError."""
    ports = range(config.port, min(config.port + _PORTS, 65536)) if config.port else [0]
    for port in ports:
        try:
            listener = socket.create_server((config.host, port), backlog=_BACKLOG)
        except OSError as error:
            why = error.strerror or str(error)
            continue
        with listener:
            yield listener
        return
    raise RecipeError("recipe", "gateway.port", f"none is free from {config.port} on: {why}")
