"""A server on a free port, in a thread, with a random model small enough to answer at once."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from openai import OpenAI
from tiny_expert import save_expert
from tiny_tokenizer import tiny_tokenizer

from deepseek.engine.engine import Engine
from deepseek.engine.load import load
from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel
from deepseek.server.app import create_app
from deepseek.server.connection import http_config
from deepseek.server.run import listen
from deepseek.server.schema import TeachRequest
from deepseek.server.service import Service
from deepseek.server.settings import Settings

CONTEXT = 768


@dataclass
class Live:
    """A running server."""

    url: str
    service: Service
    engine: Engine
    folder: Path
    """Folder of packs, with `one.safetensors` and `two.safetensors`."""

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


def save_model(folder: Path) -> Path:
    """Save a random three-layer model with its tokenizer in `folder` and return it."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    DeepSeekModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def live(
    folder: Path,
    settings: Settings | None = None,
    lesson: TeachRequest | None = None,
    **engine_dials: Any,
) -> Iterator[Live]:
    """Serve the model `tiny` in `folder` until the block ends; create it with two experts if it
    does not exist.
    """
    base, packs = folder / "tiny", folder / "experts"
    if not base.exists():
        save_model(base)
    loaded = load(base, dtype="float32")
    packs.mkdir(exist_ok=True)
    for seed, name in enumerate(("one", "two"), 1):
        if not (packs / f"{name}.safetensors").exists():
            save_expert(loaded, name, packs, seed)
    settings = replace(
        settings or Settings(),
        model="tiny",
        base=str(base),
        port=0,
        experts_folder=packs,
        preferences=folder / "preferences.db",
    )
    with Engine(*loaded, **engine_dials) as engine:
        app = create_app(engine, settings, lesson)
        listener = listen(settings)
        server = uvicorn.Server(http_config(app, timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield Live(url, app.state.service, engine, packs)
        finally:
            server.should_exit = True
            thread.join()
            listener.close()
