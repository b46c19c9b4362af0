"""`deepseek serve`: an OpenAI-compatible server with a web page."""

import re
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from deepseek.checkpoint.files import expanded
from deepseek.cli.options import (
    Device,
    Experts,
    Int8,
    Precision,
    existing_folder,
    expert_packs,
    names,
    refuse_ignored,
)
from deepseek.errors import ConfigError
from deepseek.server.request_log import LogLevel

app = typer.Typer(add_completion=False)

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([^\s/?#@:\[\]]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
"""Scheme, host and perhaps a port, as browsers write the header `Origin` (RFC 6454)."""


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(help="Base model: a known name, a folder, a GGUF file or a hub id.")
    ] = "smollm2-135m",
    experts: Experts = "all",
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but loopback needs a key.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free port.")
    ] = 8000,
    allow_host: Annotated[
        str, typer.Option(help="Further accepted Host names, comma-separated; * for all.")
    ] = "",
    allow_origin: Annotated[
        str,
        typer.Option(
            help="Sites whose pages may send requests, such as https://chat.example, "
            "comma-separated; * for all. They need a key if there is one."
        ),
    ] = "",
    served_model_name: Annotated[
        str, typer.Option(help="Further names of the model for clients, comma-separated.")
    ] = "",
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with one key per line, and after a key the experts that it may use, "
            "separated by spaces (- for none); a key alone may use all. Lines that begin with # "
            "are comments."
        ),
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the keys that may change the server, one per line; lines that begin "
            "with # are comments."
        ),
    ] = None,
    experts_folder: Annotated[
        Path | None, typer.Option(help="Folder from which packs are plugged by name.")
    ] = None,
    lock: Annotated[
        Path | None,
        typer.Option(
            help="Plug exactly the packs of a file of `deepseek expert lock` or `bundle`, in place "
            "of --experts."
        ),
    ] = None,
    lock_trusted: Annotated[
        bool,
        typer.Option(
            "--lock-trusted",
            help="With --lock: the file must be signed by a key in the trust folder.",
        ),
    ] = False,
    teach_root: Annotated[
        Path | None,
        typer.Option(help="Allow training experts on text below this folder; default: off."),
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum tokens of an answer if the request sets no limit.")
    ] = 512,
    infill_passages: Annotated[
        int,
        typer.Option(
            min=0,
            max=16,
            help="Maximum passages of the experts' indexes to put before the text that an editor "
            "sends to /infill; 0: none.",
        ),
    ] = 0,
    max_running: Annotated[int, typer.Option(min=1, help="Maximum requests in a batch.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Maximum requests in the queue.")] = 64,
    int8: Int8 = True,
    device: Device = "auto",
    dtype: Precision = "auto",
    cache_gib: Annotated[
        float, typer.Option(min=0.01, max=1e6, help="Budget of the KV cache, in GiB.")
    ] = 1.0,
    expert_gib: Annotated[
        float | None,
        typer.Option(
            min=0.0001,
            max=1e6,
            help="Budget of the experts' weights, in GiB: they are read when they are chosen, and "
            "those used least recently leave; default: all stay in memory.",
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve with many replicas, on Ray Serve.")
    ] = False,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="With --ray: number of replicas; default: 2.")
    ] = None,
    cpus: Annotated[
        float | None,
        typer.Option(min=0.01, max=1e4, help="With --ray: processors of each replica; default: 1."),
    ] = None,
    log_level: Annotated[
        LogLevel, typer.Option(help="Least severe messages to log; info logs each request.")
    ] = "info",
    drain_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            max=86_400,
            help="Time in seconds that running answers have to finish after SIGTERM.",
        ),
    ] = 20.0,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C. Keys are also read from DEEPSEEK_API_KEY, which may
    use all experts, and DEEPSEEK_ADMIN_KEY.
    """
    from deepseek.cli.waiting import Waiting
    from deepseek.packs.library import experts_folder as usual_folder
    from deepseek.server.keys import read_admin_keys, read_keys
    from deepseek.server.run import serve as run
    from deepseek.server.settings import Settings

    if not ray:
        refuse_ignored("goes with --ray", replicas=replicas, cpus=cpus)
    if lock:
        refuse_ignored(
            "does not go with --lock, which names the experts",
            experts=None if experts == "all" else experts,
        )
    elif lock_trusted:
        raise ConfigError("--lock-trusted says how to check a lock file; give --lock FILE too.")
    experts_folder = existing_folder("--experts-folder", experts_folder)
    teach_root = existing_folder("--teach-root", teach_root)
    api_key_file = api_key_file and expanded(api_key_file)
    admin_key_file = admin_key_file and expanded(admin_key_file)
    user_keys = read_keys(api_key_file, "DEEPSEEK_API_KEY", "--api-key-file")
    settings = Settings(
        host=host,
        port=port,
        hosts=frozenset(names(allow_host)),
        origins=frozenset(checked_origin(origin) for origin in names(allow_origin)),
        aliases=frozenset(names(served_model_name)),
        api_keys=frozenset(user_keys),
        key_experts={
            key: allowed_experts
            for key, allowed_experts in user_keys.items()
            if allowed_experts is not None
        },
        admin_keys=read_admin_keys(admin_key_file, "DEEPSEEK_ADMIN_KEY", "--admin-key-file"),
        teach_root=teach_root,
        answer_tokens=answer_tokens,
        infill_passages=infill_passages,
        log_level=log_level,
        experts_folder=experts_folder or usual_folder(),
    )
    progress = Waiting()
    run(
        model,
        experts=() if lock else partial(expert_packs, experts, model, experts_folder, progress),
        lock=lock,
        lock_trusted=lock_trusted,
        settings=settings,
        cache_gib=cache_gib,
        expert_gib=expert_gib,
        max_running=max_running,
        max_waiting=max_waiting,
        int8=int8,
        device=device,
        dtype=dtype,
        replicas=(replicas or 2) if ray else None,
        cpus=cpus or 1.0,
        drain_seconds=drain_seconds,
        progress=progress,
    )


def checked_origin(text: str) -> str:
    """Return a part of the option `--allow-origin` as browsers write it: in lower case.

    Raises:
        ConfigError: no browser would ever send it.
    """
    origin = text.rstrip("/").lower()
    # Pages of files and of sandboxed frames send "null".
    if origin not in ("*", "null") and not ORIGIN.fullmatch(origin):
        raise ConfigError(
            f"--allow-origin {text!r} is no origin of a page; write scheme://host or "
            "scheme://host:port, such as https://chat.example, or * for all."
        )
    return origin
