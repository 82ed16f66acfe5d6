"""Server of one page on this machine alone.

    serve    a folder with a page -> its address, until the context ends

Only GET and HEAD, only files in the folder, only from this machine, and only under the names of
this machine: a page of another site cannot read the atlas through a name that it owns.
"""

import contextlib
import functools
import http.server
import io
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from mechatlas.base import RecipeError
from mechatlas.files import open_regular

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
"""Names under which the page is asked for."""
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Headers of every answer."""


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Answers with a file of the folder, or not at all."""

    def parse_request(self) -> bool:
        """Refuse requests that name another host."""
        if not super().parse_request():
            return False
        host, _, port = self.headers.get("Host", "").rpartition(":")
        if host in NAMES and port == str(self.server.server_port):  # pyright: ignore[reportAttributeAccessIssue]
            return True
        self.send_error(HTTPStatus.FORBIDDEN, "Ask for 127.0.0.1 or localhost")
        return False

    def send_head(self):
        """Open the file; folders are not listed, and links out of the folder lead nowhere."""
        path, root = Path(self.translate_path(self.path)), Path(self.directory).resolve()
        path = path / "index.html" if path == root else path
        if not path.resolve().is_relative_to(root) or not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND, "There is no such file")
            return None
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return self._send_part(path, int(asked[1]), int(asked[2])) if asked else super().send_head()

    def _send_part(self, path: Path, first: int, last: int) -> io.BytesIO | None:
        """Answer with the bytes of a file from the first to the last."""
        size = path.stat().st_size
        if not first <= last < size:
            self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"There are {size} bytes")
            return None
        with open_regular(path) as file:
            file.seek(first)
            part = file.read(last - first + 1)
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        return io.BytesIO(part)

    def end_headers(self) -> None:
        """Add the headers of every answer."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing; a terminal has better uses."""


@contextlib.contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[str]:
    """Serve a folder with an `index.html` while the context is open, and give its address.

    Args:
        folder: Folder to serve.
        port: Port on this machine; 0 for any that is free.

    Raises:
        RecipeError: The port is taken, or not for everybody.
    """
    handler = functools.partial(_Handler, directory=str(folder.resolve()))
    try:
        server = http.server.ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise RecipeError(
            f"Port {port} cannot be used ({error.strerror}). Choose another with --port, or leave "
            "it out for one that is free."
        ) from error
    with server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
