"""Hashes fitted to a model: which keys lie together, and which buckets a query should look into.

A hash reads queries and keys *before* positions are applied. A rotated key points elsewhere at
every place of a text, so that buckets of rotated keys are places, not contents;
docs/log/attention.md has the figures. C is the number of buckets.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deepseek.checkpoint.store import atomic_write
from deepseek.errors import CheckpointError, ConfigError
from deepseek.kernels.lsh.attention import likeliest

FORMAT = "deepseek-hash-1"
PARTS = ("key_weight", "key_bias", "query_weight", "query_bias")


class LinearHash(nn.Module):
    """Affine scores of buckets: a key falls into its best one, a query looks into its best ones.

    Keys of one key/value head share a map; every query head has its own, as heads look for
    different things. Nothing depends on the other tokens, so the hash is causal, and the same in
    prefill and in decode.
    """

    key_weight: Tensor
    key_bias: Tensor
    query_weight: Tensor
    query_bias: Tensor

    def __init__(
        self,
        key_weight_GKC: Tensor,
        key_bias_GC: Tensor,
        query_weight_HKC: Tensor,
        query_bias_HC: Tensor,
    ) -> None:
        super().__init__()
        tensors = (key_weight_GKC, key_bias_GC, query_weight_HKC, query_bias_HC)
        for name, tensor in zip(PARTS, tensors, strict=True):
            # Not persistent: a hash has a file of its own, and checkpoints stay what every other
            # reader expects.
            self.register_buffer(name, tensor.detach().float(), persistent=False)

    @property
    def num_buckets(self) -> int:
        return self.key_bias.shape[-1]

    def key_codes(self, key_BGSK: Tensor) -> Tensor:
        """Return the bucket `[B, G, S]` of each key, which depends on that key alone."""
        return (key_BGSK.float() @ self.key_weight + self.key_bias[:, None]).argmax(-1)

    def query_codes(self, query_BHTK: Tensor, probes: int) -> Tensor:
        """Return `probes` different buckets `[B, H, T, P]` for each query, the likeliest first."""
        return likeliest(query_BHTK.float() @ self.query_weight + self.query_bias[:, None], probes)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in PARTS}


def hash_file(folder: Path) -> Path:
    """Return where the hash of the model in `folder` lies: below it, where no reader takes it for
    weights.
    """
    return folder / "lsh" / "hash.safetensors"


def named_tensors(hashes: dict[int, LinearHash]) -> dict[str, Tensor]:
    """Return all tensors of the hashes of some layers, as `layer.part`."""
    return {
        f"{layer}.{name}": tensor
        for layer, one in hashes.items()
        for name, tensor in one.tensors().items()
    }


def from_named_tensors(tensors: dict[str, Tensor]) -> dict[int, LinearHash]:
    """Undo `named_tensors`; raise `KeyError` where a part is missing."""
    layers = sorted({int(name.partition(".")[0]) for name in tensors})
    return {layer: LinearHash(*(tensors[f"{layer}.{part}"] for part in PARTS)) for layer in layers}


def save_hashes(path: Path, hashes: dict[int, LinearHash], base: str) -> None:
    """Write the hashes of some layers; `base` is the weights' fingerprint of the model that they
    were fitted to.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in named_tensors(hashes).items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "base": base})


def load_hashes(path: Path, base: str) -> dict[int, LinearHash]:
    """Read what `save_hashes` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or no hash, or was fitted to another model
            than `base`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; make it with `deepseek distill-hash`.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        if metadata.get("format") != FORMAT:
            raise KeyError("format")
        hashes = from_named_tensors(tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no hash ({error}); make it anew.") from error
    if metadata.get("base") != base:
        raise CheckpointError(
            f"{path} was fitted to another model than this one; make one for this model."
        )
    return hashes


def plug_hashes(model: nn.Module, hashes: dict[int, LinearHash]) -> None:
    """Put the hashes into the LSH layers of a model.

    Raises:
        ConfigError: a layer has no hash, or one for other heads, another number of buckets or of
            rounds.
    """
    for layer, attention in _hashed_layers(model):
        if attention.windows.rounds > 1:
            raise ConfigError("A fitted hash has one round; set lsh_rounds=1, and more lsh_probes.")
        if layer not in hashes:
            raise ConfigError(
                f"The file has no hash for layer {layer}; name it in lsh_exact_layers or make it anew."
            )
        chosen = hashes[layer]
        heads = (
            attention.q_proj.out_features // attention.head_dim,
            attention.head_dim,
            attention.windows.num_buckets,
        )
        if tuple(chosen.query_weight.shape) != heads:
            raise ConfigError(
                f"The hash of layer {layer} is for {tuple(chosen.query_weight.shape)} heads, head_dim and "
                f"lsh_num_buckets, the model has {heads}; set lsh_num_buckets={chosen.num_buckets} or make it anew."
            )
        attention.hash = chosen.to(attention.q_proj.weight.device)


def _hashed_layers(model: nn.Module) -> Iterator[tuple[int, Any]]:
    found = [
        module
        for module in model.modules()
        if hasattr(module, "hash") and hasattr(module, "windows")
    ]
    if not found:
        raise ConfigError('The model has no LSH layer; load it with ModelConfig(attention="lsh").')
    for module in found:
        attention: Any = module
        yield attention.layer_idx, attention
