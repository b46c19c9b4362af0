"""Forward passes over ragged batches: new tokens of many sequences, each with its own cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek.model.context import ForwardContext, past_length
from deepseek.model.experts.ragged import RaggedExperts
from deepseek.model.kv_cache import KVCache
from deepseek.model.passes import Decoder, ForwardPass, experts_of
from deepseek.model.positions.protocol import unchanged


def begin_ragged(model: Decoder, chunks: Sequence[tuple[Sequence[int], KVCache]]) -> ForwardPass:
    """Return a forward pass over new tokens of many sequences, which is about to run layer 0.

    The tokens of all sequences lie end to end in one row, so that every weight is read once.
    Attention, position biases and gates take each sequence by itself, with its cache and the
    experts that it started with.

    Args:
        model: the model to run.
        chunks: token ids, at least one, and the cache of each sequence.
    """
    device = model.norm.weight.device
    lengths = [len(ids) for ids, _ in chunks]
    starts = [past_length(cache) for _, cache in chunks]
    ids_1N = torch.tensor([[token for ids, _ in chunks for token in ids]], device=device)
    places = [range(at, at + size) for at, size in zip(starts, lengths, strict=True)]
    position_ids_1N = torch.tensor([[place for part in places for place in part]], device=device)
    sequences = tuple(
        ForwardContext(
            positions=unchanged,  # they are applied to the whole row
            position_ids_BT=positions_1T,
            past=start,
            window=model.config.sliding_window,
            cache=cache,
            input_ids_BT=ids_1T,
            armed=experts_of(model.experts, cache),
        )
        for positions_1T, ids_1T, start, (_, cache) in zip(
            position_ids_1N.split(lengths, dim=1),
            ids_1N.split(lengths, dim=1),
            starts,
            chunks,
            strict=True,
        )
    )
    hidden_1ND: Tensor = model.embed_tokens(ids_1N)
    ctx = ForwardContext(
        positions=model.positions.prepare(position_ids_1N, hidden_1ND.dtype),
        position_ids_BT=position_ids_1N,
        window=model.config.sliding_window,
        input_ids_BT=ids_1N,
        armed=RaggedExperts(sequences) if any(one.armed for one in sequences) else None,
        sequences=sequences,
    )
    return ForwardPass(model, model.positions.embed(hidden_1ND, position_ids_1N), ctx)
