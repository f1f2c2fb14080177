"""`/metrics` in Prometheus's format, under vLLM's names: its dashboards show this server too.

A registry of its own, so that several servers in one process (tests) do not share numbers.
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipeline.inference.serve.engine import EngineLoad

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class Metrics:
    """The numbers of one server; `model_name` is the label that vLLM has."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._running = self._gauge("vllm:num_requests_running", "Sequences that the engine decodes")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Sequences that wait for room in the engine")
        self._cache = self._gauge("vllm:kv_cache_usage_perc", "Part of the KV-cache in use, 1 = all")
        self._prompt = self._counter("vllm:prompt_tokens", "Tokens of prompts")
        self._generated = self._counter("vllm:generation_tokens", "New tokens")
        self._success = self._counter("vllm:request_success", "Sequences that came to their end", "finished_reason")
        self._aborted = self._counter("pldr:request_aborted", "Requests whose client went away before the answer ended")
        self._refused = Counter("pldr:request_refused", "Answers with a 4xx or 5xx", ["status"], registry=self.registry)
        self._first = self._histogram("vllm:time_to_first_token_seconds", "From a request to its first token", SECONDS)
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens of a sequence", SECONDS)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "From a request to its last token", SECONDS)
        self._prompt_sizes = self._histogram("vllm:request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self._generated_sizes = self._histogram("vllm:request_generation_tokens", "New tokens of a sequence", TOKENS)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["model_name"], registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)

    def prompt(self, model: str, num_tokens: int) -> None:
        """A prompt came in."""
        self._prompt.labels(model).inc(num_tokens)
        self._prompt_sizes.labels(model).observe(num_tokens)

    def tokens(self, model: str, count: int, *, first: bool, seconds: float) -> None:
        """New tokens of a sequence, `seconds` after those before them (the first: after the request)."""
        self._generated.labels(model).inc(count)
        if first:
            self._first.labels(model).observe(seconds)
        else:
            for _ in range(count):
                self._between.labels(model).observe(seconds / count)

    def ended(self, model: str, reason: str, *, num_tokens: int, seconds: float) -> None:
        """A sequence came to its end."""
        self._success.labels(model, reason).inc()
        self._generated_sizes.labels(model).observe(num_tokens)
        self._whole.labels(model).observe(seconds)

    def aborted(self, model: str) -> None:
        """A client went away."""
        self._aborted.labels(model).inc()

    def refused(self, status: int) -> None:
        """An answer with an error."""
        self._refused.labels(str(status)).inc()

    def render(self, engines: dict[str, EngineLoad]) -> bytes:
        """The page."""
        for model, engine in engines.items():
            self._running.labels(model).set(engine.running)
            self._waiting.labels(model).set(engine.waiting)
            self._cache.labels(model).set(engine.cache_usage)
        return bytes(generate_latest(self.registry))
