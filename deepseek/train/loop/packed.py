"""Forward passes over packed rows.

They adapt `model/passes.py` to a `Batch`, which may be on another device than the model.
"""

from typing import overload

from torch import Tensor

from deepseek.data.text.loader import Batch
from deepseek.device.transfer import to_device
from deepseek.model.language_model import LanguageModel
from deepseek.model.passes import AnyPass, ForwardPass, begin, resume
from deepseek.model.transformer import DeepSeekModel


@overload
def begin_rows(model: DeepSeekModel, batch: Batch) -> ForwardPass: ...


@overload
def begin_rows(model: LanguageModel, batch: Batch) -> AnyPass: ...


def begin_rows(model: LanguageModel, batch: Batch) -> AnyPass:
    """Return a forward pass over packed rows that starts before layer 0.

    Args:
        model: model to run; experts take part if armed or forced.
        batch: rows of T tokens whose positions restart at each document.
    """
    position_ids_BT = to_device(batch.position_ids, model.device)
    return begin(model, to_device(batch.input_ids, model.device), position_ids=position_ids_BT)


def resume_rows(model: LanguageModel, batch: Batch, stream_BTD: Tensor, layer: int) -> AnyPass:
    """Return a forward pass over packed rows that starts after the attention of a layer.

    Args:
        model: model to run; experts take part if armed or forced.
        batch: rows that the residual stream was computed from.
        stream_BTD: residual stream `[B, T, D]` after the attention of `layer`, on the model's
            device.
        layer: layer at which to resume.
    """
    return resume(
        model,
        stream_BTD,
        layer,
        attended=True,
        input_ids=to_device(batch.input_ids, model.device),
        position_ids=to_device(batch.position_ids, model.device),
    )
