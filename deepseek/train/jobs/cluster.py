"""Connection to Ray, which runs tasks in several processes or on several machines."""

from importlib import import_module
from typing import Any

from deepseek.errors import ConfigError


def connect(what: str, *parts: str) -> Any:
    """Return Ray, connected to the cluster of `RAY_ADDRESS` or else started on this machine.

    Args:
        what: the feature that needs Ray, for the error message.
        parts: modules of Ray that it needs.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        ray, *_ = map(import_module, ("ray", *parts))
    except ImportError:
        raise ConfigError(
            f"{what} needs Ray; install it with pip install 'deepseek-dmoe[cluster]'."
        ) from None
    if not ray.is_initialized():
        # Workers inherit this environment, and start as many threads as they have processors.
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return ray
