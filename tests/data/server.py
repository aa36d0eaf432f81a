"""A real HTTP server of a folder, with ranges, ETags and If-Match, that misbehaves as it is told."""

from __future__ import annotations

import email.utils
import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = str | None
"""What an answer is: None (as it should be), "429", "500", "503", "403", "404", "reset", "short", "slow" or "stall"."""


@contextmanager
def serve(
    folder: Path,
    fault: Callable[[str, int], Fault] = lambda path, number: None,
    etag: str = "strong",
    ranges: bool = True,
    redirect: Callable[[str], str | None] = lambda path: None,
    heard: list[dict[str, str]] | None = None,
) -> Iterator[tuple[str, list[tuple[str, Fault]]]]:
    """(address, log of (path, fault)) of a server of files.

    `fault` is asked with the path and the number of each request for a part of a file; `etag` is "strong", "weak" or
    "none"; without `ranges` every answer is a whole file; `redirect` tells where a path is instead, if anywhere;
    `heard` is given the headers of each request.
    """
    log: list[tuple[str, Fault]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            if heard is not None:
                heard.append({"method": self.command, **self.headers})
            if place := redirect(self.path):
                return self.reply(302, b"", body, {"Location": place})
            file = folder / self.path.lstrip("/").split("?")[0]
            if file.is_dir():
                links = "".join(f'<a href="{name}">{name}</a>' for name in sorted(os.listdir(file)))
                return self.reply(200, links.encode(), body, {"Content-Type": "text/html"})
            trouble = None
            if body and "Range" in self.headers:
                with lock:
                    trouble = fault(self.path, len(log))
                    log.append((self.path, trouble))
            if trouble and trouble.isdigit():
                return self.reply(int(trouble), b"no", body, {"Retry-After": "1"} if trouble == "429" else {})
            if trouble == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return self.connection.close()
            if not file.is_file():
                return self.reply(404, b"", body, {})
            content, state = file.read_bytes(), file.stat()
            version = hashlib.sha256(f"{state.st_mtime_ns} {state.st_size}".encode()).hexdigest()[:16]
            tags = {"strong": {"ETag": f'"{version}"'}, "weak": {"ETag": f'W/"{version}"'}, "none": {}}[etag]
            headers = {
                **tags,
                "Accept-Ranges": "bytes",
                "Last-Modified": email.utils.formatdate(state.st_mtime, usegmt=True),
            }
            if self.headers.get("If-Match", f'"{version}"') != f'"{version}"':
                return self.reply(412, b"", body, {})
            status = 200
            if "Range" in self.headers and ranges:
                start, stop = self.headers["Range"].removeprefix("bytes=").split("-")
                status, size = 206, len(content)
                headers["Content-Range"] = f"bytes {start}-{stop}/{size}"
                content = content[int(start) : int(stop) + 1]
            self.reply(status, content, body, headers, trouble)

        def reply(
            self, status: int, content: bytes, body: bool, headers: dict[str, str], trouble: Fault = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if not body:
                return
            half = len(content) // 2
            if trouble in ("short", "stall"):
                self.wfile.write(content[:half])
                self.wfile.flush()
                time.sleep(60 if trouble == "stall" else 0)
                self.close_connection = True
            elif trouble == "slow":
                for part in (content[:half], content[half:]):
                    self.wfile.write(part)
                    self.wfile.flush()
                    time.sleep(0.3)
            else:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

        def handle_error(self, *args: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
