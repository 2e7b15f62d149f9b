"""An exported model behind HTTP, in OpenAI's dialect."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmpt_export.extras import require
from dmpt_export.requests.sources import usage_of_runtime
from training.errors import FieldError, OptionError

if TYPE_CHECKING:
    from runtime.server.limits import Bounds

KEY_VARIABLE = "DMPT_EXPORT_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class CannotListen(RuntimeError):
    """The address is in use, or not this machine's."""

    exit_code = 5


@dataclass(frozen=True)
class ServeRequest:
    model: str  # ONNX folder
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: every one of this machine
    port: int = 8080  # 0: a free one
    name: str | None = None  # of the model, for clients; None: the folder's name
    api_key_file: str | None = None  # one key a line; besides that of the environment
    cors_origin: tuple[str, ...] = ()  # web pages that may read answers; *: all
    allow_host: tuple[str, ...] = ()  # further names by which clients on this machine address the server
    parallel: int = 16  # texts written together
    queue: int = 64  # texts that may wait
    max_tokens: int | None = None  # most new tokens of one text; None: what the context holds
    max_texts: int = 16  # most texts of one request
    max_body: int = 1 << 20  # bytes of one request
    max_connections: int = 512  # open at once
    client_timeout: float = 30.0  # seconds to send a request, and to take what waits for the client
    grace: float = 30.0  # seconds for running texts after SIGTERM
    exact: bool = False  # texts are written in turn instead of together
    threads: int | None = None  # of the CPU; None: what this process may use
    device: str = "cpu"  # cpu or cuda
    no_check: bool = False  # the files' sha256 are not compared with the manifest

    def check(self) -> None:
        """Raise OptionError for impossible values, InputError for a bad key file, before a model is loaded."""
        require(self.device, "serve")
        from runtime.threads import resolve_threads

        if min(self.parallel, self.queue, self.max_texts, self.max_body, self.max_connections) < 1:
            raise OptionError("{parallel}, {queue}, {max_texts}, {max_body} and {max_connections} must be 1 or above")
        if self.max_texts > self.parallel + self.queue:
            raise OptionError("{max_texts} {} is more than {parallel} and {queue} can hold: give less", self.max_texts)
        if not 0 <= self.port < 1 << 16:
            raise OptionError("{port} {} must be from 0 (a free one) to 65535", self.port)
        with usage_of_runtime():
            resolve_threads(self.threads)
        self.keys()

    def keys(self) -> list[str]:
        """API keys of the environment and of the file; none: everyone is answered. Raises InputError."""
        found = [key] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
        if self.api_key_file is not None:
            try:
                lines = Path(self.api_key_file).read_text(encoding="utf-8").split()
            except UnicodeDecodeError as error:
                raise FieldError("{api_key_file} {} is not text: give one key a line", self.api_key_file) from error
            if not lines:
                raise FieldError("{api_key_file} {} holds no key: give one a line", self.api_key_file)
            found += lines
        return found

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK

    @property
    def served_name(self) -> str:
        return self.name or Path(self.model).resolve().name

    def bounds(self) -> Bounds:
        from runtime.server.limits import Bounds

        return Bounds(
            self.parallel, self.queue, self.max_tokens, self.max_texts, self.max_body, self.max_connections,
            self.client_timeout, self.grace, self.exact,
        )  # fmt: skip

    def listen(self) -> socket.socket:
        """Take the port, before the model is loaded. Raises CannotListen."""
        from runtime.server.connections import listen

        try:
            return listen(self.host, self.port)
        except socket.gaierror as error:
            raise OptionError("{host} {} is no address: {}", self.host, error.strerror) from error
        except OSError as error:
            raise CannotListen(
                f"cannot listen on {self.host}:{self.port} ({error.strerror}): choose another port or host, or end the "
                "program that uses it"
            ) from error

    def run(self, on_ready: Callable[[str], None]) -> int:
        """Load the model and serve it until a signal comes: the signal. on_ready: called with the API's address."""
        import runtime
        from runtime.server.app import application
        from runtime.server.connections import Server
        from runtime.server.desk import Desk
        from runtime.server.guard import LOOPBACK as OWN_NAMES

        with self.listen() as place:
            host, port = place.getsockname()[:2]
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
            with runtime.load(self.model, self.device, self.threads, verify=not self.no_check) as model:
                keys = self.keys()
                hosts = {*OWN_NAMES, *(name.lower() for name in self.allow_host)}
                desk = Desk(model, self.served_name, self.bounds())
                app = application(desk, keys, self.cors_origin, hosts if self.is_local and not keys else None)
                server = Server(app, desk, lambda: on_ready(address))
                server.run([place])
        return server.signal or 0
