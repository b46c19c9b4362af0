"""Config fields that only one kind of attention reads.

A new kind with fields of its own adds a class here and to the bases of `AttentionFields`. Its
attention class validates them (see `FullAttention.check`). A config is shown as Hugging Face shows
it, so these classes have no `repr` of their own. Field names start with the name of the
kind, because all fields share one namespace in `config.json`.
"""

from dataclasses import dataclass


@dataclass(kw_only=True, repr=False)
class LshFields:
    """Fields of LSH attention (`model/attention/lsh.py`).

    Attributes:
        lsh_num_buckets: number of buckets that keys are hashed into.
        lsh_probes: number of buckets that a query probes.
        lsh_rounds: number of independent hashes, each with its own buckets and probes. A query
            attends to the union of their candidates.
        lsh_bucket_window: most recent keys that a query attends to in each probed bucket.
        lsh_local_window: most recent keys that a query attends to in any bucket. The window counts
            cache slots, so right padding before continued tokens counts.
        lsh_sinks: first keys of its document that a query attends to in any bucket.
        lsh_far_field: whether a query also attends to a few summaries of all other past keys.
        lsh_exact_layers: layers that keep full attention; None: the first two, whose attention is
            spread over all keys.
    """

    lsh_num_buckets: int = 64
    lsh_probes: int = 4
    lsh_rounds: int = 1
    lsh_bucket_window: int = 96
    lsh_local_window: int = 128
    lsh_sinks: int = 4
    lsh_far_field: bool = False
    lsh_exact_layers: list[int] | None = None


@dataclass(kw_only=True, repr=False)
class AttentionFields(LshFields):
    """The fields of all kinds of attention."""
