"""Draw the pictures of `docs/concepts/` as SVG: python docs/images/draw.py

They have a white background, so that they look the same on light and dark pages.
`tests/docs/test_pages.py` checks that they are up to date.
"""

import ast
import math
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
FLOORS_TABLE = Path(__file__).parents[2] / "tests" / "test_floors.py"

INK = "#1f2933"
SOFT = "#616e7c"
BASE = "#dbe7f5"
FIRST = "#d5efe3"
SECOND = "#fde8cf"
NEUTRAL = "#f3f4f6"
EDGES = {BASE: "#3a6ea5", FIRST: "#2a8c62", SECOND: "#c4761b", NEUTRAL: "#7b8794"}

STYLE = (
    f"text{{font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-size:14px;fill:{INK}}}"
    f".title{{font-weight:600}}.soft{{fill:{SOFT};font-size:12.5px}}"
    ".code{font-family:ui-monospace,monospace;font-size:12.5px}"
)


class Picture:
    """An SVG under construction; coordinates are pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        shape = f' class="{kind}"' if kind else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}"{shape} text-anchor="{anchor}">{escape(words)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        title: str,
        lines: tuple[str, ...] = (),
        fill: str = NEUTRAL,
    ) -> None:
        """Draw a box with a title and lines below it, centred."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
            f'fill="{fill}" stroke="{EDGES[fill]}"/>'
        )
        top = y + height / 2 - 9 * len(lines) + 5
        self.text(x + width / 2, top, title, "title", "middle")
        for number, line in enumerate(lines, 1):
            self.text(x + width / 2, top + 18 * number, line, "soft", "middle")

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """Draw a line through points that ends in an arrowhead."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{SOFT}" stroke-width="1.5"{dash} marker-end="url(#head)"/>'
        )

    def save(self, name: str) -> None:
        (FOLDER / f"{name}.svg").write_text(self.source())

    def source(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">'
        )
        marker = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{SOFT}"/></marker></defs>'
        )
        ground = f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>'
        title, style = f"<title>{escape(self.title)}</title>", f"<style>{STYLE}</style>"
        return "\n".join([head, title, style, marker, ground, *self.parts, "</svg>", ""])


def floors() -> dict[str, int]:
    """Return the table of floors that `tests/test_floors.py` enforces: package -> floor."""
    for node in ast.parse(FLOORS_TABLE.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FLOORS":
            table: dict[str, int] = ast.literal_eval(node.value)
            return table
    raise LookupError("FLOORS")


ABOUT = {
    "checkpoint": "files, hub, families",
    "cli": "commands",
    "compiled": "8-bit step",
    "data": "sources, cleaning, rows",
    "engine": "batching, prefix cache",
    "evaluate": "held-out loss, tasks",
    "export": "ONNX, OpenVINO, HF",
    "kernels": "numerics",
    "model": "transformer, experts",
    "packs": "format, signature",
    "planning": "memory and time",
    "retrieval": "passages",
    "runner": "what computes",
    "server": "HTTP, web page",
    "text": "tokenizer, templates",
    "train": "loop, jobs, gates, RL",
}


def architecture() -> Picture:
    table = floors()
    highest = max(table.values())
    picture = Picture(
        760, 66 * (highest + 1) + 56, "Packages by floor: each imports only floors below it"
    )
    for floor in range(highest + 1):
        y = 16 + 66 * (highest - floor)
        rooms = [name for name, level in table.items() if level == floor]
        width = (620 - 12 * (len(rooms) - 1)) / len(rooms)
        picture.text(24, y + 30, f"floor {floor}", "soft")
        for number, name in enumerate(rooms):
            fill = {"model": BASE, "packs": FIRST, "train": SECOND, "engine": BASE}.get(
                name, NEUTRAL
            )
            about = (ABOUT[name],) if ABOUT.get(name) else ()
            picture.box(84 + number * (width + 12), y, width, 50, name, about, fill)
    picture.arrow((732, 20), (732, 66 * (highest + 1)))
    picture.text(732, 66 * (highest + 1) + 22, "imports", "soft", "end")
    picture.text(
        84,
        66 * (highest + 1) + 30,
        "A package imports only packages of lower floors; a test parses every import.",
        "soft",
    )
    return picture


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def token() -> Picture:
    means, contrasts = (0.30, 0.10), (2.0, 0.0)
    strengths = [sigmoid(16 * mean) for mean in means]
    shares = [a * math.exp(c) for a, c in zip(strengths, contrasts, strict=True)]
    weights = [min(1.0, sum(strengths)) * share / sum(shares) for share in shares]
    picture = Picture(1010, 470, "One token at one layer with two armed experts that both fire")
    picture.box(20, 190, 140, 60, "residual stream", ("hidden state x",))
    picture.box(190, 190, 70, 60, "norm")
    picture.box(300, 190, 160, 60, "base feed-forward", ("always computed",), BASE)
    picture.arrow((160, 220), (188, 220))
    picture.arrow((260, 220), (298, 220))
    for y, name, fill, mean, strength, weight in (
        (40, "expert “shop”", FIRST, means[0], strengths[0], weights[0]),
        (330, "expert “docs”", SECOND, means[1], strengths[1], weights[1]),
    ):
        picture.box(
            300, y, 160, 76, "gate", ("score, averaged over", f"the text so far: {mean:.2f}"), fill
        )
        picture.box(
            500,
            y,
            160,
            76,
            "fires: mean > 0",
            (f"a = sigmoid(16 · {mean:.2f})", f"= {strength:.2f}"),
            fill,
        )
        picture.box(720, y, 160, 76, name, (f"weight {weight:.2f}", "times its feed-forward"), fill)
        picture.arrow((225, 190 if y < 190 else 250), (225, y + 38), (298, y + 38))
        picture.arrow((460, y + 38), (498, y + 38))
    shared = (
        "the contrast scores",
        f"c = {contrasts[0]:g} and {contrasts[1]:g}",
        "share the weight:",
        "a·exp(c), normalised",
    )
    picture.box(500, 165, 160, 116, "arbitration", shared)
    picture.arrow((580, 116), (580, 163))
    picture.arrow((580, 330), (580, 283))
    picture.arrow((660, 200), (690, 200), (690, 78), (718, 78))
    picture.arrow((660, 246), (690, 246), (690, 368), (718, 368))
    picture.box(775, 195, 50, 50, "+")
    picture.arrow((460, 220), (480, 220), (480, 140), (740, 140), (740, 220), (773, 220))
    picture.arrow((800, 116), (800, 193))
    picture.arrow((800, 330), (800, 247))
    picture.arrow((825, 220), (878, 220))
    picture.text(886, 216, "back to the", "soft")
    picture.text(886, 233, "residual stream", "soft")
    picture.text(
        20,
        440,
        "A gate whose mean is 0 or less gives weight 0, and its network is not computed.",
        "soft",
    )
    alone = "If no gate fires, or relevance admits no expert, the token takes the code path of the base alone."
    picture.text(20, 458, alone, "soft")
    return picture


def pack() -> Picture:
    picture = Picture(900, 330, "The life of an expert pack")
    top, low = 40, 200
    picture.box(20, top, 130, 80, "your text", ("git, folder, JSONL;", "cleaned and split"))
    picture.box(190, top, 150, 80, "train", ("base frozen; best", "held-out state kept"), SECOND)
    picture.box(
        380, top, 150, 80, "calibrate gates", ("closed form, against", "public text"), SECOND
    )
    picture.box(570, top, 140, 80, "pack", ("one .safetensors,", "manifest, digest"), FIRST)
    picture.box(750, top, 130, 80, "sign", ("optional,", "Ed25519"))
    picture.box(750, low, 130, 80, "check", ("base, tokenizer,", "digest, licence, key"), FIRST)
    picture.box(570, low, 140, 80, "plug", ("between two steps", "of a live model"), BASE)
    picture.box(380, low, 150, 80, "arm", ("auto, by name,", "or by the request"), BASE)
    picture.box(190, low, 150, 80, "fires", ("at tokens where its", "gate is positive"), BASE)
    picture.box(20, low, 130, 80, "unplug", ("the base again,", "bit for bit"))
    for left, right in ((150, 188), (340, 378), (530, 568), (710, 748)):
        picture.arrow((left, top + 40), (right, top + 40))
    picture.arrow((815, top + 80), (815, low - 2))
    for right, left in ((750, 712), (570, 532), (380, 342), (190, 152)):
        picture.arrow((right, low + 40), (left, low + 40))
    picture.arrow((815, low + 80), (815, 302), (730, 302), dashed=True)
    picture.text(724, 306, "refused with one sentence; the model is unchanged", "soft", "end")
    return picture


def stages() -> Picture:
    picture = Picture(900, 350, "The three training stages, and experts beside them")
    pretrain = (
        "text of several domains",
        "every weight, from scratch",
        "cross-entropy; curriculum optional",
    )
    adapt = (
        "text of one domain",
        "last layers, LoRA or everything",
        "cross-entropy, best state kept",
    )
    align = ("pairs: chosen, rejected", "last layers", "PPO, or DPO and RLOO")
    for number, (name, lines) in enumerate(
        {"pretrain": pretrain, "adapt": adapt, "align": align}.items()
    ):
        x = 20 + 300 * number
        picture.box(x, 30, 260, 120, f"{number + 1}  {name}", lines, BASE)
        picture.text(x + 130, 172, f"deepseek {name}", "code", "middle")
        picture.arrow((x + 130, 182), (x + 130, 218), dashed=True)
    picture.arrow((280, 90), (318, 90))
    picture.arrow((580, 90), (618, 90))
    beside = "trained beside any of these models, which stay frozen: deepseek expert train"
    picture.box(20, 220, 860, 60, "expert modules", (beside,), FIRST)
    picture.text(
        20,
        312,
        "Any stage can be the first: most people start from an open model and train experts.",
        "soft",
    )
    chain = (
        "A recipe (deepseek train) chains stages; "
        "the loop, its checkpoints and exact resumption are the same in all."
    )
    picture.text(20, 330, chain, "soft")
    return picture


PICTURES = {"architecture": architecture, "token": token, "pack": pack, "stages": stages}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        draw().save(name)
