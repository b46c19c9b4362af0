"""Serve a model on a free port and send requests over HTTP.

python examples/05_serve.py
"""

import json
import threading
import urllib.request

import uvicorn

import deepseek
from deepseek.engine.engine import Engine
from deepseek.server.app import create_app
from deepseek.server.run import address, listen
from deepseek.server.settings import Settings

settings = Settings(port=0)
listener = listen(settings)
url = address(listener, settings.host)


def post(path: str, body: dict[str, object]) -> dict[str, object]:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return dict(json.load(reply))


with Engine(*deepseek.load("smollm2-135m")) as engine:
    server = uvicorn.Server(uvicorn.Config(create_app(engine, settings), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    question = {"role": "user", "content": "What is the capital of France?"}
    answer = post(
        "/v1/chat/completions",
        {"model": "smollm2-135m", "messages": [question], "max_tokens": 24, "temperature": 0},
    )
    print(json.dumps(answer, indent=1))
    with urllib.request.urlopen(f"{url}/v1/models") as reply:
        print([model["id"] for model in json.load(reply)["data"]])
    server.should_exit = True
    thread.join()
listener.close()
