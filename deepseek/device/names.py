"""Valid names of devices and dtypes. Imports nothing heavy, so that `--help` is fast."""

from typing import Literal

DEVICE = r"^(auto|cpu|mps|cuda(:[0-9]{1,2})?)$"
"""Pattern of a device's name."""

DEVICES = ["auto", "cpu", "cuda", "cuda:1", "mps"]
"""Examples of names, for messages."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Name of a dtype."""

ABOUT_DEVICE = "Device: auto takes a CUDA GPU if there is one; or cpu, cuda, cuda:N, mps"

ABOUT_DTYPE = "Precision of matrix products; auto: the fastest on the device with float32's range"
