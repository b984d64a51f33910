"""What the gateway counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from petal_swarm.client.generation.pieces import Progress
from petal_swarm.gateway.refusals import RefusedError

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FIRST_TOKEN_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_TOKEN_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """Counters of one gateway, in a registry of their own. No label says who asked, or what."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "petal_gateway_requests",
            "Requests that were answered, by endpoint and HTTP status",
            ("endpoint", "status"),
            registry=registry,
        )
        self._refusals = Counter(
            "petal_gateway_refusals",
            "Requests that got an error, by its code",
            ("reason",),
            registry=registry,
        )
        self.running = Gauge("petal_gateway_running", "Requests being answered", registry=registry)
        self.queued = Gauge("petal_gateway_queued", "Requests that wait for room", registry=registry)
        self._prompt_tokens = Counter("petal_gateway_prompt_tokens", "Tokens of prompts", registry=registry)
        self._new_tokens = Counter("petal_gateway_new_tokens", "Tokens of answers", registry=registry)
        self._abandoned = Counter(
            "petal_gateway_abandoned", "Requests whose visitor left before the end", registry=registry
        )
        self._repairs = Counter(
            "petal_gateway_repairs", "Servers replaced in the middle of an answer", registry=registry
        )
        self._queue_s = Histogram(
            "petal_gateway_queue_seconds", "Waiting for room", buckets=_FIRST_TOKEN_S, registry=registry
        )
        self._first_token_s = Histogram(
            "petal_gateway_first_token_seconds",
            "From the start of an answer to its first token",
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._token_s = Histogram(
            "petal_gateway_token_seconds",
            "For each further token: the mean of an answer",
            buckets=_TOKEN_S,
            registry=registry,
        )

    def answered(self, endpoint: str, status: int) -> None:
        """A response was begun."""
        self._requests.labels(endpoint, str(status)).inc()

    def refused(self, reason: str) -> None:
        """It was an error."""
        self._refusals.labels(reason).inc()

    def guarded(self, error: RefusedError) -> None:
        """The guard refused a request or a connection."""
        self.refused(error.reason)

    def abandoned(self) -> None:
        """A visitor left before his answer was complete."""
        self._abandoned.inc()

    def admitted(self, queued_s: float) -> None:
        """A request got room."""
        self._queue_s.observe(queued_s)

    def generated(self, progress: Progress, choices: int) -> None:
        """An answer has ended, whole or not."""
        self._prompt_tokens.inc(progress.prompt_tokens)
        self._new_tokens.inc(progress.new_tokens)
        self._repairs.inc(progress.repairs)
        if progress.first_token_s is None:
            return
        self._first_token_s.observe(progress.first_token_s)
        steps = progress.new_tokens / choices - 1
        if steps > 0:
            self._token_s.observe((progress.elapsed_s - progress.first_token_s) / steps)

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
