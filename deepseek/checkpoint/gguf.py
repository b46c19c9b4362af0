"""A GGUF file turned into a Hugging Face model folder."""

import io
import json
from contextlib import redirect_stderr
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def convert_gguf(source: Path, folder: Path) -> None:
    """Write the model of the GGUF file `source` into `folder` as bf16 safetensors, config and tokenizer.

    Weights are dequantised by `transformers` and rounded to bf16, the precision that such models were trained in: the
    rounding (2^-9 of a value) is far below the step of a 4-bit code. The same source gives the same bytes.
    """
    logging.disable_progress_bar()
    with redirect_stderr(io.StringIO()):  # one progress bar there does not heed the switch above
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(model, folder)
    _write_tokenizer(source, folder, max_length=model.config.max_position_embeddings)


def _write_config(model: torch.nn.Module, folder: Path) -> None:
    """Write config.json and generation_config.json without the traces of quantisation."""
    config = model.config.to_diff_dict()
    for trace in ("quantization_config", "_name_or_path"):
        config.pop(trace, None)
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    # GGUF stores the value in fp32; its shortest decimal form is what the model's authors wrote.
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)


def _write_tokenizer(source: Path, folder: Path, max_length: int) -> None:
    """Write the tokenizer files, chat template included."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)
    # GGUF names the split rule ("smollm": every digit alone) but the converter knows only the plain byte-level one.
    rules = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rules.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    rules.save(str(folder / "tokenizer.json"))
