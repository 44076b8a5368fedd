"""A real server on this machine that says what W&B's client asks of its own, each answer after a pause."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROJECT = {"id": "cA==", "name": "proj", "entity": {"id": "ZQ==", "name": "me"}}
BUCKET = {"id": "aWQ=", "name": "run1", "displayName": "student", "historyLineCount": 0, "project": PROJECT}
ANSWERS = {  # by a word of the question
    "UpsertBucket": {"upsertBucket": {"bucket": BUCKET, "inserted": True}},
    "CreateRunFiles": {"createRunFiles": {"runID": "run1", "uploadHeaders": [], "files": []}},
}


class SlowWandb:
    """`pause_s` before each answer; `asked` has the paths, `history` the steps that were uploaded."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s, self.asked, self.history = pause_s, [], []
        self._gone = threading.Event()

    def __enter__(self) -> SlowWandb:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"world": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *exc_info) -> None:
        self._gone.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    world: SlowWandb

    def log_message(self, *args) -> None:
        pass

    def do_POST(self) -> None:
        question = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        self.world.asked.append(self.path)
        if self.path.endswith("/file_stream"):
            files = json.loads(question).get("files") or {}
            lines = files.get("wandb-history.jsonl", {}).get("content", [])
            self.world.history += [json.loads(line).get("step") for line in lines]
        self.world._gone.wait(self.world.pause_s)
        data = next((answer for word, answer in ANSWERS.items() if word in question), {})
        body = json.dumps({"data": data}).encode()
        with contextlib.suppress(OSError):  # whoever asked has given up
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    do_GET = do_PUT = do_POST
