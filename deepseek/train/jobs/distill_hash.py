"""`deepseek.distill_hash`: learn the hashes of LSH attention for a model, which stays unchanged.

texts -> attention inputs, layer by layer -> k-means and L-BFGS -> one file beside the model
"""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

from deepseek.checkpoint.files import located, writable_file
from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.checkpoint.hub import resolve
from deepseek.data.text.encode import long_texts
from deepseek.data.text.public import documents_at
from deepseek.engine.load import load
from deepseek.errors import ConfigError
from deepseek.model.attention.hash import hash_file, save_hashes
from deepseek.model.language_model import own_model
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
    with run_lock(state), ProgressBar(quiet=arguments.quiet) as progress:
        hashes = distill_hashes(
            model, ids_RT, settings, layers, state, identity=identity, progress=progress
        )
        save_hashes(path, hashes, weights)
        shutil.rmtree(state)
    return path


def hash_settings(arguments: DistillHashArguments) -> HashSettings:
    """Return the settings that, with model and text, determine the hashes."""
    settings = HashSettings(
        num_buckets=arguments.buckets, bucket_window=arguments.window, seed=arguments.seed
    )
    return replace(settings, solver_steps=0) if arguments.calibrate_only else settings
