"""The reference runner: the model itself, one sequence after another. Every architecture and every expert works."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek.kernels.lsh.decode import BucketCache
from deepseek.kernels.lsh.far_field import BLOCK
from deepseek.kernels.lsh.intervals import Windows
from deepseek.model.attention.lsh import LshAttention
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.module import ExpertModule
from deepseek.model.kv_cache import KVCache
from deepseek.model.output import ModelOutput
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk, RunnerOutput, Segment


@dataclass(frozen=True)
class TorchSegment:
    """What a stretch of tokens left in a `KVCache`; layers in order, or by number where not all have such a part.

    Attributes:
        keys, values: `[1, G, T, K]` of each layer.
        gates: the gates' sums `[1, 3, M]` after the last token.
        codes: the keys' bucket codes `[1, GR, T]` in LSH layers.
        key_bias: `[1, H, T]` in layers with dynamic positions.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    gates: dict[int, Tensor]
    codes: dict[int, tuple[Windows, Tensor]]
    key_bias: dict[int, Tensor]

    @property
    def nbytes(self) -> int:
        codes = (codes_BJT for _, codes_BJT in self.codes.values())
        return sum(part.nbytes for part in (*self.keys, *self.values, *_tensors(self.gates, self.key_bias), *codes))


class TorchState:
    """The `KVCache` of one sequence and its experts."""

    rewinds = False  # the bits of a token depend on those computed with it, so nothing is guessed

    def __init__(self, armed: ArmedExperts | None) -> None:
        self.cache = KVCache()
        self.cache.armed, self.cache.started = armed, True

    @property
    def length(self) -> int:
        return int(self.cache.get_seq_length())

    @property
    def nbytes(self) -> int:
        layers: Any = self.cache.layers
        parts = (part for layer in layers if layer.is_initialized for part in (layer.keys, layer.values))
        sums = _tensors(self.cache.gate_state, self.cache.key_bias)
        return sum(part.nbytes for part in (*parts, *sums)) + sum(own.nbytes for own in self.cache.buckets.values())

    def rewind(self, length: int) -> None:
        raise NotImplementedError

    def segment(self, start: int) -> TorchSegment:
        cache, layers = self.cache, list[Any](self.cache.layers)
        return TorchSegment(
            keys=tuple(layer.keys[:, :, start:].clone() for layer in layers),
            values=tuple(layer.values[:, :, start:].clone() for layer in layers),
            gates={layer: sums.clone() for layer, sums in cache.gate_state.items()},
            codes={layer: (own.windows, own.codes_BJS[:, :, start:].long()) for layer, own in cache.buckets.items()},
            key_bias={layer: bias[..., start:].clone() for layer, bias in cache.key_bias.items()},
        )

    def extend(self, segment: Segment) -> None:
        assert isinstance(segment, TorchSegment)
        cache = self.cache
        for layer, (keys, values) in enumerate(zip(segment.keys, segment.values, strict=True)):
            cache.update(keys, values, layer)
        for layer, (windows, codes) in segment.codes.items():
            cache.buckets.setdefault(layer, BucketCache(windows)).append(codes)
        for layer, bias in segment.key_bias.items():
            cache.key_bias[layer] = torch.cat((cache.key_bias[layer], bias), -1) if layer in cache.key_bias else bias
        cache.gate_state = dict(segment.gates)  # a step replaces sums, it never writes into them

    def close(self) -> None:
        self.cache = KVCache()


class TorchRunner:
    """Runs a `DeepSeekModel` on the device where it is."""

    def __init__(self, model: DeepSeekModel) -> None:
        self.model = model

    def prepare(self, module: ExpertModule) -> None:
        """Nothing is left to do: `plug` puts experts on the model's device."""

    def state_bytes(self, length: int, armed: ArmedExperts | None) -> int:
        config = self.model.config
        heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        token = 2 * groups * width * self.model.dtype.itemsize
        if config.positional_encoding == "dpe":
            token += 8 * heads  # key_bias, in fp64
        sums = sum(12 * len(owners) for owners in armed.roster.owners.values()) if armed is not None else 0
        return len(self.model.layers) * token * length + sums + self._bucket_bytes(length, groups)

    def _bucket_bytes(self, length: int, groups: int) -> int:
        """Return the most that the buckets of LSH layers occupy: codes with room to double, rings and their counts."""
        total = 0
        for block in self.model.layers:
            if isinstance(block.attention, LshAttention) and not block.attention.exact:
                windows = block.attention.windows
                ring = (windows.num_buckets + 2) * (1 + max(windows.bucket, windows.sinks))
                total += groups * windows.rounds * (2 * 4 * length + 8 * ring) + 8
                if windows.far_field:
                    total += (length // BLOCK + 1) * 8 * (groups * 2 * block.attention.head_dim + 1)
        return total

    def start(self, armed: ArmedExperts | None, capacity: int) -> TorchState:
        return TorchState(armed)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        rows: list[Tensor] = []
        experts: list[str | None] = []
        for chunk in chunks:
            assert isinstance(chunk.state, TorchState)
            ids = torch.tensor([chunk.ids], device=self.model.device)
            keep = chunk.keep or torch.tensor([], dtype=torch.long)  # the number 0 would mean all
            output = self.model(ids, cache=chunk.state.cache, logits_to_keep=keep)
            rows.append(output.logits[0].float().cpu())
            experts += speakers(output, len(rows[-1]))
        return RunnerOutput(torch.cat(rows), tuple(experts))


def speakers(output: ModelOutput, count: int) -> list[str | None]:
    """Return for each of the last `count` positions of one sequence the expert that weighed most, or None."""
    if output.experts is None or count == 0:
        return [None] * count
    weights_TM: Tensor = output.experts.attribution()[0, -count:]
    names = output.experts.names
    return [names[int(row.argmax())] if bool((row > 0).any()) else None for row in weights_TM]


def _tensors(*parts: dict[int, Tensor]) -> list[Tensor]:
    return [tensor for part in parts for tensor in part.values()]
