"""What past runs say about themselves, and a page for each."""

import html
from base64 import b64encode
from pathlib import Path
from typing import Any

from deepseek.checkpoint.store import atomic_write, home, read_json
from deepseek.errors import DataError
from deepseek.registry import nearest


def all_runs() -> dict[str, Path]:
    """Return the run folders in the library's home, by name."""
    root = home() / "runs"
    return {path.name: path for path in sorted(root.iterdir()) if path.is_dir()} if root.is_dir() else {}


def find_run(name: str) -> Path:
    """Return the folder of a run, by name or path; raise `DataError` if there is none."""
    if Path(name).is_dir():
        return Path(name)
    runs = all_runs()
    if name not in runs:
        raise DataError(f"There is no run {name!r}; {nearest(name, runs) if runs else 'none has been started'}.")
    return runs[name]


def summary(folder: Path) -> dict[str, Any]:
    """Return stage, state and figures of a run as one flat table."""
    if not (folder / "result.json").is_file():
        return {"state": "unfinished"}
    result = read_json(folder / "result.json")
    figures = {**result, **result.get("figures", {})}
    return {"state": "finished", **{k: v for k, v in figures.items() if isinstance(v, str | int | float)}}


def write_page(folder: Path, title: str, sections: dict[str, Any], plots: list[Path]) -> Path:
    """Write a page without scripts or links to elsewhere, `index.html` in `folder`: tables, then plots."""
    tables = "".join(f"<h2>{html.escape(name)}</h2>{_table(values)}" for name, values in sections.items())
    images = "".join(
        f'<img alt="{html.escape(plot.parent.name)}" src="data:image/png;base64,'
        f'{b64encode(plot.read_bytes()).decode()}">'
        for plot in plots
    )
    path = folder / "index.html"
    with atomic_write(path) as temporary:
        temporary.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>'
            "body{font:16px sans-serif;max-width:60rem;margin:2rem auto}"
            "td,th{text-align:left;padding:.2rem 1rem .2rem 0}"
            f"img{{max-width:100%}}</style><h1>{html.escape(title)}</h1>{tables}{images}</html>\n",
            encoding="utf-8",
        )
    return path


def _table(values: dict[str, Any]) -> str:
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(_spoken(v))}</td></tr>" for k, v in values.items())
    return f"<table>{rows}</table>"


def _spoken(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
