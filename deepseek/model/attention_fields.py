"""The fields of a model's config that belong to one kind of attention alone.

A new kind with choices of its own adds its class here and to the bases of `AttentionFields`; its attention checks them
(see `FullAttention.check`). The names begin with the kind's, as all fields lie side by side in a checkpoint's config.
"""

from dataclasses import dataclass


@dataclass(kw_only=True)
class LshFields:
    """Choices of LSH attention (`model/attention/lsh.py`).

    Attributes:
        lsh_num_buckets, lsh_probes: buckets of keys, and how many of them a query looks into.
        lsh_rounds: independent hashes, each with its buckets and probes; a query looks at what any of them finds.
        lsh_bucket_window, lsh_local_window, lsh_sinks: most recent keys it looks at in each such bucket, most recent
            keys and first keys of its document it looks at whatever their bucket.
        lsh_far_field: whether a query looks at a few summaries of all other past keys, too.
        lsh_exact_layers: layers that keep full attention; None = the first two, which look everywhere.
    """

    lsh_num_buckets: int = 64
    lsh_probes: int = 4
    lsh_rounds: int = 1
    lsh_bucket_window: int = 96
    lsh_local_window: int = 128
    lsh_sinks: int = 4
    lsh_far_field: bool = False
    lsh_exact_layers: list[int] | None = None


@dataclass(kw_only=True)
class AttentionFields(LshFields):
    """The fields of all kinds."""
