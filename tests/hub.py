"""A hub of folders on this machine, speaking as much of its interface as a download takes."""

import hashlib
import http.server
import json
import threading
from contextlib import contextmanager

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Answers(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def _send(self, body, **headers):
        self.send_response(200 if body is not None else 404)
        for key, value in {"Content-Length": str(len(body or b"")), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    def do_GET(self):
        root, parts = self.server.root, self.path.split("?")[0].strip("/").split("/")
        digest = lambda path: hashlib.sha1(path.read_bytes()).hexdigest()
        if parts[:2] == ["api", "models"]:
            files = sorted((root / parts[3]).iterdir())
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": digest(f)} for f in files]
            told = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files], "tags": []}
            return self._send(json.dumps(tree if "tree" in parts else told).encode(), Content_Type="application/json")
        if "resolve" not in parts:
            return self._send(None)
        file = root / parts[1] / parts[-1]
        self.server.fetched.append(file.name)
        if not file.is_file():
            return self._send(None, X_Error_Code="EntryNotFound")
        return self._send(file.read_bytes(), X_Repo_Commit=COMMIT, ETag=f'"{digest(file)}"')

    do_HEAD = do_GET


@contextmanager
def serving(root, monkeypatch, cache):
    """The folders of `root` as repositories of any owner, for huggingface_hub in this process; gives the names of the files asked for."""
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.root, server.fetched = root, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield server.fetched
    finally:
        server.shutdown()
        server.server_close()
