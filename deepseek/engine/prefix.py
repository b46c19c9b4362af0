"""The prefix cache: stores the key/value blocks of earlier prompts for reuse.

A block is stored in parts, one for each part of the layers (see `model/layer_parts.py`). The cache
key of a part is a digest of everything that determines its content: the layers, the digests of the
experts that act below its upper end, and all tokens up to the block's end. So sequences with
different experts share the parts below their experts, and an expert reloaded under the same name
with other content has another digest and never hits a stale entry. The model is not part of the
key, because a cache belongs to one engine and so to one model.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.layer_parts import LayerPart
from deepseek.runner import Segment


def block_keys(identity: str, ids: Sequence[int], block: int) -> list[bytes]:
    """Return the cache key of each full block of `ids` at one part of the layers.

    Args:
        identity: identifies the layers, and the experts that act there or below by their digests.
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


@dataclass(frozen=True)
class PartKeys:
    """Cache keys of a prompt at one part of the layers.

    Attributes:
        keys: keys of the prompt's full blocks; empty if they cannot be cached.
        reusable: number of blocks that may come from the cache.
    """

    keys: Sequence[bytes]
    reusable: int


def part_keys(
    parts: Sequence[LayerPart],
    armed: ArmedExperts | None,
    ids: Sequence[int],
    block: int,
    first_needed: int,
) -> list[PartKeys]:
    """Return the cache keys of a prompt for each part of the layers.

    Args:
        parts: the parts, from the bottom to the top.
        armed: the sequence's experts; None for the base alone.
        ids: tokens of the prompt.
        block: tokens in a block.
        first_needed: position, counted from 1, of the first prompt token whose logits and experts
            are needed. It limits only the uppermost part and parts at which experts act: the others
            can come from the cache while the layers above are computed.
    """
    result = []
    for part in parts:
        identity = "" if armed is None else armed.identity_below(part.cut)
        if identity is None:
            result.append(PartKeys([], 0))
            continue
        name = f"{part.cached.start}-{part.cached.stop} {identity}"
        keys = block_keys(name, ids, block)
        whole = part.cut is not None and identity == ""
        result.append(PartKeys(keys, len(keys) if whole else (first_needed - 1) // block))
    return result


@dataclass(frozen=True)
class Restored:
    """The cached state that a sequence continues from.

    Attributes:
        segments: segments of the first blocks, lower parts first.
        blocks: number of blocks of which at least the lowest part is cached.
        stream_bytes: bytes of the residual streams from which upper parts are computed.
    """

    segments: list[Segment]
    blocks: int
    stream_bytes: int


def restore_within(matched: Sequence[Sequence[Segment]], budget: int) -> Restored:
    """Return the cached state that a sequence continues from.

    Args:
        matched: segments of the first blocks for each part of the layers (see `PrefixCache.match`).
        budget: maximum bytes of residual streams; later blocks are left out.
    """
    used = 0
    blocks = 0
    for number in range(len(matched[0])):
        highest = [part[number] for part in matched if number < len(part)][-1]
        if used + highest.stream_bytes > budget:
            break
        used += highest.stream_bytes
        blocks += 1
    return Restored([*chain.from_iterable(part[:blocks] for part in matched)], blocks, used)


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

    def match(self, parts: Sequence[PartKeys]) -> list[list[Segment]]:
        """Return the blocks of the longest stored prefix for each part of the layers, and mark them
        as recently used.

        A part has at most as many blocks as the one below, without which they are useless.

        Args:
            parts: cache keys of a prompt, from the lowest part to the uppermost.
        """
        matched: list[list[Segment]] = []
        for part in parts:
            segments = []
            most = min(part.reusable, len(matched[-1]) if matched else part.reusable)
            for key in part.keys[:most]:
                if key not in self._blocks:
                    break
                segments.append(self._blocks[key])
            matched.append(segments)
        # In reverse, so that the first block is evicted last, and lower parts after upper ones: no
        # other block can match without them.
        for part, segments in reversed([*zip(parts, matched, strict=True)]):
            for key in reversed(part.keys[: len(segments)]):
                self._blocks.move_to_end(key)
        return matched

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
