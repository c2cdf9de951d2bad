"""A metadata service as clouds have it, for the tests of the watcher of spot machines."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class Cloud(ThreadingHTTPServer):
    """A metadata service: IMDSv2's tokens, Google's header, and the pages of a test."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages: dict[str, str] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def takes_away(self, *, seconds: float) -> None:
        """Give AWS's notice."""
        at = datetime.now(UTC) + timedelta(seconds=seconds)
        self.pages["/latest/meta-data/spot/instance-action"] = json.dumps(
            {"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"}
        )


class _Handler(BaseHTTPRequestHandler):
    TOKEN: ClassVar = "a token"
    server: Cloud

    def do_PUT(self) -> None:
        self.server.asked.append(f"PUT {self.path}")
        seconds = int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "0"))
        self._answer(200 if self.path == "/latest/api/token" and 1 <= seconds <= 21600 else 400, self.TOKEN)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/computeMetadata/"):
            is_allowed = self.headers.get("Metadata-Flavor") == "Google"
        else:
            is_allowed = self.headers.get("X-aws-ec2-metadata-token") == self.TOKEN
        page = self.server.pages.get(self.path)
        self._answer(403 if not is_allowed else 404 if page is None else 200, page or "")

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


def serve() -> Iterator[Cloud]:
    """Run one for as long as a test lasts."""
    with Cloud() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
