"""Services that scorers ask, in threads of a test: an HTTP scorer, and an OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


@contextmanager
def service(answer: Answer, port: int = 0) -> Iterator[str]:
    """An HTTP server that answers each POST with a status and JSON; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, body = answer(
                json.loads(self.rfile.read(int(self.headers["Content-Length"]))) | {"path": self.path}
            )
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Nothing on the test's output."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def pictures(data: list[str]) -> list[np.ndarray]:
    """Images, uint8 [H, W, 3], of base64 PNGs."""
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(item))).convert("RGB")) for item in data]


def brightness(request: dict[str, Any]) -> tuple[int, Any]:
    """The mean of each picture, 0..1, and none for a prompt "nothing"."""
    means = [float(picture.mean()) / 255 for picture in pictures(request["images"])]
    texts = [prompt["prompt"] for prompt in request["prompts"]]
    return 200, {"scores": [None if text == "nothing" else mean for text, mean in zip(texts, means, strict=True)]}


def chat(say: Callable[[list[np.ndarray], str], Any]) -> Answer:
    """An endpoint whose model says what ``say`` makes of the pictures and the question: words, or log-probabilities."""

    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        content = request["messages"][0]["content"]
        shown = pictures(
            [part["image_url"]["url"].partition(",")[2] for part in content if part["type"] == "image_url"]
        )
        said = say(shown, content[-1]["text"])
        logprobs = None
        if request.get("logprobs"):
            top = [{"token": token, "logprob": value, "bytes": None} for token, value in said.items()]
            logprobs = {"content": [{"token": "x", "logprob": 0.0, "bytes": None, "top_logprobs": top}]}
            said = "x"
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop"}
        return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}

    return answer
