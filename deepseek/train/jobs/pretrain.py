"""`deepseek.pretrain`: train a tokenizer and a language model from scratch on several domains.

texts -> tokenizer -> token shards, easy documents first -> mix -> model -> loop -> a model folder
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import atomic_folder, home, write_json
from deepseek.data import Batch, RowLoader, TokenShards
from deepseek.data.text.filters import Skipped
from deepseek.data.text.secrets import redact_document
from deepseek.device.choose import choose_device, choose_dtype
from deepseek.device.memory import free_memory, peak_memory, synchronize
from deepseek.errors import ConfigError, DataError
from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel
from deepseek.planning import training_memory
from deepseek.text.tokenizer import (
    document_end_id,
    load_tokenizer,
    tokenizer_digest,
    train_tokenizer,
)
from deepseek.train.jobs.declaration import job
from deepseek.train.jobs.language import LanguageTask
from deepseek.train.jobs.pretrain_arguments import PretrainArguments
from deepseek.train.jobs.settings import DomainSettings
from deepseek.train.loop.backends import Backend, current
from deepseek.train.loop.loop import LoopConfig, TrainResult, train
from deepseek.train.loop.optim import OptimConfig
from deepseek.train.loop.progress import ProgressBar
from deepseek.train.loop.runs import Run, run_once
from deepseek.train.loop.stopwatch import Stopwatch
from deepseek.train.text.corpus import build_corpus, read_source
from deepseek.train.text.inputs import text_digest
from deepseek.train.text.mix import EASY_STEPS, Domain, MixedRows, easiest_first

TOKENIZER_CHARACTERS = 20_000_000
"""Characters of text for learning the tokenizer's merges; more text hardly changes them."""

SAMPLE_TOKENS = 48
"""Tokens per sample."""


@job(PretrainArguments)
def pretrain(arguments: PretrainArguments) -> Path:
    """Train a language model from scratch and return its folder. The same call resumes a run.

    Under `torchrun`, parameters, gradients and optimizer moments are sharded over the processes
    (FSDP2).

    Raises:
        ConfigError, DataError, TrainError: the message states the cause and the fix.
        KeyboardInterrupt: after Ctrl-C; the message says how to resume.
    """
    with current(arguments.device) as backend:
        if backend.world > arguments.batch_rows:
            raise ConfigError(
                f"batch_rows={arguments.batch_rows} is too small for {backend.world} processes, "
                f"each of which needs a row; set it to at least {backend.world}, or start at most "
                f"{arguments.batch_rows} processes."
            )
        run = Run.of(
            arguments,
            home() / "models" / arguments.name,
            lambda written: pretrain_inputs(arguments, written) if backend.main else {},
        )
        run = replace(run, quiet=arguments.quiet or not backend.main, main=backend.main)
        return run_once(partial(PretrainRun, backend=backend), arguments, run)


def pretrain_inputs(settings: PretrainArguments, without: Sequence[Path]) -> dict[str, str]:
    """Return the digests of every domain's text, and of the tokenizer if one is given.

    Args:
        settings: the arguments.
        without: files and folders that the run itself writes.
    """
    inputs = {}
    for name, domain in settings.domains.items():
        source = domain.source(settings.held_out, settings.seed)
        inputs[f"text of {name}"] = text_digest(source, without)
    if settings.tokenizer:
        tokenizer = load_tokenizer(resolve(settings.tokenizer))
        inputs["tokenizer"] = tokenizer_digest(tokenizer)
    return inputs


class PretrainRun:
    """One pre-training in its run folder."""

    def __init__(
        self,
        settings: PretrainArguments,
        folder: Path,
        out: Path,
        progress: ProgressBar,
        backend: Backend,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.out = out
        self.progress = progress
        self.backend = backend
        self.clock = Stopwatch(folder)
        self.device = choose_device(settings.device)
        self.dtype = choose_dtype(settings.dtype, self.device)

    def run(self) -> dict[str, Any] | None:
        """Train and write the model; return the figures of the run (None outside the main
        process).
        """
        if not self.backend.main:
            # The main process trains the tokenizer and writes the shards; others only open them.
            self.backend.barrier()
        self.tokenizer = self.known_tokenizer()
        self.domains = [self.domain(name, text) for name, text in self.settings.domains.items()]
        if self.backend.main:
            write_json(self.folder / "request.json", self.settings.as_json())
            self.backend.barrier()
        return self.write(self.train())

    def estimate(self) -> str:
        """Return the estimated steps, memory and time; the time only if the model fits into
        memory.
        """
        settings = self.settings
        for domain in settings.domains.values():
            next(read_source(domain.source(settings.held_out, settings.seed), Skipped()))
        size = (
            settings.vocab_size
            if not settings.tokenizer
            else len(load_tokenizer(resolve(settings.tokenizer)))
        )
        config = settings.model_config_for(size, 0)
        steps = settings.steps
        memory = training_memory(
            config, settings.batch_rows * settings.row_length, processor=self.device.type == "cpu"
        )
        words = (
            f"{steps:,} steps of {settings.tokens // steps:,} tokens; memory {memory / 1e9:.1f} GB"
        )
        if memory > free_memory(self.device):
            place = "this machine" if self.device.type == "cpu" else str(self.device)
            return f"{words}, more than {place} has free; see `deepseek plan`"
        minutes = self.step_seconds(config) * steps / 60
        return (
            f"{words}, about {minutes:.1f} minutes here on {self.device}, evaluation and reading "
            "not counted"
        )

    def step_seconds(self, config: ModelConfig) -> float:
        """Return the seconds of one optimizer step, measured on random tokens."""
        settings = self.settings
        model = DeepSeekModel(config).float().train()
        model.compute_dtype = self.dtype
        task = LanguageTask(nn.Module.to(model, self.device), {})
        batch = partial(_random_batch, config.vocab_size, settings.row_length)
        task.loss(batch(1), 0).loss.backward()  # the first pass compiles and allocates
        synchronize(self.device)
        started = time.perf_counter()
        task.loss(batch(settings.batch_rows), 0).loss.backward()
        synchronize(self.device)
        return (time.perf_counter() - started) * settings.accumulate

    def known_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer, training it on the mix if necessary."""
        if self.settings.tokenizer:
            return load_tokenizer(resolve(self.settings.tokenizer))
        folder = self.folder / "tokenizer"
        if not folder.is_dir():
            self.progress.say("training the tokenizer")
            tokenizer = train_tokenizer(mixed_texts(self.settings), self.settings.vocab_size)
            with atomic_folder(folder) as temporary:
                tokenizer.save_pretrained(temporary)
        return load_tokenizer(folder)

    def domain(self, name: str, text: DomainSettings) -> Domain:
        """Return one domain with its packed rows.

        Raises:
            DataError: its token shards are damaged.
        """
        settings = self.settings
        source = text.source(settings.held_out, settings.seed)
        corpus = build_corpus(
            source,
            self.tokenizer,
            self.folder / "corpus" / name,
            self.progress,
            lambda train, validation: (easiest_first(train), validation),
        )
        self.progress.say(f"{name}: {corpus.report}")
        loaders = [self.loader(shards) for shards in (corpus.train, corpus.held_out)]
        return Domain(name, loaders[0], loaders[1], text.weight)

    def loader(self, shards: TokenShards) -> RowLoader:
        """Return the packed rows of token shards.

        Raises:
            DataError: the shards are damaged.
        """
        if not shards.is_intact():
            raise DataError(
                f"The token shards in {shards.folder} are damaged; delete {shards.folder.parent}."
            )
        loader = RowLoader(
            shards, self.settings.batch_rows, self.settings.row_length, self.settings.seed
        )
        return loader.with_targets()

    def train(self) -> TrainResult:
        """Run the training loop."""
        settings = self.settings
        self.model = build_model(settings, self.tokenizer)
        self.model.compute_dtype = self.dtype
        if self.backend.world == 1:  # a sharded model is moved part by part
            nn.Module.to(self.model, self.device)
        held_out = {domain.name: self.held_out_batches(domain.held_out) for domain in self.domains}
        weights = {domain.name: domain.weight for domain in self.domains}
        self.task = LanguageTask(self.model, held_out, self.backend, weights)
        optim = OptimConfig(
            learning_rate=settings.learning_rate,
            warmup=settings.warmup,
            weight_decay=settings.weight_decay,
            final=settings.final_learning_rate / settings.learning_rate,
        )
        config = LoopConfig(
            optim,
            steps=settings.steps,
            accumulate=settings.accumulate,
            evaluate_every=settings.evaluate_every,
            checkpoint_every=settings.checkpoint_every,
            seed=settings.seed,
        )
        rows = settings.batch_rows * settings.accumulate
        easy = round(EASY_STEPS * config.steps) * rows if settings.curriculum else 0
        batches = MixedRows(self.domains, settings.batch_rows, easy, settings.seed)
        hooks = replace(self.task.hooks, evaluated=self.evaluated)
        return train(
            self.task,
            batches,
            config,
            self.folder / "training",
            progress=self.progress,
            hooks=hooks,
            backend=self.backend,
        )

    def held_out_batches(self, loader: RowLoader) -> list[Batch]:
        """Return a domain's held-out batches, full ones if it has enough rows.

        Each process needs a row of every batch. If a domain has fewer rows than there are
        processes, all are repeated equally often, so that loss and expert load stay the same.

        Args:
            loader: the domain's held-out rows.
        """
        size = self.settings.batch_rows
        rows = min(len(loader.row_ids), max(size, self.settings.held_out_tokens // loader.length))
        chosen = loader.first(max(rows // size * size, min(rows, size)))
        if rows >= self.backend.world:
            return chosen.batches()
        copies = -(-self.backend.world // rows)
        return [loader.rows(chosen.row_ids.tolist() * copies)]

    def evaluated(self, step: int) -> None:
        """Save the elapsed time and write samples after an evaluation."""
        if self.backend.main:
            self.clock.keep()
        # A sharded model only runs as a whole module, whereas `generate` calls its parts.
        if self.backend.world == 1:
            self.write_samples(step)

    @torch.no_grad()
    def write_samples(self, step: int) -> None:
        """Write sampled continuations of the prompts without touching the training's random
        state.
        """
        texts = []
        self.model.eval()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.settings.seed)
            for prompt in self.settings.samples:
                ids = self.tokenizer(prompt, return_tensors="pt").input_ids.to(self.device)
                token_budget = self.model.config.max_position_embeddings - ids.shape[1]
                sampled_ids = self.model.generate(
                    ids,
                    max_new_tokens=max(1, min(SAMPLE_TOKENS, token_budget)),
                    do_sample=True,
                    temperature=0.8,
                    pad_token_id=0,
                )
                texts.append(self.tokenizer.decode(sampled_ids[0]))
        self.model.train()
        write_json(self.folder / "samples" / f"step-{step:08d}.json", texts)

    def write(self, result: TrainResult) -> dict[str, Any] | None:
        """Write the model with its tokenizer; return the figures of the run."""
        # `own_tensors` drops the duplicates of tied weights first: gathered copies no longer share
        # storage, so that `save_pretrained` couldn't detect them.
        whole = {
            name: self.backend.whole(tensor) for name, tensor in self.model.own_tensors().items()
        }
        if not self.backend.main:
            return None
        with atomic_folder(self.out) as temporary:
            self.model.save_pretrained(temporary, state_dict=whole)
            self.tokenizer.save_pretrained(temporary)
        position = result.position
        figures = {
            **result.metrics,
            "steps": position.step,
            "skipped": position.skipped,
            "tokens": position.tokens,
            "seconds": self.clock.seconds,
            "peak_memory": peak_memory(self.device),
            "parameters": sum(tensor.numel() for tensor in self.task.parameters.values()),
        }
        data = {
            d.name: {"digest": d.train.shards.digest, "tokens": d.train.shards.num_tokens}
            for d in self.domains
        }
        self.progress.say(
            f"held-out loss {result.metrics['held_out_loss']:.4f} "
            f"after {position.tokens:,} tokens, {self.out}"
        )
        record = {"stage": "pretrain", "model": str(self.out), "figures": figures, "data": data}
        return record | {"licence": self.settings.licence}


def build_model(settings: PretrainArguments, tokenizer: PreTrainedTokenizerFast) -> DeepSeekModel:
    """Return the model with weights initialised from the seed, in fp32."""
    torch.manual_seed(settings.seed)
    return (
        DeepSeekModel(settings.model_config_for(len(tokenizer), document_end_id(tokenizer)))
        .float()
        .train()
    )


def mixed_texts(settings: PretrainArguments) -> Iterator[str]:
    """Yield text of the domains in turn, each up to its weight's share of
    `TOKENIZER_CHARACTERS`.
    """
    total = sum(domain.weight for domain in settings.domains.values())
    parts = [
        cut(domain, round(TOKENIZER_CHARACTERS * domain.weight / total), settings)
        for domain in settings.domains.values()
    ]
    for texts in zip_longest(*parts):
        yield from (text for text in texts if text)


def cut(domain: DomainSettings, characters: int, settings: PretrainArguments) -> Iterator[str]:
    """Yield texts of one domain until they add up to `characters`.

    Secrets are redacted: one that is in many files would become a token of the vocabulary.
    """
    for document in read_source(domain.source(settings.held_out, settings.seed), Skipped()):
        yield redact_document(document)[0].text
        characters -= len(document.text)
        if characters <= 0:
            return


def _random_batch(vocab_size: int, length: int, rows: int) -> Batch:
    ids = torch.randint(vocab_size, (rows, length))
    return Batch(ids, ids.roll(-1, 1), torch.arange(length).repeat(rows, 1), torch.arange(rows))
