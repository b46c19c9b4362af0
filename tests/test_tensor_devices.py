"""Every tensor that our code creates names its device: a tensor on the CPU by default fails only on
machines with a GPU, where it meets one on the GPU.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deepseek"

ROOMS = ("engine", "evaluate", "kernels", "model", "train")

FACTORIES = frozenset(
    [
        "arange",
        "empty",
        "eye",
        "full",
        "linspace",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "tensor",
        "zeros",
    ]
)
"""Functions of `torch` that create a tensor on the default device."""

EXCEPTIONS = {
    "parameters and buffers, made where the module is built and moved with it": {
        "model/attention/lsh.py RandomHash.__init__",
        "model/experts/layer.py ExpertLayer.__init__",
        "model/moe/balance.py Balance._initial_values",
        "model/moe/experts.py Experts.__init__",
        "model/moe/router.py Router.__init__",
        "model/norm.py RMSNorm.__init__",
        "model/positions/dynamic.py DynamicBias.__init__",
        "model/positions/learned.py DynamicPositionalEncoding.__init__",
        "model/pretrained.py _load",
    },
    "a kernel for the CPU, which other devices never reach": {
        "kernels/decode_attention.py attend",
        "kernels/lsh/probes.py likeliest",
        "kernels/lsh/strips.py _call",
        "kernels/moe/grouped_mm.py _backward_op",
        "kernels/moe/grouped_mm.py _combine",
        "kernels/moe/grouped_mm.py _mix_op",
    },
    "gates and tables of a module, which stay on the host until they are stacked": {
        "model/experts/module.py ExpertModule.__init__"
    },
    "drawn from the CPU's generator, the same on every device, then moved": {
        "model/experts/layer.py ExpertLayer.copy_rows",
        "model/moe/layer.py _random",
        "train/gates/replay.py Replay.beside",
        "train/hash/distill.py _calibrate",
        "train/hash/distill.py _metric",
        "train/hash/distill.py _positions",
    },
    "token ids of batches, which are moved when a pass begins": {
        "train/gates/background.py _encoded",
        "train/gates/background.py _measured",
        "train/gates/conversations.py conversation_rows",
        "train/gates/public_text.py _adapted_rows",
        "train/gates/public_text.py public_batches",
        "train/gates/public_text.py public_rows",
        "train/gates/public_text.py sampled_rows",
        "train/gates/replay.py Replay.at",
        "train/jobs/expert.py ExpertRun.calibrate",
        "train/jobs/pretrain.py _random_batch",
        "train/jobs/text_run.py TextRun.head",
        "train/rl/rollout.py generate",
    },
    "a number, or a sum in double precision, on the host": {
        "kernels/int8.py hadamard",
        "model/positions/dynamic.py DynamicBias.tables",
        "train/jobs/language.py LanguageTask._sum",
        "train/jobs/language.py LanguageTask.evaluate",
        "train/jobs/language.py LanguageTask.loss_on",
        "train/loop/backends/fsdp2.py FSDP2.any",
        "train/loop/backends/fsdp2.py FSDP2.weigh",
        "train/rl/reward.py RewardModel.quality",
        "train/rl/rlpo.py Learner.__init__",
        "train/rl/rlpo_config.py checked_scores",
    },
}
"""Functions that may create tensors without naming a device, by reason."""


def nodes_by_function(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield every node with the qualified name of its function or class."""
    for node in ast.iter_child_nodes(tree):
        inner = (
            f"{prefix}{node.name}." if isinstance(node, ast.FunctionDef | ast.ClassDef) else prefix
        )
        yield prefix.rstrip("."), node
        yield from nodes_by_function(node, inner)


def without_device(source: str) -> Iterator[str]:
    """Yield the functions of `source` that call a factory of torch without `device`."""
    for function, node in nodes_by_function(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "torch"
            and node.func.attr in FACTORIES
            and all(keyword.arg != "device" for keyword in node.keywords)
        ):
            yield function


def test_every_tensor_names_its_device() -> None:
    found = {
        f"{path.relative_to(PACKAGE)} {function}"
        for room in ROOMS
        for path in (PACKAGE / room).rglob("*.py")
        for function in without_device(path.read_text(encoding="utf-8"))
    }
    excused = {place for places in EXCEPTIONS.values() for place in places}
    assert found - excused == set(), "name the device, or add the reason why not"
    assert excused - found == set(), "these name their device now; take them off the list"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    return torch.zeros(2)", ["f"]),
        ("class A:\n    def f(self):\n        return [torch.arange(n) for n in x]", ["A.f"]),
        ("def f():\n    return torch.zeros(2, device=x.device)", []),
    ],
)
def test_the_rule_sees(source: str, found: list[str]) -> None:
    assert list(without_device(source)) == found
