"""The running batch: turns join and leave it between two steps. Synchronous; one thread owns it.

    waiting ──join──► rows 0 … B-1 ──step──► tokens ──► finished turns leave, the last rows fill their places

One step is one forward pass over the B rows' last tokens and the joining turns' prompts. Turns with the
same prompt (the members of a group) share its computation; a turn that continues a trajectory starts from
the keys and values of the turn before.

Shapes: B running rows, P joining rows that compute, M = B + P + followers rows that sample, N tokens.
"""

from collections import deque

import numpy as np
import torch

from engines.policy_model import PolicyModel, Rows
from engines.sampling import draw, stream, uniforms
from engines.turns import Finish, KeptPrefixes, Prefix, Turn, common_prefix

_IDLE_BYTES = 256 << 20
"""More than this is not held while nothing runs."""


class Join:
    """A prompt on its way into the batch, with all the turns that have it."""

    def __init__(self, turn: Turn) -> None:
        self.turns = [turn]
        self.prompt_T = turn.prompt_T
        self.start = 0
        """How many of its tokens need no computing; at most all but the last."""
        self.kept: Prefix | None = None
        self.row = -1
        """The running row that they come from, if they are not kept."""

    @property
    def computed_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.prompt_T) - self.start


class Batch:
    """Rows and what each needs for its next token."""

    def __init__(
        self,
        model: PolicyModel,
        ends: frozenset[int],
        *,
        slots: int,
        prefill_tokens: int,
        kept_bytes: int,
    ) -> None:
        """`ends`: tokens that end a turn; `prefill_tokens`: bound of what joins in one step, so that
        running rows are not held up for long (a longer prompt joins alone)."""
        self.turns: list[Turn] = []
        """[B] row by row."""
        self.policy_version = -1
        self._model = model
        self._ends = ends
        self._slots = slots
        self._prefill_tokens = prefill_tokens
        self._kept = KeptPrefixes(kept_bytes)
        self._tokens_S = np.zeros(slots, dtype=np.int64)  # sampled, not yet fed
        self._positions_S = np.zeros(slots, dtype=np.int64)  # where that token stands
        self._streams_S = np.zeros(slots, dtype=np.uint64)
        self._temperatures_S = np.zeros(slots, dtype=np.float32)

    def step(self, waiting: deque[Turn]) -> list[Turn]:
        """Let waiting turns join, and sample one token for each row; gives the turns that are finished."""
        running = len(self.turns)
        joins = self._select(waiting)
        leaders = [join.turns[0] for join in joins]
        followers = [turn for join in joins for turn in join.turns[1:]]
        if not (running or joins):
            return []
        span = int(self._positions_S[:running].max()) + 1 if running else 0
        join_span = max((len(join.prompt_T) for join in joins), default=0)
        rows = running + len(leaders) + len(followers)
        self._model.slots.reserve(rows, max(span, join_span), self._slots)
        self._bring_prefixes(joins)
        logits_MV = self._forward(joins, span, join_span)
        self._seat(leaders + followers)
        if followers:
            logits_MV = logits_MV[self._follow(joins, running, join_span)]
        tokens, logprobs = self._draw(logits_MV)
        return self._leave(self._record(tokens, logprobs))

    def swap(self, tensors: dict[str, torch.Tensor], policy_version: int) -> None:
        """Take new weights; running rows keep the keys and values that they have."""
        for turn in self.turns:
            turn.mark(self.policy_version)
        self._model.take(tensors)
        self._kept.clear()
        self.policy_version = policy_version

    def end(self) -> list[Turn]:
        """Finish every turn with what it has."""
        return self._leave([(row, "partial") for row in range(len(self.turns))])

    def drop_abandoned(self) -> None:
        """Free the rows whose callers have gone away."""
        gone = [row for row, turn in enumerate(self.turns) if turn.abandoned]
        self._leave([(row, "partial") for row in gone])

    def _select(self, waiting: deque[Turn]) -> list[Join]:
        """Take turns off the queue, in its order, as far as slots and the step's budget allow."""
        joins: dict[bytes, Join] = {}
        free = self._slots - len(self.turns)
        budget = self._prefill_tokens
        while waiting and free:
            turn = waiting[0]
            if turn.abandoned:
                waiting.popleft()
                continue
            prompt = turn.prompt_T.tobytes()
            if prompt in joins:
                joins[prompt].turns.append(turn)
            else:
                join = self._plan(turn)
                budget -= join.computed_tokens
                if budget < 0 and joins:
                    break
                joins[prompt] = join
            waiting.popleft()
            free -= 1
        return list(joins.values())

    def _plan(self, turn: Turn) -> Join:
        """Find who has computed the longest prefix of a prompt under the present weights."""
        join = Join(turn)
        most = len(turn.prompt_T) - 1  # the last token's logits are needed
        kept = self._kept.find(turn.request.cache_key)
        if kept is not None:
            join.kept = kept
            join.start = min(common_prefix(kept.ids_T, turn.prompt_T), most)
            return join
        for row, other in enumerate(self.turns):
            if join.start == most:
                break
            if other.head == turn.head and other.prefill_version == self.policy_version:
                shared = min(common_prefix(other.prompt_T, turn.prompt_T), most)
                if shared > join.start:
                    join.start, join.row = shared, row
        return join

    def _bring_prefixes(self, joins: list[Join]) -> None:
        for row, join in enumerate(joins, start=len(self.turns)):
            if join.kept is not None:
                self._model.slots.write(row, join.kept.cache[:, :, : join.start])
                self._kept.forget(join.turns[0].request.cache_key)
            elif join.start:
                self._model.slots.copy_rows([join.row], [row], join.start)

    def _forward(self, joins: list[Join], span: int, join_span: int) -> torch.Tensor:
        """Logits [B + P, V] of the running rows' last tokens and of the joining prompts'."""
        running = len(self.turns)
        lengths = [join.computed_tokens for join in joins]
        decode_3B = np.stack(
            [self._tokens_S[:running], np.arange(running), self._positions_S[:running]]
        )
        packed = [decode_3B]
        for row, join in enumerate(joins, start=running):
            positions = np.arange(join.start, len(join.prompt_T))
            packed.append(
                np.stack([join.prompt_T[join.start :], np.full_like(positions, row), positions])
            )
        packed_3N = torch.from_numpy(np.concatenate(packed, axis=1)).to(self._model.device)
        parts = []
        if running:
            parts.append(Rows(slice(0, running), [1] * running, span))
        if joins:
            parts.append(Rows(slice(running, running + len(joins)), lengths, join_span))
        wanted_M = np.concatenate([np.arange(running), running + np.cumsum(lengths) - 1])
        wanted = torch.from_numpy(wanted_M.astype(np.int64)).to(self._model.device)
        return self._model.forward(packed_3N, parts, wanted, self._seen(joins))

    def _seen(self, joins: list[Join]) -> list[torch.Tensor]:
        """What the joining prompts show at their negative places, as far as these need computing."""
        seen = []
        for join in joins:
            for image in join.turns[0].request.images:
                computed = sum(place >= join.start for place in image.places)
                if computed:
                    seen.append(self._model.features(image)[-computed:])
        return seen

    def _seat(self, turns: list[Turn]) -> None:
        """Give joining turns their rows."""
        for row, turn in enumerate(turns, start=len(self.turns)):
            turn.prefill_version = self.policy_version
            self._positions_S[row] = len(turn.prompt_T) - 1
            self._streams_S[row] = stream(turn.request.seed)
            self._temperatures_S[row] = turn.request.temperature
        self.turns += turns

    def _follow(self, joins: list[Join], running: int, join_span: int) -> list[int]:
        """Copy each prompt's keys and values to the other turns that have it.

        Gives, for each row, the row whose logits are its own.
        """
        sources = list(range(running + len(joins)))
        for row, join in enumerate(joins, start=running):
            sources += [row] * (len(join.turns) - 1)
        first = running + len(joins)
        self._model.slots.copy_rows(sources[first:], list(range(first, len(sources))), join_span)
        return sources

    def _draw(self, logits_MV: torch.Tensor) -> tuple[list[int], list[float]]:
        rows = len(self.turns)
        self._positions_S[:rows] += 1
        uniforms_M = uniforms(self._streams_S[:rows], self._positions_S[:rows])
        settings_2M = np.stack([self._temperatures_S[:rows], uniforms_M])
        temperatures_M, uniforms_on_device_M = torch.from_numpy(settings_2M).to(logits_MV.device)
        greedy = not self._temperatures_S[:rows].all()
        tokens_M, logprobs_M = draw(logits_MV, temperatures_M, uniforms_on_device_M, greedy=greedy)
        # The step's one wait for the device; float64 holds every token id exactly.
        both_2M = torch.stack([tokens_M.double(), logprobs_M.double()]).cpu().numpy()
        self._tokens_S[:rows] = both_2M[0]
        return self._tokens_S[:rows].tolist(), both_2M[1].tolist()

    def _record(self, tokens: list[int], logprobs: list[float]) -> list[tuple[int, Finish]]:
        """Give each turn its token; tells who is done."""
        done: list[tuple[int, Finish]] = []
        rows = zip(self.turns, tokens, logprobs, strict=True)
        for row, (turn, token, logprob) in enumerate(rows):
            turn.sampled.append(token)
            turn.logprobs.append(logprob)
            stops = turn.stops
            if token in self._ends or (stops and stops.complete(turn.sampled, turn.begun)):
                done.append((row, "stop"))
            elif len(turn.sampled) >= turn.limit:
                done.append((row, "length"))
        return done

    def _leave(self, done: list[tuple[int, Finish]]) -> list[Turn]:
        """Finish turns, keep their prefixes, and fill their rows with the last ones."""
        finished = [self.turns[row] for row, _ in done]
        for row, reason in done:
            turn = self.turns[row]
            turn.mark(self.policy_version)
            self._keep(row, turn)
            turn.finish(reason)
        left = {row for row, _ in done}
        remaining = len(self.turns) - len(left)
        holes = [row for row in sorted(left) if row < remaining]
        movers = [row for row in range(remaining, len(self.turns)) if row not in left]
        if movers:
            span = int(self._positions_S[movers].max())
            self._model.slots.copy_rows(movers, holes, span)
            for state_S in (
                self._tokens_S,
                self._positions_S,
                self._streams_S,
                self._temperatures_S,
            ):
                state_S[holes] = state_S[movers]
            for mover, hole in zip(movers, holes, strict=True):
                self.turns[hole] = self.turns[mover]
        del self.turns[remaining:]
        if not self.turns and self._model.slots.nbytes > _IDLE_BYTES:
            self._model.slots.release()
        return finished

    def _keep(self, row: int, turn: Turn) -> None:
        """Keep what the trajectory's next turn will begin with, unless older weights computed a part."""
        if not turn.request.cache_key or turn.prefill_version != self.policy_version:
            return
        cached = int(self._positions_S[row])  # the last sampled token was not fed
        sampled_N = np.array(turn.sampled, dtype=np.int64)
        ids_T = np.concatenate([turn.prompt_T, sampled_N])[:cached]
        self._kept.keep(turn.request.cache_key, Prefix(ids_T, self._model.slots.read(row, cached)))
