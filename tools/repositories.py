"""Where the repositories of tasks come from: one commit as a pack, fetched once, then from a cache.

The pack of a commit holds its files and no other commit: from it neither the future nor the past can be read. It goes
into a sandbox as bytes, and git there makes the work tree; see worktree.py.

`public.extra.repo` of a task is a path (a repository, or a bundle), or a URL of a host that the recipe names;
`public.extra.commit` is the full id of a commit. Submodules and large files kept elsewhere (LFS) are not fetched.
"""

import asyncio
import hashlib
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from msgspec import Meta
from msgspec.structs import replace

from tools import worktree
from tools.errors import ToolError
from tools.observation import decode_output
from tools.sandbox.sandbox import Limits, Outcome
from tools.tool import Options

_FETCH_S = 600.0
_SOURCE = inspect.getsource(worktree)
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NO_GIT = "the tool `repo` needs git on this host: install it (apt-get install git)"
_UPLOAD_PACK = "git -c safe.directory=* -c uploadpack.allowAnySHA1InWant=true upload-pack"
"""The other side of a fetch from this host: any commit may be asked for, whoever owns the repository."""


def require_git() -> None:
    """Raises ToolError where there is none: when a run begins, and not at its first call."""
    if shutil.which("git") is None:
        raise ToolError("no_git", _NO_GIT)


class RepoOptions(Options, frozen=True):
    """Where repositories are, and the room for one."""

    root: str = ""
    """The folder where a task's path begins and that it must not leave; by default the recipe's."""
    hosts: list[str] = []
    """Hosts that a task's URL may name, e.g. `github.com`."""
    cache: str = ""
    """A folder, beginning at the recipe's, that keeps commits from run to run; by default each process fetches them."""
    disk_mb: Annotated[int, Meta(ge=16)] = 256
    """The work tree, git's files and all that commands write: in one session, and in the trial of a patch."""
    memory_mb: Annotated[int, Meta(ge=64)] = 512
    """All processes of one session, or of a trial."""


class Runs(Protocol):
    """A sandbox's `run`, or a session's."""

    async def __call__(self, text: str, /, *, stdin: bytes, limits: Limits) -> Outcome:
        """See Sandbox and Session."""
        ...


class Commit(NamedTuple):
    """The files of a repository at one commit."""

    id: str
    pack: bytes
    """As git packs them."""


class Repositories:
    """Finds, fetches and keeps commits."""

    def __init__(self, options: RepoOptions, root: Path, cache: Path) -> None:
        self._options = options
        self._root = root.resolve()
        self._cache = cache
        self._fetching: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def commit(self, task: Mapping[str, Any]) -> Commit:
        """What a task's `public.extra` names. Raises ToolError."""
        name, commit = task.get("repo"), task.get("commit")
        if not isinstance(name, str) or not name:
            raise ToolError("no_repository", "the task's public.extra has no `repo`")
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            detail = f"public.extra.commit must be the full id of a commit, not {commit!r}"
            raise ToolError("no_repository", detail)
        source = self._find(name)
        key = hashlib.sha256(f"{source}\0{commit}".encode()).hexdigest()
        path = self._cache / f"{key}.pack"
        lock = self._fetching.setdefault(key, asyncio.Lock())
        async with lock:
            if not path.exists():
                await self._fetch(source, commit, path)
        return Commit(commit, await asyncio.to_thread(path.read_bytes))

    def with_room(self, limits: Limits) -> Limits:
        """The limits of a world that holds a work tree; a single file may take all of it."""
        disk_bytes, memory_bytes = self._options.disk_mb << 20, self._options.memory_mb << 20
        return replace(
            limits,
            disk_bytes=disk_bytes,
            file_bytes=disk_bytes,
            memory_bytes=memory_bytes,
            process_memory_bytes=max(limits.process_memory_bytes, 2 * memory_bytes),
        )

    async def run(
        self, run: Runs, task: Mapping[str, Any], code: str, stdin: bytes, limits: Limits
    ) -> Outcome:
        """Run code in a work tree of a task's commit: of a fresh sandbox, or as the first cell of a session.

        The names of worktree.py are there. Raises ToolError when there is no work tree.
        """
        commit = await self.commit(task)
        prelude = f"{_SOURCE}\ncheck_out({len(commit.pack)}, {commit.id!r})\n"
        outcome = await run(
            prelude + code, stdin=commit.pack + stdin, limits=self.with_room(limits)
        )
        if worktree.CHECKED_OUT not in outcome.output:
            said = decode_output(outcome.output).strip()
            raise ToolError("checkout_failed", f"{commit.id}: {outcome.reason}: {said}")
        return outcome

    def _find(self, name: str) -> str:
        """The path or URL for git. Raises ToolError for what the recipe does not allow."""
        url = urlsplit(name)
        if url.scheme in ("http", "https"):
            if url.hostname not in self._options.hosts:
                detail = f"{name}: add {url.hostname!r} to tools.options.repo.hosts to allow it"
                raise ToolError("repository_refused", detail)
            return name
        path = (self._root / name.removeprefix("file://")).resolve()
        if not path.is_relative_to(self._root):
            detail = f"{name}: it is not in {self._root}, the folder tools.options.repo.root"
            raise ToolError("repository_refused", detail)
        if not path.exists():
            raise ToolError("no_repository", f"nothing at {path}")
        return str(path)

    async def _fetch(self, source: str, commit: str, target: Path) -> None:
        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=self._cache) as folder:
            if _is_bundle(source):
                await _git("clone", "--quiet", "--bare", source, f"{folder}/bundle")
                source = f"{folder}/bundle"
            one = f"{folder}/one"
            await _git("init", "--quiet", "--bare", one)
            settings = ("-c", "fetch.unpackLimit=1", "-c", "http.followRedirects=false")
            options = ("--quiet", "--depth=1", "--no-tags", f"--upload-pack={_UPLOAD_PACK}")
            await _git("-C", one, *settings, "fetch", *options, source, commit)
            _keep_pack(Path(one), target)


def _is_bundle(source: str) -> bool:
    return os.path.isfile(source)


def _keep_pack(repository: Path, target: Path) -> None:
    """Move its only pack, at once, to where others look for it."""
    (pack,) = repository.glob("objects/pack/*.pack")
    os.replace(pack, target)


async def _git(*arguments: str) -> None:
    """Run git on this host. Raises ToolError."""
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    environment |= {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": "file:http:https",
        "GIT_NO_LAZY_FETCH": "1",  # a repository is data: it must not name commands to run
    }
    try:
        process = await asyncio.create_subprocess_exec(
            "git",
            *arguments,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise ToolError("no_git", _NO_GIT) from error
    try:
        async with asyncio.timeout(_FETCH_S):
            _, said = await process.communicate()
    except TimeoutError:
        raise ToolError("fetch_failed", f"git {arguments} took over {_FETCH_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise ToolError("fetch_failed", said.decode(errors="replace").strip())
