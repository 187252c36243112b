"""An OpenAI-compatible server on this machine that does what a test tells it to."""

import threading

from local_server import LocalServer


def completion(reply="<think>so</think><answer>x</answer>", **usage):
    message = {"role": "assistant", "content": reply}
    return {"choices": [{"message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, **usage}}


def question_text(body):
    return body["messages"][0]["content"][-1]["text"]


class TeacherServer(LocalServer):
    """plan(nth request with these words, body): what to do, as `LocalServer` is told it."""

    def __init__(self, plan, models=()):
        self.plan, self.models, self.lock = plan, models, threading.Lock()
        self.counts, self.headers, self.bodies = {}, [], []
        super().__init__(self.respond)

    def respond(self, path, headers, body):
        if body is None:
            return 200, {"data": [{"id": name} for name in self.models]}
        words = question_text(body)
        with self.lock:
            nth = self.counts[words] = self.counts.get(words, 0) + 1
            self.headers.append({name.lower(): value for name, value in headers.items()})
            self.bodies.append(body)
        return self.plan(nth, body)

    @property
    def total(self):
        return len(self.bodies)
