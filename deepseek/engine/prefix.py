"""The prefix cache: what prompts that were seen before left in the key/value cache, block by block.

A block is found by a digest of everything that decides its content: the experts' own digests and
all tokens up to its end. An expert reloaded under the same name with other content has another
digest, so that an old entry is never hit. The model itself is no part of the key: a cache belongs
to one engine and so to one model.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from deepseek.runner import Segment


def block_keys(identity: str, ids: Sequence[int], block: int) -> list[bytes]:
    """Return the key of each full block of `ids`; it depends on `identity` and on all tokens up to
    the block's end.
    """
    digest = hashlib.sha256(identity.encode())
    keys = []
    for start in range(0, len(ids) - block + 1, block):
        digest.update(array("q", ids[start : start + block]).tobytes())
        keys.append(digest.digest())
    return keys


class PrefixCache:
    """Blocks, of which the least recently used ones go first.

    Attributes:
        nbytes: memory of all blocks.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._blocks: OrderedDict[bytes, Segment] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def match(self, keys: Sequence[bytes]) -> list[Segment]:
        """Return the blocks of the longest stored prefix of `keys`, which count as used now."""
        found = []
        for key in keys:
            if key not in self._blocks:
                break
            found.append(self._blocks[key])
        for key in reversed(
            keys[: len(found)]
        ):  # the first block last, because without it no other is found
            self._blocks.move_to_end(key)
        return found

    def add(self, key: bytes, segment: Segment, limit: int) -> None:
        """Store a block, if older ones can make room so that all take at most `limit` bytes."""
        if segment.nbytes > limit or key in self._blocks:
            return
        self.shrink(limit - segment.nbytes)
        self._blocks[key] = segment
        self.nbytes += segment.nbytes

    def shrink(self, limit: int) -> None:
        """Forget the least recently used blocks until all take at most `limit` bytes."""
        while self.nbytes > limit and self._blocks:
            _, segment = self._blocks.popitem(last=False)
            self.nbytes -= segment.nbytes
