"""A DeepSpeed ZeRO-3 configuration of the same run, for those who train with that engine on GPUs."""

from typing import Any


def deepspeed_config(
    *, gpus: int, rows_per_gpu: int, learning_rate: float, final_learning_rate: float, warmup_steps: int, steps: int,
    weight_decay: float, accumulate: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Return what belongs in `ds_config.json`: stage 3, bf16, AdamW with warm-up and cosine, as our loop trains."""
    return {
        "train_micro_batch_size_per_gpu": rows_per_gpu,
        "gradient_accumulation_steps": accumulate,
        "train_batch_size": rows_per_gpu * accumulate * gpus,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": learning_rate, "betas": [0.9, 0.95], "weight_decay": weight_decay},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "warmup_num_steps": warmup_steps,
                "total_num_steps": steps,
                "cos_min_ratio": final_learning_rate / learning_rate,
            },
        },
    }
