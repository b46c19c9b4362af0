"""Forward passes over packed rows: `model/passes.py` for a `Batch`, which may lie on another device
than the model.
"""

from torch import Tensor

from deepseek.data.text.loader import Batch
from deepseek.model.passes import ForwardPass, begin, resume
from deepseek.model.transformer import DeepSeekModel


def begin_rows(model: DeepSeekModel, batch: Batch) -> ForwardPass:
    """Return a pass over packed rows that stands before layer 0.

    Args:
        model: the model to run; experts take part as they are armed or forced.
        batch: rows of T tokens, whose positions restart at each document.
    """
    position_ids_BT = batch.position_ids.to(model.device)
    return begin(model, batch.input_ids.to(model.device), position_ids=position_ids_BT)


def resume_rows(model: DeepSeekModel, batch: Batch, stream_BTD: Tensor, layer: int) -> ForwardPass:
    """Return a pass over packed rows that stands after the attention of a layer.

    Args:
        model: the model to run; experts take part as they are armed or forced.
        batch: the rows that the stream was computed from.
        stream_BTD: the residual stream `[B, T, D]` after the attention of `layer`, on the model's
            device.
        layer: where the pass goes on.
    """
    return resume(
        model,
        stream_BTD,
        layer,
        attended=True,
        input_ids=batch.input_ids.to(model.device),
        position_ids=batch.position_ids.to(model.device),
    )
