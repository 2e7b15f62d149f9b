"""A server of static files that can cut an answer off, with or without byte ranges."""

from __future__ import annotations

import re
import threading
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class StaticServer:
    """Serves `folder` while it is entered; `address` has no slash at its end.

    requests: path and Range header of each request, in order. cut: path -> bytes after which its next answer ends.
    shift: ranges begin that many bytes late, as from a faulty proxy.
    """

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        self.folder, self.ranges = folder, ranges
        self.requests: list[tuple[str, str | None]] = []
        self.cut: dict[str, int] = {}
        self.shift = 0

    def __enter__(self) -> StaticServer:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self, directory=str(self.folder)))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def asked(self, path: str) -> list[str | None]:
        """The Range headers of the requests for `path` since the last call."""
        ranges = [given for name, given in self.requests if name == path]
        self.requests = [request for request in self.requests if request[0] != path]
        return ranges


class Handler(SimpleHTTPRequestHandler):
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def __init__(self, served: StaticServer, *arguments: Any, **named: Any) -> None:
        self.served = served
        super().__init__(*arguments, **named)

    def do_GET(self) -> None:
        path, wanted = self.path.partition("?")[0], self.headers.get("Range")
        self.served.requests.append((path, wanted))
        file = Path(self.translate_path(path))
        file = file / "index.html" if file.is_dir() else file
        if not file.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        data = file.read_bytes()
        start = re.fullmatch(r"bytes=(\d+)-", wanted or "")
        first = int(start[1]) + self.served.shift if start and self.served.ranges else None
        if first is not None and first >= len(data):
            self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return
        self.send_response(HTTPStatus.OK if first is None else HTTPStatus.PARTIAL_CONTENT)
        if first is not None:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        body = data[first or 0 :]
        self.send_header("Content-Type", self.guess_type(str(file)))
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")  # browsers take their copy for new for days
        self.end_headers()
        self.wfile.write(body[: self.served.cut.pop(path, len(body))])

    def log_message(self, *_: object) -> None:
        """Nothing: tests read `requests`."""
