"""The generator: samples a trajectory's next turn.

    turn = tokens given since the last turn (prompt, or observations) + tokens sampled

The tokens given are made here, once; the tokens sampled are the engine's, never tokenised again.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import ClassVar, NamedTuple

from actors.actor import HopFailed
from actors.calling import Calling
from actors.pictures import Pictures
from bus.subjects import Stage
from engines.chat import Chat, Content
from engines.engine import Engine, Sample, SampleRequest
from engines.errors import EngineError
from schemas.events import Admitted, Event, Turn
from schemas.images import ImageInput
from schemas.recipe import Recipe
from schemas.task import PublicPart
from schemas.tokens import Tokens
from schemas.trajectory import Trajectory
from tools.formats import with_functions

_WEIGHTS_WAIT_S = 60.0


class Policies:
    """The engines of one replica: the live one, and one that holds the version that is evaluated."""

    def __init__(
        self,
        live: Engine,
        open_other: Callable[[], Awaitable[Engine]],
        weights_of: Callable[[int], Awaitable[bytes]],
    ) -> None:
        """`open_other`: an engine that waits for its first weights; `weights_of`: those of a version."""
        self.live = live
        self._open_other = open_other
        self._weights_of = weights_of
        self._pinned: Engine | None = None
        self._pinned_version: int | None = None
        """None while nobody knows what it holds."""
        self._pinned_turns = 0
        """Turns that the pinned engine is sampling."""
        self._pinned_free = asyncio.Condition()
        self._moved = asyncio.Condition()

    async def update(self, weights: bytes, policy_version: int) -> None:
        """Take newer weights into the live engine."""
        await self.live.load(weights, policy_version)
        async with self._moved:
            self._moved.notify_all()

    async def at_least(self, policy_version: int) -> Engine:
        """The live engine, once it holds this version or a newer one."""
        async with self._moved:
            try:
                async with asyncio.timeout(_WEIGHTS_WAIT_S):
                    await self._moved.wait_for(lambda: self.live.policy_version >= policy_version)
            except TimeoutError as error:
                have = self.live.policy_version
                detail = f"version {policy_version} wanted, {have} held"
                raise HopFailed("engine", "weights_late", detail) from error
        return self.live

    @asynccontextmanager
    async def exactly(self, policy_version: int) -> AsyncIterator[Engine]:
        """An engine that holds just this version, for one turn.

        Turns of another version wait until those of this one are sampled: an engine in use is given no other weights.
        """
        async with self._pinned_free:
            await self._pinned_free.wait_for(
                lambda: self._pinned_version == policy_version or not self._pinned_turns
            )
            engine = await self._pin(policy_version)
            self._pinned_turns += 1
        try:
            yield engine
        except EngineError:
            self._pinned_version = None  # it may be broken: who comes next finds out
            raise
        finally:
            self._pinned_turns -= 1
            async with self._pinned_free:
                self._pinned_free.notify_all()

    async def _pin(self, policy_version: int) -> Engine:
        if self._pinned is not None and self._pinned_version == policy_version:
            return self._pinned
        weights = await self._weights_of(policy_version)
        self._pinned_version = None
        if self._pinned is None:
            self._pinned = await self._open_other()
        try:
            await self._pinned.load(weights, policy_version)
        except EngineError:
            broken, self._pinned = self._pinned, None
            with suppress(EngineError):
                await broken.close()
            raise
        self._pinned_version = policy_version
        return self._pinned

    def engines(self) -> list[Engine]:
        """All that are open."""
        return [self.live, *([self._pinned] if self._pinned else [])]


class Prepared(NamedTuple):
    """A turn before it is sampled."""

    ids: list[int]
    """[T] everything so far, with what is given now."""
    given: list[int]
    begun: int
    """How many of the last `ids` are of the turn that goes on."""
    max_tokens: int


class Generator:
    """Samples turns; as many at once as the engine has room for."""

    stage: ClassVar[Stage] = "gen"
    produces: ClassVar[tuple[type[Event], ...]] = (Turn,)

    def __init__(
        self, recipe: Recipe, policies: Policies, chat: Chat, calling: Calling, replica: str
    ) -> None:
        self._policy = recipe.policy
        self._tools = recipe.tools
        self._policies = policies
        self._chat = chat
        self.calling = calling
        """Replaced when a tool is added or removed."""
        self.pictures: Pictures | None = None
        """Set for a model that sees images."""
        self._replica = replica

    async def handle(self, state: Trajectory) -> Turn:
        """Sample the next turn."""
        prepared = await self._prepare(state)
        if prepared.max_tokens <= 0:
            return Turn(
                trajectory=state.id,
                replica=self._replica,
                tokens=Tokens.given(prepared.given),
                text="",
                finish_reason="length",
                last=True,
            )
        request = SampleRequest(
            ids=prepared.ids,
            begun=prepared.begun,
            images=await self._images(state, prepared.given),
            max_tokens=prepared.max_tokens,
            temperature=state.admitted.temperature,
            stop=self._stop(state.admitted),
            seed=turn_seed(state.admitted.seed, len(state.turns)),
            cache_key=state.id,
        )
        try:
            sample = await self._sample(state.admitted, request)
        except EngineError as error:
            raise HopFailed("engine", error.code, error.detail) from error
        return self._turn(state, prepared.given, sample)

    async def _sample(self, admitted: Admitted, request: SampleRequest) -> Sample:
        if admitted.pinned_policy_version is None:
            engine = await self._policies.at_least(admitted.min_policy_version)
            return await engine.sample(request)
        async with self._policies.exactly(admitted.pinned_policy_version) as engine:
            return await engine.sample(request)

    async def _prepare(self, state: Trajectory) -> Prepared:
        given = await self._given(state)
        ids = [*state.tokens.ids_T, *given]
        begun = sum(turn.tokens.sampled_count for turn in state.open_pieces())
        policy = self._policy
        room = min(policy.max_turn_tokens - begun, policy.max_tokens - len(ids))
        return Prepared(ids, given, begun, room)

    def _stop(self, admitted: Admitted) -> tuple[str, ...]:
        granted = self.calling.granting(admitted.public.tools)
        return granted.stop if self._tools.stop_after_call else ()

    def _prompt_ids(self, public: PublicPart) -> list[int]:
        """The task's messages, with the functions that it may call where the recipe shows them."""
        granted = self.calling.shown(public.tools)
        if self._tools.format == "template" or self._tools.show == "template":
            return self._chat.prompt_ids(public.messages, granted.schemas)
        if self._tools.show == "system":
            return self._chat.prompt_ids(with_functions(public.messages, granted))
        return self._chat.prompt_ids(public.messages)

    async def _images(self, state: Trajectory, given: list[int]) -> list[ImageInput]:
        if self.pictures is None:
            return []
        return await self.pictures.inputs(state.images, state.tokens + Tokens.given(given))

    async def _given(self, state: Trajectory) -> list[int]:
        """The tokens that the policy is given before it goes on."""
        if not state.turns:
            ids = self._prompt_ids(state.admitted.public)
            if self.pictures:
                return await self.pictures.prompt(ids, state.images)
            if state.images:
                why = "public.messages have images, and policy.model sees none"
                raise HopFailed("recipe", "image_in_messages", why)
            return ids
        last = state.turns[-1]
        if last.finish_reason == "partial":
            return []
        contents: list[Content] = [
            await self.pictures.content(result) if self.pictures else result.text
            for result in state.results_of(len(state.turns) - 1)
        ]
        if last.feedback:
            contents.append(last.feedback)
        ended = last.tokens.ids_T[-1] in self._chat.end_ids
        return self._chat.observation_ids(contents, self._policy.observation_role, ended)

    def _turn(self, state: Trajectory, given: list[int], sample: Sample) -> Turn:
        text = self._chat.decode(sample.ids)
        tokens = Tokens.given(given) + Tokens.sampled(sample.ids, sample.logprobs, sample.versions)
        turn = Turn(
            trajectory=state.id,
            replica=self._replica,
            tokens=tokens,
            text=text,
            finish_reason=sample.finish_reason,
        )
        if sample.finish_reason == "partial":
            return turn
        begun = [id_ for piece in state.open_pieces() for id_ in piece.tokens.sampled_ids]
        whole = self._chat.decode([*begun, *sample.ids], special=True)
        parsed = self.calling.parse(whole, state.admitted.public.tools)
        goes_on = bool(parsed.calls or parsed.feedback) and not parsed.ends
        no_turn_left = goes_on and state.turn_count + 1 >= self._policy.max_turns
        limit = sample.finish_reason == "length" or no_turn_left
        return Turn(
            trajectory=state.id,
            replica=self._replica,
            tokens=tokens,
            text=text,
            calls=parsed.calls,
            feedback=parsed.feedback,
            finish_reason="length" if limit else "stop",
            last=limit or not goes_on,
        )

    async def drain(self) -> None:
        """End running turns now, with the tokens they have."""
        for engine in self._policies.engines():
            await engine.interrupt()

    async def close(self) -> None:
        """Free the engines."""
        for engine in self._policies.engines():
            with suppress(EngineError):
                await engine.close()


def turn_seed(seed: int, turn: int) -> int:
    """The seed of one turn, derived from the trajectory's."""
    return int.from_bytes(hashlib.sha256(f"{seed}.{turn}".encode()).digest()[:8], "little") >> 1
