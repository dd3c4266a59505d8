"""A model by its name, from a hub: a server on this machine that speaks as much of its protocol as a download takes."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from recipes.arithmetic import model

NAME = "somebody/small-model"
COMMIT = "c" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    model(made)
    (made / "pytorch_model.bin").write_bytes(b"pickled")
    return made


@pytest.fixture
def hub(folder: Path, http_serving) -> Iterator[str]:
    """Its address. It has one model, the folder's."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    tree = [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in files.items()
    ]
    about = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
    pages = {
        f"/api/models/{NAME}/revision/main": json.dumps(about).encode(),
        f"/api/models/{NAME}/tree/{COMMIT}": json.dumps(tree).encode(),
        **{f"/{NAME}/resolve/{COMMIT}/{name}": data for name, data in files.items()},
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            data = pages.get(self.path.partition("?")[0])
            self.send_response(404 if data is None else 200)
            data = data or b""
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", hashlib.sha1(data).hexdigest())
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

    with http_serving(Handler) as url:
        yield url


def test_a_model_of_a_hub_by_name(hub: str, folder: Path, tmp_path: Path) -> None:
    """All that a model needs, and nothing that is pickled."""
    program = f"from actors.training import _download; print(_download({NAME!r}))"
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache")}
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    found = {path.name: path.read_bytes() for path in Path(output.stdout.strip()).iterdir()}
    wanted = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".bin"}
    assert found == wanted
    assert "model.safetensors" in wanted
