"""Learned LSH hashes: assign keys to buckets and choose the buckets that a query probes.

A hash reads queries and keys *before* positions are applied. Rotated keys with the same content
point in different directions at different positions, so hashing them would group by position
instead of content (figures in docs/log/attention.md). C is the number of buckets.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deepseek.checkpoint.store import atomic_write
from deepseek.errors import CheckpointError, ConfigError
from deepseek.kernels.lsh.attention import likeliest_buckets
from deepseek.model.exact_buffers import ExactBuffers

FORMAT = "deepseek-hash-1"
PARTS = ("key_weight", "key_bias", "query_weight", "query_bias")


class LinearHash(ExactBuffers):
    """A learned hash that scores buckets by affine maps.

    A key goes into the bucket with its highest score; a query probes the buckets with its highest
    scores. Each key/value head has one map for its keys, and each query head has its own map for
    queries. A code depends on one token only, so the hash is causal and gives the same codes in
    prefill and decode. The maps stay fp32, as they were fitted, in a model of any dtype.
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
            # Not persistent: hashes have their own file, and checkpoints stay readable by other
            # libraries.
            self.register_buffer(name, tensor.detach().float(), persistent=False)

    @property
    def num_buckets(self) -> int:
        return self.key_bias.shape[-1]

    def key_codes(self, key_BGSK: Tensor) -> Tensor:
        """Return the bucket `[B, G, S]` of each key."""
        return likeliest_buckets(key_BGSK, self.key_weight, self.key_bias[:, None], 1)[..., 0]

    def query_codes(self, query_BHTK: Tensor, probes: int) -> Tensor:
        """Return `probes` distinct buckets `[B, H, T, P]` per query, in descending score."""
        return likeliest_buckets(query_BHTK, self.query_weight, self.query_bias[:, None], probes)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in PARTS}


def hash_file(folder: Path) -> Path:
    """Return the path of the hash file of the model in `folder`.

    It is in a subfolder, because readers load every safetensors file beside config.json as weights.
    """
    return folder / "lsh" / "hash.safetensors"


def named_tensors(hashes: dict[int, LinearHash]) -> dict[str, Tensor]:
    """Return the tensors of all hashes (layer -> hash), named `layer.part`."""
    return {
        f"{layer}.{name}": tensor
        for layer, layer_hash in hashes.items()
        for name, tensor in layer_hash.tensors().items()
    }


def from_named_tensors(tensors: dict[str, Tensor]) -> dict[int, LinearHash]:
    """Return the hashes whose `named_tensors` are given; raise `KeyError` if a part is missing."""
    layers = sorted({int(name.partition(".")[0]) for name in tensors})
    return {layer: LinearHash(*(tensors[f"{layer}.{part}"] for part in PARTS)) for layer in layers}


def save_hashes(path: Path, hashes: dict[int, LinearHash], base: str) -> None:
    """Write hashes to a file.

    Args:
        path: file to write.
        hashes: layer -> its hash.
        base: fingerprint of the weights that the hashes were fitted to.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in named_tensors(hashes).items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "base": base})


def load_hashes(path: Path, base: str) -> dict[int, LinearHash]:
    """Return the hashes in a file that `save_hashes` wrote, by layer.

    Args:
        path: file to read.
        base: fingerprint of the weights that the hashes must belong to.

    Raises:
        CheckpointError: the file is missing, damaged, not a hash file, or belongs to other weights.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; make it with `deepseek distill-hash`.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
    """Install copies of hashes in the LSH layers of a model.

    Args:
        model: a model with LSH layers.
        hashes: layer -> its hash.

    Raises:
        ConfigError: a layer has no hash, or the number of heads, buckets or rounds differs.
    """
    for layer, attention in _hashed_layers(model):
        if attention.windows.rounds > 1:
            raise ConfigError("A fitted hash has one round; set lsh_rounds=1, and more lsh_probes.")
        if layer not in hashes:
            raise ConfigError(
                f"The file has no hash for layer {layer}; name it in lsh_exact_layers or make it "
                "anew."
            )
        chosen = hashes[layer]
        heads = (
            attention.q_proj.out_features // attention.head_dim,
            attention.head_dim,
            attention.windows.num_buckets,
        )
        if tuple(chosen.query_weight.shape) != heads:
            raise ConfigError(
                f"The hash of layer {layer} is for {tuple(chosen.query_weight.shape)} heads, "
                f"head_dim and lsh_num_buckets, the model has {heads}; set "
                f"lsh_num_buckets={chosen.num_buckets} or make it anew."
            )
        # A copy, because moving a module would move it for every other owner too.
        attention.hash = deepcopy(chosen).to(attention.q_proj.weight.device)


def _hashed_layers(model: nn.Module) -> Iterator[tuple[int, Any]]:
    lsh_modules = [
        module
        for module in model.modules()
        if hasattr(module, "hash") and hasattr(module, "windows")
    ]
    if not lsh_modules:
        raise ConfigError('The model has no LSH layer; load it with ModelConfig(attention="lsh").')
    for module in lsh_modules:
        attention: Any = module
        yield attention.layer_idx, attention
