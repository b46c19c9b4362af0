"""`deepseek.distill_hash`: learn the hashes of LSH attention for a model, which stays unchanged.

texts -> attention inputs, layer by layer -> k-means and L-BFGS -> one file beside the model
"""

import hashlib
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from deepseek.checkpoint.files import located, writable_file
from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.checkpoint.hub import resolve
from deepseek.data.text.encode import long_texts
from deepseek.data.text.public import documents_at
from deepseek.device.memory import peak_memory
from deepseek.engine.load import load
from deepseek.errors import ConfigError
from deepseek.model.attention.hash import hash_file, save_hashes
from deepseek.model.language_model import own_model
from deepseek.model.transformer import DeepSeekModel
from deepseek.train.hash.distill import HashSettings, distill_hashes
from deepseek.train.jobs.declaration import job
from deepseek.train.jobs.distill_hash_arguments import DistillHashArguments
from deepseek.train.loop.progress import ProgressBar
from deepseek.train.loop.run_lock import run_lock


@job(DistillHashArguments)
def distill_hash(arguments: DistillHashArguments) -> Path:
    """Learn LSH hashes from a frozen model's attention and return their file. The same call resumes
    a run.

    Raises:
        ConfigError, DataError, TrainError, HubError: the message states the cause and the fix.
        KeyboardInterrupt: after Ctrl-C; the message says how to resume.
    """
    folder = resolve(arguments.base)
    loaded, tokenizer = load(arguments.base, device=arguments.device, dtype="float32")
    model = own_model(loaded, "Hash distillation")
    layers = range(arguments.exact, len(model.layers))
    if not layers:
        raise ConfigError(
            f"exact={arguments.exact} leaves none of the {len(model.layers)} layers to LSH; "
            "give a lower number."
        )
    path = writable_file(located(arguments.out or hash_file(folder)))
    documents = documents_at([Path(place) for place in arguments.data])
    ids_RT = long_texts(documents, tokenizer, arguments.texts, arguments.length, arguments.seed)
    weights = fingerprint(folder).weights
    identity = f"{weights} {hashlib.sha256(ids_RT.numpy().tobytes()).hexdigest()}"
    state = path.with_name(f"{path.name}.layers")
    settings = hash_settings(arguments)
    if arguments.dry_run:
        with ProgressBar(quiet=arguments.quiet) as progress:
            progress.say(estimated(model, ids_RT, settings, layers))
        return path
    with run_lock(state), ProgressBar(quiet=arguments.quiet) as progress:
        hashes = distill_hashes(
            model, ids_RT, settings, layers, state, identity=identity, progress=progress
        )
        save_hashes(path, hashes, weights)
        shutil.rmtree(state)
    return path


def estimated(model: DeepSeekModel, ids_RT: Tensor, settings: HashSettings, layers: range) -> str:
    """Return the estimated time and memory, from the first of the layers.

    Args:
        model: the model.
        ids_RT: token ids of the texts.
        settings: settings of the hashes.
        layers: layers that get a hash.
    """
    times = [time.perf_counter()]  # when each layer was done
    with tempfile.TemporaryDirectory() as state:
        distill_hashes(
            model,
            ids_RT,
            settings,
            layers[:1],
            Path(state) / "layers",
            progress=lambda *_: times.append(time.perf_counter()),
        )
    minutes = (times[-2] - times[0] + len(layers) * (times[-1] - times[-2])) / 60
    return (
        f"{len(layers)} layers on {ids_RT.numel():,} tokens, about {minutes:.1f} minutes on "
        f"{model.device}; memory {peak_memory(model.device) / 1e9:.1f} GB"
    )


def hash_settings(arguments: DistillHashArguments) -> HashSettings:
    """Return the settings that, with model and text, determine the hashes."""
    settings = HashSettings(
        num_buckets=arguments.buckets, bucket_window=arguments.window, seed=arguments.seed
    )
    return replace(settings, solver_steps=0) if arguments.calibrate_only else settings
