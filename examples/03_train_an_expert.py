"""Train an expert on a folder of text, plug it in, and see where it fires.

python examples/03_train_an_expert.py [FOLDER]
"""

import sys
import sysconfig
import tempfile
from pathlib import Path

import deepseek
from deepseek.errors import UserError

folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(sysconfig.get_path("stdlib")) / "asyncio")


def main(work: Path) -> None:
    # A few thousand tokens, as a quick test; without `tokens`, it trains for five minutes.
    pack = deepseek.train_expert(
        "smollm2-135m",
        name="asyncio",
        from_folder=folder,
        tokens=8192,
        epochs=2,
        held_out_tokens=2048,
        out=work / "asyncio.safetensors",
        run_folder=work / "run",
    )
    print(f"one file, {pack.stat().st_size / 1e6:.1f} MB")

    model, tokenizer = deepseek.load("smollm2-135m")
    info = model.experts.plug(pack)
    loss = model.experts.manifest(info.name).metrics["held-out"]
    print(f"held-out loss {loss.before:.3f} -> {loss.after:.3f}")

    for text in (
        "async def wait_closed(self):\n    await self._protocol",
        "It was the best of times,",
    ):
        prompt = tokenizer(text, return_tensors="pt")
        with model.experts.record() as trace:
            written = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        fired = float((trace.weights("asyncio") > 0).float().mean()) if trace.names else 0.0
        print(f"{tokenizer.decode(written[0])!r}\n  the expert fired at {fired:.0%} of the tokens")

    model.experts.unplug("asyncio")  # bit for bit the base again


with tempfile.TemporaryDirectory() as work:
    try:
        main(Path(work))
    except UserError as error:  # such as a folder without text
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
