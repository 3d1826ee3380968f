"""A judge on this machine: a server that speaks OpenAI's chat completions and does as a test tells it.

It writes down what it was asked. `answers` are given in turn, the last one for ever; each is the text of a reply, or a
function of the handler for everything that goes wrong on the way.
"""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StubJudge:
    """What the server was asked, and what it will answer. It changes with every request."""

    def __init__(self):
        self.answers = ["Fine. Rating: [[7]]"]
        self.asked = []  # the body of each request
        self.keys = []  # the Authorization header of each
        self.url = ""
        self.lock = threading.Lock()

    def take(self, body, key):
        with self.lock:
            self.asked.append(body)
            self.keys.append(key)
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def refuse(status, text="no", **headers):
    """An answer of another status than 200."""

    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(json.dumps({"error": {"message": text}}).encode())

    return answer


def say(data):
    """These bytes instead of a chat completion."""

    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def hang_up(handler):
    """Close the connection without a word."""
    handler.connection.close()


def be_silent(seconds):
    """Say nothing for so long."""

    def answer(handler):
        time.sleep(seconds)
        hang_up(handler)

    return answer


@contextmanager
def stub_judge():
    """A judge that listens until the block ends."""
    judge = StubJudge()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body["path"] = self.path
            answer = judge.take(body, self.headers.get("Authorization"))
            if callable(answer):
                answer(self)
            else:
                say(json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode())(self)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            pass  # a client that gave up is what some tests are about

    server = Server(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
