"""What Prometheus reads at /metrics: counts and times, of nobody's text."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from lib.serving.engine import Engine
from lib.serving.sessions import Sessions

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    def __init__(self, engine: Engine, sessions: Sessions):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("constattn_requests", "answers sent", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "constattn_request_seconds", "from a request to its end", ["route"], buckets=SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "constattn_first_token_seconds", "from a request to its first text", buckets=SECONDS, registry=registry
        )
        step = Histogram("constattn_step_seconds", "steps of the model", buckets=SECONDS, registry=registry)
        engine.observe_step = step.observe
        self.prompt_tokens = Counter(
            "constattn_prompt_tokens", "tokens read, without those in states", registry=registry
        )
        self.completion_tokens = Counter("constattn_completion_tokens", "tokens written", registry=registry)
        for name, words, value in (
            ("running", "answers that take steps", lambda: len(engine.running) + len(engine.alone)),
            ("waiting", "answers whose prompts are not read yet", lambda: len(engine.waiting)),
            ("sessions_in_memory", "sessions", lambda: len(sessions.memory)),
            ("session_bytes", "their states", lambda: sessions.nbytes),
            ("sessions_on_disk", "sessions", lambda: len(sessions.stored)),
        ):
            Gauge(f"constattn_{name}", words, registry=registry).set_function(value)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)
