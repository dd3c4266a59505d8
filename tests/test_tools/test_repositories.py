"""Where the repositories of the `repo` tool come from: folders, bundles, servers, a cache; and what is refused."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tools.errors import ToolError
from tools.repo import Repo
from tools.sandbox.ns import NamespaceSandbox
from tools.sandbox.sandbox import Limits

pytestmark = pytest.mark.asyncio(loop_scope="module")


def git(folder: Path, *arguments: str) -> str:
    names = {f"GIT_{w}_{n}": "x" for w in ("AUTHOR", "COMMITTER") for n in ("NAME", "EMAIL")}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.check_output(command, env=os.environ | names, text=True).strip()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where repositories lie: `calc`."""
    folder = tmp_path_factory.mktemp("repositories")
    calc = folder / "calc"
    calc.mkdir()
    (calc / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    git(calc, "init", "--quiet")
    git(calc, "add", "--all")
    git(calc, "commit", "--quiet", "--message=base")
    return folder


@pytest.fixture(scope="module")
def base(root: Path) -> str:
    return git(root / "calc", "rev-parse", "HEAD")


@pytest.fixture
def serve_git(root: Path, http_serving) -> Iterator[str]:
    """The URL of `calc` on a real git server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            length = int(self.headers.get("content-length") or 0)
            about = {
                "GIT_PROJECT_ROOT": str(root),
                "GIT_HTTP_EXPORT_ALL": "1",
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "REQUEST_METHOD": self.command,
                "CONTENT_TYPE": self.headers.get("content-type", ""),
                "GIT_PROTOCOL": self.headers.get("git-protocol", ""),
                "HTTP_CONTENT_ENCODING": self.headers.get("content-encoding", ""),
            }
            reply = subprocess.run(
                ["git", "http-backend"],
                input=self.rfile.read(length),
                env=os.environ | about,
                capture_output=True,
                check=True,
            ).stdout
            self.wfile.write(b"HTTP/1.0 200 OK\r\n" + reply)

        do_POST = do_GET

    with http_serving(Handler) as url:
        yield f"{url}/calc/.git"


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"commit": "0" * 40}, "the task's public.extra has no `repo`"),
        ({"repo": "calc"}, "must be the full id of a commit, not None"),
        ({"repo": "calc", "commit": "HEAD"}, "must be the full id of a commit, not 'HEAD'"),
        ({"repo": "calc", "commit": "--upload-pack=touch x"}, "must be the full id of a commit"),
        (
            {"repo": "../", "commit": "0" * 40},
            "it is not in .*, the folder tools.options.repo.root",
        ),
        ({"repo": "/etc", "commit": "0" * 40}, "repository_refused"),
        ({"repo": "file:///etc", "commit": "0" * 40}, "repository_refused"),
        ({"repo": "ext::sh -c date", "commit": "0" * 40}, "nothing at"),
        ({"repo": "https://host.example/x", "commit": "0" * 40}, "add 'host.example' to"),
        ({"repo": "nothing", "commit": "0" * 40}, "nothing at"),
        ({"repo": "calc", "commit": "0" * 40}, "fetch_failed"),
    ],
)
async def test_what_a_task_may_not_name(root: Path, task: dict[str, str], says: str) -> None:
    """It is no fault of the policy, which never chose it."""
    with (
        Repo().configured({"root": str(root)}).repositories("") as repositories,
        pytest.raises(ToolError, match=says),
    ):
        await repositories.commit(task)


async def test_a_bundle_a_url_and_a_cache(
    root: Path, base: str, sandbox: NamespaceSandbox, serve_git: str, tmp_path: Path
) -> None:
    """A repository may be one file, or elsewhere; a commit that is in the cache is not fetched again."""
    git(root / "calc", "bundle", "create", "--quiet", str(root / "calc.bundle"), "--all")
    options = {"root": str(root), "hosts": ["127.0.0.1"], "cache": "cache"}
    tool = Repo().configured(options)
    for place in ("calc.bundle", f"file://{root}/calc", serve_git):
        for _ in range(2):
            with tool.repositories(str(tmp_path)) as repositories:
                task = {"repo": place, "commit": base}
                code = "view('calc.py', 1, 0)"
                seen = await repositories.run(sandbox.run, task, code, b"", Limits())
            assert b"return a - b" in seen.output
            (root / "calc.bundle").write_bytes(b"no bundle any more")
    assert len(list((tmp_path / "cache").iterdir())) == 3


async def test_members_of_a_group_fetch_once(root: Path, base: str, tmp_path: Path) -> None:
    """They begin at the same moment."""
    with (
        Repo()
        .configured({"root": str(root), "cache": "cache"})
        .repositories(str(tmp_path)) as found
    ):
        task = {"repo": "calc", "commit": base}
        commits = await asyncio.gather(*(found.commit(task) for _ in range(8)))
    assert len({commit.pack for commit in commits}) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1
