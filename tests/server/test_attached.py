"""The server with stock models of other families: chat with experts, streamed, and plugged live."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import CONTEXT, Live, live
from tiny_families import tiny_family
from tiny_tokenizer import tiny_tokenizer

from deepseek.model.attached.model import AttachedModel
from deepseek.model.language_model import expert_beside, load_language_model
from deepseek.packs.pack import write_pack

ASKED: list[Any] = [{"role": "user", "content": "the expert of the model"}]


def save_family(family: str, folder: Path) -> None:
    """Save a random model of a family with its tokenizer, and two experts that always fire."""
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    tiny_family(family, eos_token_id=None, **sizes).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    model = load_language_model(folder / "tiny", dtype="float32")
    (folder / "experts").mkdir()
    for seed, name in enumerate(("one", "two"), 1):
        module = expert_beside(model, name, model.experts.sites.indices[-2:], 16, seed=seed)
        torch.manual_seed(seed)
        for layer in module.layers:
            torch.nn.init.normal_(module.at(layer).down_proj, std=0.5)
            module.set_gate(layer, torch.eye(33)[-1])
        pack = module.to_pack(model.experts.base, "Apache-2.0")
        write_pack(folder / "experts" / f"{name}.safetensors", pack)


@pytest.fixture(scope="module", params=["gemma4_text", "gpt_oss", "nemotron_h", "qwen3_5_text"])
def server(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp(request.param)
    save_family(request.param, folder)
    with live(folder) as running:
        yield running


def ask(server: Live, model: str, **how: Any) -> Any:
    client = server.client().chat.completions
    return client.create(model=model, messages=ASKED, max_tokens=12, temperature=0, **how)


def test_experts_speak_in_streams_and_leave_no_trace(server: Live) -> None:
    assert isinstance(server.engine.model, AttachedModel)
    base = ask(server, "tiny").choices[0].message.content
    server.engine.plug(server.folder / "one.safetensors")
    server.engine.plug(server.folder / "two.safetensors")
    reply = ask(server, "tiny+one")
    assert reply.choices[0].message.content != base
    assert reply.experts == {"one": 12}
    parts = [part.choices[0].delta.content or "" for part in ask(server, "tiny+one", stream=True)]
    assert len(parts) > 3
    assert "".join(parts) == reply.choices[0].message.content
    server.engine.unplug("one")
    server.engine.unplug("two")
    assert ask(server, "tiny").choices[0].message.content == base


def test_embeddings_are_the_bases(server: Live) -> None:
    client = server.client().embeddings
    before = client.create(model="tiny", input="the value").data[0].embedding
    server.engine.plug(server.folder / "one.safetensors")
    assert client.create(model="tiny", input="the value").data[0].embedding == before
    server.engine.unplug("one")
