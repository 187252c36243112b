"""An OpenAI-compatible server on this machine that does what a test tells it to."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(reply="<think>so</think><answer>x</answer>", **usage):
    """The body of a chat completion."""
    message = {"role": "assistant", "content": reply}
    return {"choices": [{"message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, **usage}}


def question_text(body):
    """The last text of a request, which names the question."""
    return body["messages"][0]["content"][-1]["text"]


class TeacherServer:
    """plan(nth request with these words, body) says what to do: the arguments of Handler.answer.

    models: the names that it lists. times, headers (names in lower case), bodies: of all requests,
    in order. most_at_once: requests under way at once.
    """

    def __init__(self, plan, models=()):
        self.plan, self.lock = plan, threading.Lock()
        self.times, self.counts, self.headers, self.bodies = [], {}, [], []
        self.under_way = self.most_at_once = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *words):
                pass

            def do_GET(self):
                self.answer(200, {"data": [{"id": name} for name in models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    self.answer(*server.plan(server.note(self.headers, body), body))
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with server.lock:
                        server.under_way -= 1

            def answer(self, status, data, headers=(), cut=0, wait=0.0):
                """cut: bytes left out at the end; wait: seconds before the answer."""
                time.sleep(wait)
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:len(data) - cut])

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def note(self, headers, body):
        """How many requests with these words there are now, this one included."""
        words = question_text(body)
        with self.lock:
            self.counts[words] = self.counts.get(words, 0) + 1
            self.under_way += 1
            self.most_at_once = max(self.most_at_once, self.under_way)
            self.times.append(time.monotonic())
            self.headers.append({name.lower(): value for name, value in headers.items()})
            self.bodies.append(body)
            return self.counts[words]

    @property
    def total(self):
        return len(self.times)

    def stop(self):
        self.http.shutdown()
        self.http.server_close()
