"""`deepseek.adapt`: adapt an existing model to text.

There are four modes: train the last layers on a cached trunk, low-rank adapters, all parameters, or
an expert module beside the frozen model.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass as declaration
from safetensors.torch import save_file
from torch import Tensor, nn

from deepseek.checkpoint.convert import read_tensors, restore_names
from deepseek.checkpoint.licence import copy_terms
from deepseek.checkpoint.store import atomic_folder, home, write_json
from deepseek.data import Batch
from deepseek.device.memory import peak_memory
from deepseek.device.transfer import to_device
from deepseek.errors import ConfigError
from deepseek.kernels.cross_entropy import CandidateHead
from deepseek.model.language_model import own_model
from deepseek.model.passes import resume
from deepseek.model.precision import autocast
from deepseek.model.transformer import DeepSeekModel
from deepseek.train.gates.public_text import remember_adapted
from deepseek.train.jobs.arguments import AdaptArguments
from deepseek.train.jobs.declaration import DECLARED, job
from deepseek.train.jobs.expert import train_expert
from deepseek.train.jobs.expert_task import ExpertTask
from deepseek.train.jobs.language import LanguageTask
from deepseek.train.jobs.outcome import Outcome
from deepseek.train.jobs.plan import Amount, Speed, TrainingPlan, make_plan, timed
from deepseek.train.jobs.text_request import TextRequest, row_length_for
from deepseek.train.jobs.text_run import TextRun, Texts, text_inputs
from deepseek.train.loop.layers import trained_prefixes
from deepseek.train.loop.loop import Task
from deepseek.train.loop.packed import begin_rows
from deepseek.train.loop.progress import ProgressBar
from deepseek.train.loop.runs import Run, run_once
from deepseek.train.text.trunk_cache import Stream

LEARNING_RATES = {"last-n": 1e-3, "lora": 8e-3, "full": 2e-4}
"""Peak learning rates by mode. Rank-1 adapters need forty times that of full fine-tuning
(docs/log/adaptation.md, 2026-11-26).
"""

LITTLE_TEXT_RATES = LEARNING_RATES | {"last-n": 5e-4}
"""The same for little text (see `TextRequest`; docs/log/adaptation.md, 2026-11-29)."""

FULL_RATE_RANK = 5
"""Largest rank at the full learning rate; above it, the rate falls with the square root of the rank
(docs/log/adaptation.md, 2026-11-29).
"""

BATCH_ROWS = 4

COPIED = ("*.json", "*.model", "*.txt", "*.jinja")
"""Files of the base that are copied to the adapted model: config, tokenizer, chat template."""


@declaration(kw_only=True, frozen=True, config=DECLARED)
class AdaptRequest(TextRequest, AdaptArguments):
    """Resolved arguments of an adaptation, stored as `request.json`."""

    def as_json(self) -> dict[str, Any]:
        """Return the arguments as JSON values. A rank of None is left out, so that runs from before
        that argument can be resumed.
        """
        values = super().as_json()
        if self.rank is None:
            del values["rank"]
        return values


@job(AdaptArguments)
def adapt(arguments: AdaptArguments) -> Path:
    """Adapt a model to text and return the folder of the new model (in mode "expert", its pack).
    The same call resumes a run.

    Raises:
        DataError, TrainError, ConfigError, HubError: the message states the cause and the fix.
        KeyboardInterrupt: after Ctrl-C; the message says how to resume.
    """
    if arguments.mode == "expert":
        return train_expert(**vars(arguments.for_expert()))
    request = adapt_request(arguments)
    run = Run.of(request, home() / "models" / request.name, partial(text_inputs, request))
    return run_once(AdaptRun, request, run)


def adapt_request(arguments: AdaptArguments) -> AdaptRequest:
    """Return the arguments with the defaults that depend on mode and rank filled in."""
    factor = min(1.0, FULL_RATE_RANK / (arguments.rank or 1)) ** 0.5
    asked = arguments.learning_rate
    resolved = {
        "name": arguments.named(),
        "row_length": row_length_for(arguments),
        "batch_rows": arguments.batch_rows or BATCH_ROWS,
        "learning_rate": asked or factor * LEARNING_RATES[arguments.mode],
        "little_text_rate": asked or factor * LITTLE_TEXT_RATES[arguments.mode],
    }
    return AdaptRequest(**{**vars(arguments), **resolved})


class AdaptRun(TextRun):
    """One adaptation in its run folder."""

    model: DeepSeekModel

    def __init__(
        self, request: AdaptRequest, folder: Path, out: Path, progress: ProgressBar
    ) -> None:
        weights = torch.float32 if request.mode == "full" else None
        super().__init__(request, folder, progress, weights)
        self.model = own_model(self.model, "Adaptation")
        self.request = request
        self.out = out
        self.first = len(self.model.layers) - request.last
        if request.mode == "last-n" and not 0 < self.first < len(self.model.layers):
            raise ConfigError(
                f"last={request.last} is impossible; the model has {len(self.model.layers)} "
                "layers, and at least one must stay frozen: give a lower number."
            )

    def run(self) -> dict[str, Any]:
        """Train and write the model; return the figures of the run."""
        texts = self.texts(self.corpus())
        write_json(self.folder / "request.json", self.request.as_json())
        plan = self.plan(texts)
        texts = texts.planned(plan)
        task, test = TASKS[self.request.mode](self, texts)
        self.trained = sum(parameter.numel() for parameter in task.parameters.values())
        record = self.write(self.loop(task, texts.train, plan, test), texts.train.shards.digest)
        remember_adapted(self.out, self.base, texts.train.shards)
        return record

    def estimate(self) -> str:
        """Return the estimated tokens, time and memory, from one timed step."""
        request = self.request
        texts = self.texts(self.corpus())
        rows = self.plan(texts).rows
        sample = texts.first(min(request.batch_rows, rows), 1, 1)
        started = time.perf_counter()
        task, _ = TASKS[request.mode](self, sample)
        trunk = (time.perf_counter() - started) / len(sample.train.row_ids)
        batch = sample.train.rows(sample.train.row_ids)
        learn = lambda rows: task.loss(rows, 0).loss.backward()  # noqa: E731
        seconds, _ = timed(learn, batch, batch, self.device)
        trained = sum(parameter.numel() for parameter in task.parameters.values())
        minutes = (trunk + seconds * request.epochs) * rows / 60
        return (
            f"{rows * request.row_length:,} tokens, {request.epochs} times; "
            f"{trained:,} trainable parameters, about {minutes:.1f} minutes on {self.device}, "
            # 12 bytes a parameter: gradient and two moments in fp32
            f"memory {(peak_memory(self.device) + 12 * trained) / 1e9:.1f} GB"
        )

    def plan(self, texts: Texts) -> TrainingPlan:
        """Return the plan of this run. Without a time budget, no speed needs to be measured."""
        request = self.request
        amount = Amount(
            request.tokens,
            request.epochs,
            request.epochs,
            request.row_length,
            request.batch_rows,
            request.held_out_tokens,
        )
        return make_plan(amount, None, Speed(0.0, 0.0, 0.0), texts.counts)

    def last_layers(self, texts: Texts) -> "TaskAndTest":
        """Return the task for the last layers; the trunk below is run and cached once per row."""
        self.model.requires_grad_(False)
        compute = partial(stream_into, self.model, self.first)
        computed_as = f"input, {self.model.dtype}"
        streams = [
            self.cached(name, text, self.first, compute, computed_as)
            for name, text in (
                ("train", texts.train),
                ("validation", texts.validation),
                ("held-out", texts.held_out),
            )
        ]
        head = self.head(texts.train)
        validation = texts.validation.batches()
        task = LastLayersTask(self.model, self.first, head, streams[0], validation, streams[1])
        return task, partial(task.loss_on, texts.held_out.batches(), streams[2])

    def adapters(self, texts: Texts) -> "TaskAndTest":
        """Return the task for low-rank adapters."""
        torch.manual_seed(self.request.seed)
        self.adapter = add_lora(self.model, self.request.rank)
        return self.whole(texts)

    def whole(self, texts: Texts) -> "TaskAndTest":
        """Return the task for all parameters that require gradients."""
        task = LanguageTask(self.model.train(), {"text": texts.validation.batches()})
        return task, partial(task.loss_on, texts.held_out.batches())

    def write(self, outcome: Outcome, digest: str) -> dict[str, Any]:
        """Write the model and return the figures of the run.

        Tensors have the names and the dtype of the base's family.

        Args:
            outcome: result of the training.
            digest: digest of the training text.
        """
        if self.request.mode == "lora":
            self.model = self.adapter.merge_and_unload()
        tied = self.model.all_tied_weights_keys
        named = restore_names(read_tensors(self.base), self.model.own_tensors(), tied)
        with atomic_folder(self.out) as temporary:
            if named is None:
                self.model.save_pretrained(temporary)
                self.tokenizer.save_pretrained(temporary)
            else:
                save_file(named, temporary / "model.safetensors", {"format": "pt"})
                for path in (path for pattern in COPIED for path in self.base.glob(pattern)):
                    if not path.name.endswith(".index.json"):
                        shutil.copyfile(path, temporary / path.name)
            copy_terms(self.base, temporary)
        position = outcome.result.position
        figures = {
            "held_out_loss_before": outcome.reported.before,
            "held_out_loss": outcome.reported.after,
            "verdict": outcome.reported.verdict,
            "story": outcome.story,
            "steps": position.step,
            "best_step": position.best_step,
            "tokens": position.tokens,
            "skipped": position.skipped,
            "trained_parameters": self.trained,
            "peak_memory": peak_memory(self.device),
            "device": str(self.device),
            "seconds": self.clock.seconds,
        }
        self.drop_trunk()
        self.progress.say(f"the adapted model is {outcome}, {self.out}")
        record = {
            "stage": "adapt",
            "model": str(self.out),
            "figures": figures,
            "data": {"text": {"digest": digest}},
        }
        return record | {"base": self.request.base}


TaskAndTest = tuple[Task[Batch], Callable[[], float]]
"""The training task, and a function that returns its exact loss on the reported held-out rows."""

TASKS: dict[str, Callable[[AdaptRun, Texts], TaskAndTest]] = {
    "last-n": AdaptRun.last_layers,
    "lora": AdaptRun.adapters,
    "full": AdaptRun.whole,
}


class LastLayersTask(ExpertTask):
    """Training of the last blocks and the final norm in fp32, on cached inputs; the rest is
    frozen.
    """

    def __init__(
        self,
        model: DeepSeekModel,
        first: int,
        head: CandidateHead,
        stream: Stream,
        held_out: Sequence[Batch],
        held_out_stream: Stream,
    ) -> None:
        self.model = model
        self.layer = first
        self.head = head
        self.stream = stream
        self.replay = None
        self.held_out = held_out
        self.held_out_stream = held_out_stream
        prefixes = trained_prefixes(model, first)
        for name, module in model.named_modules():
            if f"{name}." in prefixes:
                module.float().requires_grad_(True)
        self.parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name.startswith(prefixes)
        }

    def hidden(self, batch: Batch, stream_BTD: Tensor) -> Tensor:
        """Return the final normed hidden states `[B, T, D]`."""
        model = self.model
        stream_BTD = to_device(stream_BTD, model.device, torch.float32)
        with autocast(model):
            position_ids_BT = to_device(batch.position_ids, model.device)
            return resume(model, stream_BTD, self.layer, position_ids=position_ids_BT).finish()


@torch.no_grad()
def stream_into(model: DeepSeekModel, layer: int, batch: Batch) -> Tensor:
    """Return the hidden states `[B, T, D]` that enter block `layer`."""
    with autocast(model):
        return begin_rows(model, batch).run_to(layer)


SHARE = 1e-3
"""Largest share of the model's parameters that adapters have by default."""

TARGETS = ("v_proj", "o_proj", "down_proj")
"""Projections that get an adapter. With so few parameters, adapting every feed-forward network
gains more than a higher rank in the attention alone.
"""


def add_lora(model: DeepSeekModel, rank: int | None = None) -> Any:
    """Freeze `model`, add adapters and return the PEFT model; `merge_and_unload` merges them.

    Args:
        model: model to adapt, changed in place.
        rank: rank of the adapters; default: the largest within `SHARE` of the parameters.

    Raises:
        ConfigError: no rank is given, and even rank 1 exceeds the share.
    """
    from peft import LoraConfig, get_peft_model

    rank = rank or largest_rank(model)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def largest_rank(model: nn.Module, share: float = SHARE) -> int:
    """Return the largest rank whose adapters have at most `share` of the parameters.

    Raises:
        ConfigError: even rank 1 exceeds the share.
    """
    targets = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS
    ]
    each = sum(module.in_features + module.out_features for module in targets)
    budget = share * sum(parameter.numel() for parameter in model.parameters())
    if not each or budget < each:
        raise ConfigError(
            f"LoRA of rank 1 has {each:,} parameters, more than {budget:,.0f}; "
            "give a rank, or use mode last-n or expert."
        )
    return int(budget // each)
