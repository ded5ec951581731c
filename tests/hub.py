"""A stand-in for the Hugging Face Hub: one data set in a folder, served at the Hub's addresses."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants as constants
import pytest

from srit.data.hub import hub_file, hub_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(folder: Path, name: str, commit: str = COMMIT) -> Iterator[tuple[str, list[str]]]:
    """(address, paths that were asked for) of a server with the data set `name` at `commit`."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            path = self.path.partition("?")[0]
            files = [file for file in folder.rglob("*") if file.is_file()]
            names = [file.relative_to(folder).as_posix() for file in files]
            if re.fullmatch(rf"/api/datasets/{name}(/revision/(main|{commit}))?", path):
                listed = [{"rfilename": file} for file in names]
                self.answer(json.dumps({"id": name, "sha": commit, "siblings": listed}).encode())
            elif path == f"/api/datasets/{name}/tree/{commit}":
                self.answer(json.dumps([
                    {"type": "file", "path": path, "size": file.stat().st_size, "oid": "0" * 40}
                    for path, file in zip(names, files, strict=True)]).encode())
            elif (found := re.fullmatch(f"/datasets/{name}/resolve/(?:main|{commit})/(.*)", path)) and \
                    found[1] in names:
                self.answer((folder / found[1]).read_bytes())
            else:
                self.send_response(404)
                if "/resolve/" in path:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()

        do_GET = do_HEAD

        def answer(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def use(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """As HF_ENDPOINT and HF_HUB_CACHE do for a process, which reads them once."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    forget()


def forget() -> None:
    """As a new process: what has been downloaded stays."""
    hub_file.cache_clear()
    hub_files.cache_clear()
