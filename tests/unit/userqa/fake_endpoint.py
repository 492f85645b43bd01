"""A real HTTP server that speaks the chat completions protocol and answers from the prompt alone.

The same request always gets the same reply: topics are chosen by a hash of the body, of a user's
ten answers the first is revised and the second dropped. A test may let single requests go wrong.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 100, "completion_tokens": 20}


@dataclass(frozen=True)
class Asked:
    """One request as it arrived."""

    number: int
    time_s: float
    body: str
    authorization: str

    @property
    def data(self) -> dict[str, Any]:
        """The body, decoded."""
        data: dict[str, Any] = json.loads(self.body)
        return data

    @property
    def text(self) -> str:
        """All messages in one string."""
        return "\n".join(message["content"] for message in self.data["messages"])

    @property
    def step(self) -> str:
        """pick, draft or reflect."""
        first = self.data["messages"][1]["content"]
        return "reflect" if "\nDRAFTS\n" in first else "pick" if "Choose the" in first else "draft"

    @property
    def is_mending(self) -> bool:
        """Asked again after a malformed reply."""
        return len(self.data["messages"]) > 2


@dataclass(frozen=True)
class Said:
    """A reply in place of the usual one."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    is_cut: bool = False
    """The connection breaks before the body is whole."""


def completion(content: str | None, usage: dict[str, int] | None = USAGE) -> str:
    """A chat completion's body."""
    reply: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": content}}]}
    return json.dumps(reply if usage is None else {**reply, "usage": usage})


def usual_content(asked: Asked) -> str:
    """What a well-behaved model says; it names the request, so that every reply is its own."""
    mark = hashlib.sha256(asked.body.encode()).hexdigest()[:12]
    task = asked.data["messages"][1]["content"].rpartition("END OF PROFILE")[2]
    if asked.step == "reflect":
        drafts = [json.loads(line) for line in task.splitlines() if line.startswith('{"topic"')]
        verdicts = ["revise", "drop", *["keep"] * len(drafts)]
        answers = [
            {"topic": draft["topic"], "verdict": verdict, "answer": f"Corrected {mark}."}
            for draft, verdict in zip(drafts, verdicts, strict=False)
        ]
        return json.dumps({"answers": answers})
    names = re.findall(r"^([a-z0-9_]+): ", task, flags=re.MULTILINE)
    if asked.step == "pick":
        names.sort(key=lambda name: hashlib.sha256(f"{mark}{name}".encode()).hexdigest())
        return json.dumps({"topics": names[:10], "mark": mark})
    return json.dumps(
        {
            "answers": [
                {"topic": name, "query": f"What about {name}?", "answer": f"Much, {mark}."}
                for name in names
            ]
        }
    )


class _Listener(ThreadingHTTPServer):
    # http.server lets five connections wait, less than the clients open at once; on a busy machine
    # the system then resets some, which a test without retries takes for a failing endpoint.
    request_queue_size = 128
    daemon_threads = True
    block_on_close = False


class FakeEndpoint:
    """The server; use as `with`. `misbehave` returns a reply for a request, or None."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.content_of: dict[str, str] = {}
        """Usual reply by body."""
        self.num_replied = 0
        self.delay_s = 0.0
        self.most_at_once = 0
        self.misbehave: Callable[[Asked], Said | None] = lambda asked: None
        self._at_once = 0
        self._lock = threading.Lock()
        self._server = _Listener(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        """Base URL for a client."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "FakeEndpoint":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, body: str, authorization: str) -> Said:
        """Note a request and make its reply."""
        with self._lock:
            asked = Asked(len(self.asked), time.monotonic(), body, authorization)
            self.asked.append(asked)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        said = self.misbehave(asked)
        if said is None:
            content = usual_content(asked)
            self.content_of[body] = content
            said = Said(body=completion(content), delay_s=self.delay_s)
        time.sleep(said.delay_s)
        with self._lock:
            self._at_once -= 1
        return said

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                said = endpoint.answer(body, self.headers.get("Authorization", ""))
                payload = said.body.encode()
                try:
                    self.send_response(said.status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(payload) + said.is_cut))
                    self.close_connection = said.is_cut
                    for name, value in said.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(payload)
                except OSError:
                    return  # The client was killed or lost patience.
                endpoint.num_replied += 1

            def log_message(self, *_: object) -> None:
                pass

        return Handler
