"""The tests marked `gpu` pass on the fake GPU, in their own process."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_no_tensor_is_on_the_wrong_device() -> None:
    lane = [str(TESTS / "gpu" / "test_device.py"), "-m", "gpu", "--device", "fakegpu"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *lane],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout
