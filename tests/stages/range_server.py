"""Serves parts of the files of a folder: `python range_server.py FOLDER`; prints its port. A process of its own, for rasterio
holds Python's lock while it waits for an answer. A file `left` there says how many bytes may still be sent of files called
`lost*`; `sent` gets a line for each part that was sent."""

from __future__ import annotations

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Ranges(SimpleHTTPRequestHandler):
    """Answers with parts, or with an error once the bytes are spent."""

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, whole: bool) -> None:
        path, folder = Path(self.translate_path(self.path)), Path(self.directory)
        if not path.is_file():
            return self.send_error(404)
        content, asked = path.read_bytes(), self.headers.get("Range")
        first, last = 0, len(content) - 1
        if asked:
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
        part = content[first : last + 1]
        if whole and path.name.startswith("lost") and (folder / "left").exists():
            left = int((folder / "left").read_text()) - len(part)
            if left < 0:
                return self.send_error(500)
            (folder / "left").write_text(str(left))
        with (folder / "sent").open("a") as file:
            file.write(f"{path.name} {len(part) if whole else 0}\n")
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if whole:
            self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=sys.argv[1]))
    print(server.server_port, flush=True)
    server.serve_forever()
