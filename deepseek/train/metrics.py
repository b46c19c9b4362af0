"""Metrics of a run: one JSON object a line, and the same figures for TensorBoard."""

import json
from pathlib import Path

from deepseek.checkpoint.store import atomic_write


class MetricsLog:
    """Appends records to `metrics.jsonl` in a run folder.

    A resumed run cuts what lies after its checkpoint, so that the file never tells a step twice.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """Keep the records of steps before `first_step` and open the file for more."""
        from torch.utils.tensorboard import SummaryWriter  # slow to load, and readers of a log need not

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(self.path) if record["step"] < first_step]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)  # hides later steps

    def write(self, step: int, **values: float) -> None:
        """Append one record."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the whole records of a metrics file; a line that a crash cut off is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
