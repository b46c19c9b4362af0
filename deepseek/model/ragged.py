"""Forward passes over ragged batches: new tokens of many sequences, each with its own cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.model.context import ForwardContext
from deepseek.model.experts.ragged import RaggedExperts
from deepseek.model.kv_cache import KVCache
from deepseek.model.passes import Decoder, ForwardPass, experts_of
from deepseek.model.positions.protocol import unchanged


@dataclass(frozen=True)
class RaggedChunk:
    """New tokens of one sequence.

    Attributes:
        ids: token ids, at least one.
        start: position of the first one.
        cache: the cache of the sequence.
    """

    ids: Sequence[int]
    start: int
    cache: KVCache


def begin_ragged(model: Decoder, chunks: Sequence[RaggedChunk]) -> ForwardPass:
    """Return a forward pass over new tokens of many sequences, which is about to run layer 0.

    The tokens of all sequences lie end to end in one row, so that every weight is read once.
    Attention, position biases and gates process each sequence separately, with its cache and the
    experts that it started with.

    Args:
        model: the model to run.
        chunks: the new tokens.
    """
    ids_1N = _ids(model, chunks)
    hidden_1ND: Tensor = model.embed_tokens(ids_1N)
    ctx = _context(model, chunks, ids_1N, hidden_1ND.dtype)
    return ForwardPass(model, model.positions.embed(hidden_1ND, ctx.position_ids_BT), ctx)


def resume_ragged(
    model: Decoder, chunks: Sequence[RaggedChunk], stream_1ND: Tensor, layer: int
) -> ForwardPass:
    """Return a forward pass over new tokens of many sequences that continues after the attention of
    a layer.

    Args:
        model: the model to run.
        chunks: the new tokens. Keys and values up to that layer are already in their caches.
        stream_1ND: the residual stream of all tokens after that attention.
        layer: the layer.
    """
    ctx = _context(model, chunks, _ids(model, chunks), stream_1ND.dtype)
    return ForwardPass(model, stream_1ND, ctx, layer, attended=True)


def _ids(model: Decoder, chunks: Sequence[RaggedChunk]) -> Tensor:
    """Return the new tokens of all sequences, `[1, N]`."""
    device = model.norm.weight.device
    return torch.tensor([[token for chunk in chunks for token in chunk.ids]], device=device)


def _context(
    model: Decoder, chunks: Sequence[RaggedChunk], ids_1N: Tensor, dtype: torch.dtype
) -> ForwardContext:
    """Return the context of a pass whose residual stream has this dtype."""
    device = ids_1N.device
    lengths = [len(chunk.ids) for chunk in chunks]
    places = [range(chunk.start, chunk.start + len(chunk.ids)) for chunk in chunks]
    position_ids_1N = torch.tensor([[place for part in places for place in part]], device=device)
    sequences = tuple(
        ForwardContext(
            positions=unchanged,  # they are applied to the whole row
            position_ids_BT=positions_1T,
            past=chunk.start,
            window=model.config.sliding_window,
            cache=chunk.cache,
            input_ids_BT=ids_1T,
            armed=experts_of(model.experts, chunk.cache),
        )
        for positions_1T, ids_1T, chunk in zip(
            position_ids_1N.split(lengths, dim=1), ids_1N.split(lengths, dim=1), chunks, strict=True
        )
    )
    return ForwardContext(
        positions=model.positions.prepare(position_ids_1N, dtype),
        position_ids_BT=position_ids_1N,
        window=model.config.sliding_window,
        input_ids_BT=ids_1N,
        armed=RaggedExperts(sequences) if any(one.armed for one in sequences) else None,
        sequences=sequences,
    )
