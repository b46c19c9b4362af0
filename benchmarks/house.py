"""Table and picture of the package structure: packages, floors, lines and imports, measured from
the source.

    make house    # or: python benchmarks/house.py; writes the table into its page, and the picture beside it

A package here is a folder or file directly below `deepseek/`. Its floor is one above that of the
highest package it imports, so the table always matches the code. `tests/test_floors.py` lists the
allowed floors.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "deepseek"
BEGIN, END = "<!-- house: begin -->", "<!-- house: end -->"


@dataclass
class Package:
    """One package.

    Attributes:
        files, lines: number of files and lines.
        imports: other packages that it imports, at module level or within functions.
        floor: 0 for a package that imports no other.
        purpose: first sentence of its docstring.
    """

    files: int = 0
    lines: int = 0
    imports: set[str] = field(default_factory=set)
    floor: int = 0
    purpose: str = ""


def main() -> None:
    page = house_page()
    found = packages()
    page.write_text(with_table(page.read_text(encoding="utf-8"), table(found)), encoding="utf-8")
    draw(found, page.with_name("house.svg"))


def packages() -> dict[str, Package]:
    """Return every package with its floor."""
    found: dict[str, Package] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name.startswith("__"):
            continue
        source = path.read_text(encoding="utf-8")
        package = found.setdefault(name, Package())
        package.files += 1
        package.lines += source.count("\n")
        package.imports |= set(imported_packages(source)) - {name}
        if path in (PACKAGE / name / "__init__.py", PACKAGE / f"{name}.py"):
            package.purpose = purpose(source)
    for package in found.values():
        package.imports &= set(found)
    for name in TopologicalSorter(
        {name: package.imports for name, package in found.items()}
    ).static_order():
        found[name].floor = 1 + max(
            (found[other].floor for other in found[name].imports), default=-1
        )
    return found


def imported_packages(source: str) -> Iterator[str]:
    """Yield the packages that a file imports."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "deepseek" and len(parts) > 1:
                yield parts[1]


def purpose(source: str) -> str:
    """Return the first sentence of a file's docstring."""
    text = ast.get_docstring(ast.parse(source)) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def table(found: dict[str, Package]) -> str:
    """Return the packages as a Markdown table, the highest floor first."""
    lines = [
        "| floor | package | what it holds | files | lines | imports |",
        "|---|---|---|---|---|---|",
    ]
    for name, package in ordered(found):
        others = ", ".join(sorted(package.imports)) or "-"
        lines.append(
            f"| {package.floor} | `{name}` | {package.purpose} | {package.files} | {package.lines:,} | {others} |"
        )
    arrows = sum(len(package.imports) for package in found.values())
    size = sum(package.lines for package in found.values())
    summary = (
        f"{len(found)} packages, {size:,} lines, {arrows} dependencies between them, no cycle."
    )
    return "\n".join([*lines, "", summary])


def beyond(found: dict[str, Package], names: set[str]) -> set[str]:
    """Return the packages that `names` import, directly or indirectly."""
    reached: set[str] = set()
    waiting = list(names)
    while waiting:
        new = found[waiting.pop()].imports - reached
        reached |= new
        waiting += new
    return reached


def ordered(found: dict[str, Package]) -> list[tuple[str, Package]]:
    """Return the packages from the highest floor down."""
    return sorted(found.items(), key=lambda item: (-item[1].floor, item[0]))


def with_table(text: str, rows: str) -> str:
    """Return a page with the table between its marks."""
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n{rows}\n{text[stop:]}"


def house_page() -> Path:
    """Return the page with the marks."""
    pages = [
        page
        for page in sorted((ROOT / "docs").rglob("*.md"))
        if BEGIN in page.read_text(encoding="utf-8")
    ]
    if len(pages) != 1:
        sys.exit(f"{len(pages)} pages below docs/ have the mark {BEGIN}; there must be one.")
    return pages[0]


def draw(found: dict[str, Package], path: Path) -> None:
    """Draw the floors: wider boxes for packages with more lines, and arrows to imported packages
    that no other imported package imports.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "house"  # reproducible bytes
    floors = sorted({package.floor for package in found.values()})
    figure, axes = plt.subplots(figsize=(7, 0.9 * len(floors) + 0.6))
    centres: dict[str, tuple[float, float]] = {}
    for floor in floors:
        names = [name for name, package in sorted(found.items()) if package.floor == floor]
        widths = {name: 6 + found[name].lines ** 0.5 / 3 for name in names}
        left = -(sum(widths.values()) + 3 * (len(names) - 1)) / 2
        for name in names:
            box = plt.Rectangle(
                (left, floor),
                widths[name],
                0.55,
                facecolor="#dbe8f5",
                edgecolor="#2b5c8a",
                zorder=3,
            )
            axes.add_patch(box)
            label = f"{name}\n{found[name].lines:,}"
            axes.text(
                left + widths[name] / 2,
                floor + 0.27,
                label,
                ha="center",
                va="center",
                fontsize=8,
                zorder=4,
            )
            centres[name] = (left + widths[name] / 2, floor)
            left += widths[name] + 3
    for name, package in found.items():
        for other in package.imports - beyond(found, package.imports):
            start, stop = centres[name], (centres[other][0], centres[other][1] + 0.55)
            axes.annotate(
                "",
                stop,
                start,
                arrowprops={"arrowstyle": "->", "color": "#9aa7b3", "lw": 0.6},
                zorder=1,
            )
    axes.set_xlim(-32, 32)
    axes.set_ylim(-0.2, floors[-1] + 0.8)
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
