"""Prometheus metrics."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deepseek.engine.engine import Engine
from deepseek.engine.request import TokenUsage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 600)


class Metrics:
    """The metrics of one server, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name = "deepseek_{}".format
        registry = self.registry
        self.requests = Counter(
            name("http_requests"), "Replies sent.", ("route", "status"), registry=registry
        )
        self.seconds = Histogram(
            name("http_request_seconds"),
            "Seconds from request head to end of reply.",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            name("first_token_seconds"),
            "Seconds from submission to first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter(
            name("tokens"), "Tokens processed or generated.", ("kind",), registry=registry
        )
        self.spoken = Counter(
            name("expert_tokens"), "Tokens written by an expert.", ("expert",), registry=registry
        )

    def watch(self, engine: Engine) -> None:
        """Add gauges that read the engine's state at each scrape."""

        def show(name: str, what: str, look: Callable[[], float]) -> None:
            Gauge(f"deepseek_{name}", what, registry=self.registry).set_function(look)

        show("running", "Requests in the batch.", lambda: engine.stats().running)
        show("waiting", "Requests in the queue.", lambda: engine.stats().waiting)
        show(
            "cache_reserved_bytes",
            "Cache reserved by running requests.",
            lambda: engine.stats().reserved_bytes,
        )
        show("cache_prefix_bytes", "Cache of stored prefixes.", lambda: engine.stats().prefix_bytes)
        show("step_seconds", "Time spent in forward passes.", lambda: engine.stats().step_seconds)
        show(
            "expert_bytes",
            "Memory of experts' weights under their budget.",
            lambda: engine.stats().expert_bytes,
        )
        show("expert_loads", "Reads of such weights.", lambda: engine.stats().expert_loads)
        show("experts_plugged", "Experts plugged now.", lambda: len(engine.experts()))

    def replied(self, route: str, status: int, seconds: float) -> None:
        """Record one reply and its duration."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def count(self, usage: TokenUsage) -> None:
        """Add the usage of one job."""
        for kind in ("prompt", "cached", "completion"):
            self.tokens.labels(kind).inc(getattr(usage, f"{kind}_tokens"))
        for name, tokens in spoken(usage.experts).items():
            self.spoken.labels(name).inc(tokens)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def spoken(experts: Mapping[str | None, int]) -> dict[str, int]:
    """Return the number of tokens written by each expert, without those of the base alone."""
    return {name: tokens for name, tokens in experts.items() if name is not None and tokens}
