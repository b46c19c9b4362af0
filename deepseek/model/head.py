"""The map from final hidden states to logits."""

from torch import Tensor, nn

from deepseek.model.attention.capped import soft_cap


class LanguageHead(nn.Linear):
    """Linear head whose logits may be capped (`ModelConfig.final_logit_softcapping`).

    Args:
        hidden_size: width D of the hidden states.
        vocab_size: number V of logits.
        cap: logits z are capped to cap * tanh(z / cap); None (default): no cap.
    """

    def __init__(self, hidden_size: int, vocab_size: int, cap: float | None = None) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.cap = cap

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the logits `[B, T, V]`."""
        logits_BTV = super().forward(hidden_BTD)
        return logits_BTV if self.cap is None else soft_cap(logits_BTV, self.cap)
