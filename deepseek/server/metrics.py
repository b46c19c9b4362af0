"""Prometheus metrics."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from deepseek.engine.engine import Engine
from deepseek.engine.request import TokenUsage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 600)


class Metrics:
    """The metrics of one server, in a separate registry.

    Args:
        version: version of this library, a label of `deepseek_build_info`.
    """

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        Info("deepseek_build", "Version of the server.", registry=self.registry).info(
            {"version": version}
        )
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
            name("tokens"),
            "Tokens of prompts, of these those in the cache (cached), and of completions.",
            ("kind",),
            registry=registry,
        )
        self.spoken = Counter(
            name("expert_tokens"), "Tokens written by an expert.", ("expert",), registry=registry
        )

    def watch(self, engine: Engine) -> None:
        """Add metrics that read the engine's state at each scrape."""

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
        show(
            "expert_bytes",
            "Memory of experts' weights under their budget.",
            lambda: engine.stats().expert_bytes,
        )
        show("experts_plugged", "Experts plugged now.", lambda: len(engine.experts()))
        self.registry.register(EngineTotals(engine))

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


class EngineTotals(Collector):
    """What an engine counts itself since it was started.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; Prometheus' client calls this at each scrape."""
        stats = self._engine.stats()
        yield CounterMetricFamily(
            "deepseek_step_seconds", "Time spent in forward passes.", value=stats.step_seconds
        )
        yield CounterMetricFamily(
            "deepseek_expert_loads",
            "Reads of experts' weights that were not in memory.",
            value=stats.expert_loads,
        )


def spoken(experts: Mapping[str | None, int]) -> dict[str, int]:
    """Return the number of tokens written by each expert, without those of the base alone."""
    return {name: tokens for name, tokens in experts.items() if name is not None and tokens}
