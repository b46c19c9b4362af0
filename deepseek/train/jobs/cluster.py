"""Ray, which runs what is spread over processes and machines."""

from importlib import import_module
from typing import Any

from deepseek.errors import ConfigError


def connect(what: str, *parts: str) -> Any:
    """Return Ray, connected to the cluster of `RAY_ADDRESS`, or else to one that is started on this
    machine.

    Args:
        what: needs it. parts: modules of it that are needed too.

    Raises `ConfigError` if it is missing.
    """
    try:
        ray, *_ = map(import_module, ("ray", *parts))
    except ImportError:
        raise ConfigError(
            f"{what} needs Ray; install it with pip install 'deepseek-dmoe[cluster]'."
        ) from None
    if (
        not ray.is_initialized()
    ):  # its workers inherit this environment, and as many threads as processors
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return ray
