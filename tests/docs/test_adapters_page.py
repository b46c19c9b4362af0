"""The Python code of `docs/how-to/adapters.md` runs unchanged, except for a small model's name."""

import re
from pathlib import Path

import pytest
from tiny_adapter import save_llama, write_adapter

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "adapters.md"
LAYERS = {"model.layers.0.self_attn.q_proj": (64, 64)}


def test_the_page_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    save_llama(tmp_path / "llama")
    write_adapter(tmp_path / "adapters" / "support", LAYERS)
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = [text for text in found if "import_adapter" in text]
    names: dict[str, object] = {}
    exec(block.replace("smollm2-135m", "llama"), names)
    model = names["model"]
    assert model.experts.list() == ()  # type: ignore[attr-defined]
    assert not any(module._forward_hooks for module in model.modules())  # type: ignore[attr-defined]
