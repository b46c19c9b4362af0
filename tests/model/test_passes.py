"""The steps of a forward pass give the whole pass bit for bit, and no code outside `model/`
accesses the inside of a layer.
"""

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import KINDS, tiny_model
from torch import Tensor, nn

from deepseek.errors import ConfigError
from deepseek.model.config import ModelConfig
from deepseek.model.experts import ExpertModule
from deepseek.model.kv_cache import KVCache
from deepseek.model.passes import ForwardPass, UpperLayers, begin, resume
from deepseek.model.presets import PRESETS
from deepseek.model.transformer import DeepSeekModel

ROOT = Path(__file__).parent.parent.parent
LAYERS = 3
LSH = {name: value for name, value in KINDS["lsh"].items() if name.startswith("lsh_")}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FEW_EXPERTS = {
    "num_experts": 4,
    "expert_dim": 16,
    "shared_expert_dim": None,
    "max_experts": 2,
    "min_experts": 1,
    "candidate_experts": 4,
    "num_expert_groups": 1,
    "max_expert_groups": 1,
    "target_experts": None,
    "dense_layers": [0],
}


def built(name: str, attention: str = "full", positions: str = "rope") -> DeepSeekModel:
    """Return the preset `name` with the sizes of a tiny model and random weights, including score
    biases.
    """
    preset = PRESETS[name]
    fields: dict[str, Any] = preset | SMALL | (FEW_EXPERTS if preset.get("num_experts") else {})
    fields |= {"attention": attention, "positional_encoding": positions}
    if attention == "lsh":
        fields |= LSH
    if positions == "dpe":
        fields["train_len"] = 16
    torch.manual_seed(0)
    model = DeepSeekModel(ModelConfig(**fields)).eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if "score_bias" in parameter_name:
            nn.init.normal_(parameter, std=0.02)
    return model


def expert(model: DeepSeekModel) -> ExpertModule:
    module = ExpertModule.beside(model.layers, "noisy", (1, 2), 16, seed=1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(2))
    return module.requires_grad_(False)


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(5))


def in_pieces(model: DeepSeekModel, ids_BT: Tensor, **kwargs: Any) -> Tensor:
    """Return the logits of a pass that stops wherever a pass can stop."""
    step = begin(model, ids_BT, **kwargs)
    for layer in range(LAYERS):
        step.run_to(layer)
        if kwargs.get("cache") is None or layer != 1:  # one layer as a whole block
            step.attend()
            step.gate_input()
    return step.logits()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    ("attention", "positions"),
    [("full", kind) for kind in ("alibi", "dpe", "learned", "none", "rope")]
    + [("lsh", "rope"), ("lsh", "dpe")],
)
@torch.no_grad()
def test_the_pieces_are_the_whole(name: str, attention: str, positions: str) -> None:
    model = built(name, attention, positions)
    ids = ids_of(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    documents = torch.cat((torch.arange(15), torch.arange(9)))[None].expand(2, -1)
    for kwargs in ({}, {"attention_mask": mask}, {"position_ids": documents}):
        whole = model(ids, use_cache=False, **kwargs).logits
        assert torch.equal(in_pieces(model, ids, **kwargs), whole), kwargs
    own, other = KVCache(), KVCache()
    for start, stop in ((0, 14), (14, 22), (22, 23), (23, 24)):
        whole = model(ids[:, start:stop], cache=other).logits
        assert torch.equal(in_pieces(model, ids[:, start:stop], cache=own), whole), (start, stop)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_pieces_are_the_whole_with_an_expert(kind: str) -> None:
    model = tiny_model(kind).model
    ids = ids_of(2, 20) % model.config.vocab_size
    bare = model(ids, use_cache=False).logits
    if kind == "dmoe":
        module = ExpertModule("noisy", (1, 2), 32, 16)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(2))
    else:
        module = expert(model)
    with model.experts.forced(module):
        whole = model(ids, use_cache=False).logits
        assert torch.equal(in_pieces(model, ids), whole) and not torch.equal(whole, bare)
        step = begin(model, ids)
        step.run_to(1)
        trunk = step.attend().clone()
        assert torch.equal(resume(model, trunk, 1, attended=True, input_ids=ids).logits(), whole)
    step = begin(model, ids)
    step.run_to(1)
    assert torch.equal(step.attend(), trunk), "an expert has a part in the attention below it"
    assert torch.equal(resume(model, trunk, 1, attended=True).logits(), bare)


@torch.no_grad()
def test_a_pass_goes_on_from_a_stream_through_other_upper_layers() -> None:
    model = tiny_model().model
    ids = ids_of(2, 20) % model.config.vocab_size
    whole = begin(model, ids).finish()
    stream = begin(model, ids).run_to(1)
    upper = copy.deepcopy(UpperLayers(model, 1))
    assert torch.equal(resume(model, stream, 1, upper=upper).finish(last=4), whole[:, -4:])
    upper.norm.weight.mul_(2.0)
    assert torch.equal(resume(model, stream, 1, upper=upper).finish(), 2 * whole)
    assert torch.equal(resume(model, stream, 1).finish(), whole), (
        "the model's own layers have changed"
    )
    with pytest.raises(ConfigError, match="start at 1"):
        resume(model, stream, 0, upper=upper)


@torch.no_grad()
def test_attention_inputs_are_those_of_the_layer() -> None:
    model = tiny_model().model
    ids = ids_of(1, 9) % model.config.vocab_size
    cache = KVCache()
    model(ids, cache=cache)
    step = begin(model, ids)
    for layer in range(LAYERS):
        step.run_to(layer)
        inputs = step.attention_inputs()
        assert torch.equal(inputs.key_BGTK, cache.layers[layer].keys)  # type: ignore[arg-type]
        assert torch.equal(inputs.value_BGTK, cache.layers[layer].values)  # type: ignore[arg-type]
        assert not torch.equal(inputs.plain_query_BHTK, inputs.query_BHTK)
        assert step.layer == layer and not step.attended


def test_a_pass_says_where_it_stands_and_cannot_go_back() -> None:
    model = tiny_model().model
    step = begin(model, ids_of(1, 4))
    step.run_to(1)
    step.attend()
    for move in (
        lambda: step.run_to(1),
        step.attend,
        step.attention_inputs,
        lambda: step.run_to(LAYERS + 1),
    ):
        with pytest.raises(ConfigError, match="after the attention of layer 1 of 3 layers"):
            move()
    step.finish()
    for move in (lambda: step.run_to(2), step.gate_input):
        with pytest.raises(ConfigError, match="before layer 3 of 3 layers"):
            move()
    with pytest.raises(ConfigError, match="Exactly one"):
        begin(model)
    with pytest.raises(ConfigError, match="Exactly one"):
        begin(model, ids_of(1, 4), inputs_embeds=torch.zeros(1, 4, 32))


INSIDES = {
    "_project",
    "attend",
    "attention",
    "attention_norm",
    "feed_forward",
    "feed_forward_norm",
    "gate_input",
    "input_layernorm",
    "mlp",
    "post_attention_layernorm",
    "run_layers",
    "self_attn",
    "transform",
}
"""Names of the parts of a layer, in this library and in others."""

STEPS = {"attend", "gate_input"}
"""Methods that `ForwardPass` has too; `step.attend()` is allowed."""

READERS = {
    "benchmarks/lsh_slot_in.py": {"attention"},  # trains only the attention projections
    "benchmarks/parity.py": {"feed_forward"},  # reports the gradients of routers
    # These pack the weights.
    "deepseek/compiled/native_weights.py": {"feed_forward"},
    "deepseek/compiled/small_arrays.py": {"attention", "attention_norm", "feed_forward_norm"},
    "deepseek/compiled/positions.py": {"attention"},
    "deepseek/compiled/weights.py": {"attention", "feed_forward"},
}
"""Files that read a layer's weights but do not run the layer. The table may only become shorter."""


def insides_used(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and name of every attribute in `source` that belongs to a layer."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute) or node.attr not in INSIDES:
            continue
        owner = ast.unparse(node.value)
        # `config.attention` is a kind's name, and a kernel's `buckets.attend` is not a layer's.
        if owner.split(".")[-1] == "config" or (
            node.attr in STEPS and owner in ("step", "buckets")
        ):
            continue
        yield node.lineno, node.attr


def outside_files() -> list[Path]:
    package = [
        path
        for path in (ROOT / "deepseek").rglob("*.py")
        if "model" not in path.relative_to(ROOT).parts[1:2] and not imports_planning(path)
    ]
    return [*package, *(ROOT / "benchmarks").glob("*.py")]


def imports_planning(path: Path) -> bool:
    """Return whether a file's `attention` is a memory figure of the planner, not a model's part."""
    return "planning" in path.parts or "from deepseek.planning" in path.read_text()


def test_nobody_outside_the_model_reaches_into_a_layer() -> None:
    found: dict[str, set[str]] = {}
    for path in outside_files():
        for line, name in insides_used(path.read_text()):
            place = path.relative_to(ROOT).as_posix()
            assert name in READERS.get(place, set()), (
                f"{place}:{line} uses .{name} of a layer; use model/passes.py"
            )
            found.setdefault(place, set()).add(name)
    assert found == READERS, "an exception is no longer needed: take it off the table"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("model.layers[3].attention(x, ctx)", ["attention"]),
        ("block.attend(x, ctx)", ["attend"]),
        ("for block in model.layers:\n    y = block.feed_forward_norm(x)", ["feed_forward_norm"]),
        ("twin.model.layers[0].self_attn._project(x)", ["_project", "self_attn"]),
        ("step.attend()\nconfig.attention\nself.model.config.attention\nbuckets.attend(q)", []),
    ],
)
def test_the_ratchet_sees(source: str, names: list[str]) -> None:
    assert sorted(name for _, name in insides_used(source)) == names


def test_a_pass_is_made_by_begin_and_resume_alone() -> None:
    """Except in the exported graph, whose context must not depend on the values of its inputs."""
    makers = set()
    for path in outside_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                ForwardPass.__name__,
                "ForwardContext",
            ):
                makers.add(path.relative_to(ROOT).as_posix())
    assert makers == {"deepseek/export/graph.py"}
