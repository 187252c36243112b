"""An HTTP server on this machine that answers what a test tells it to."""

import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

IS_JSON = [("Content-Type", "application/json")]


class LocalServer:
    """respond(path, headers, body or None for a GET): what `answer` takes; None: no answer.

    It ends with the test that starts it.
    """

    running: list["LocalServer"] = []

    def __init__(self, respond):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *words):
                pass

            def do_GET(self):
                self.respond(None)

            def do_POST(self):
                self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def respond(self, body):
                response = respond(self.path, self.headers, body)
                if response is None:
                    return self.connection.close()
                with suppress(BrokenPipeError, ConnectionResetError):
                    self.answer(*response)

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
        self.running.append(self)

    def stop(self):
        self.http.shutdown()
        self.http.server_close()


@contextmanager
def running_server(*words, seconds=120):
    """The address of a server that this command starts; its last word is a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, deadline = f"http://127.0.0.1:{port}/v1", time.monotonic() + seconds
    process = subprocess.Popen([*map(str, words), str(port)])
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/models").close()
                break
            except urllib.error.HTTPError:  # it answers
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()
