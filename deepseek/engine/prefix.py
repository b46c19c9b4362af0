"""The prefix cache: stores the key/value blocks of earlier prompts for reuse.

The cache key of a block is a digest of everything that determines its content: the digests of the
armed experts and all tokens up to the block's end. An expert reloaded under the same name with
other content has another digest, so it never hits a stale entry. The model is not part of the key,
because a cache belongs to one engine and so to one model.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from deepseek.runner import Segment


def block_keys(identity: str, ids: Sequence[int], block: int) -> list[bytes]:
    """Return the cache key of each full block of `ids`.

    Args:
        identity: identifies the armed experts by their digests.
        ids: tokens of the prompt.
        block: tokens in a block.

    Returns:
        One digest for each full block; it covers `identity` and all tokens up to the block's end.
    """
    digest = hashlib.sha256(identity.encode())
    keys = []
    for start in range(0, len(ids) - block + 1, block):
        digest.update(array("q", ids[start : start + block]).tobytes())
        keys.append(digest.digest())
    return keys


class PrefixCache:
    """Blocks of keys and values with least-recently-used eviction.

    Attributes:
        nbytes: memory of all blocks.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._blocks: OrderedDict[bytes, Segment] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def match(self, keys: Sequence[bytes]) -> list[Segment]:
        """Return the blocks of the longest stored prefix of `keys` and mark them as recently used.

        Args:
            keys: cache keys of a prompt's blocks, in order.
        """
        segments = []
        for key in keys:
            if key not in self._blocks:
                break
            segments.append(self._blocks[key])
        # In reverse, so that the first block is evicted last: without it no later one can match.
        for key in reversed(keys[: len(segments)]):
            self._blocks.move_to_end(key)
        return segments

    def add(self, key: bytes, segment: Segment, limit: int) -> None:
        """Store a block and evict older ones so that all take at most `limit` bytes.

        A block that is larger than `limit` is not stored.

        Args:
            key: cache key of the block.
            segment: content of the block.
            limit: budget in bytes.
        """
        if segment.nbytes > limit or key in self._blocks:
            return
        self.shrink(limit - segment.nbytes)
        self._blocks[key] = segment
        self.nbytes += segment.nbytes

    def shrink(self, limit: int) -> None:
        """Evict the least recently used blocks until all take at most `limit` bytes."""
        while self.nbytes > limit and self._blocks:
            _, segment = self._blocks.popitem(last=False)
            self.nbytes -= segment.nbytes
