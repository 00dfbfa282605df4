"""Draw the architecture as SVG, light and dark: ``python docs/pictures/architecture.py``."""

import base64
import io
import math
from pathlib import Path

from PIL import Image

from vitrail.data.shapes import draw_shapes

SIZE = 960, 500
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
LIGHT = {
    "ink": "#1f2328", "gray": "#59636e", "line": "#8c959f", "paper": "#ffffff",
    "box": "#f6f8fa", "attention": "#ddf4ff", "mlp": "#fff1e5", "bar": "#0969da",
}  # fmt: skip
DARK = {
    "ink": "#f0f6fc", "gray": "#9198a1", "line": "#656c76", "paper": "#0d1117",
    "box": "#151b23", "attention": "#10304f", "mlp": "#4a2c12", "bar": "#4493f8",
}  # fmt: skip


class Drawing:
    """SVG elements in the colors of a palette."""

    def __init__(self, palette: dict[str, str]) -> None:
        self.palette, self.parts = palette, []

    def text(self, x: float, y: float, words: str, size: int = 18, color: str = "ink") -> None:
        """Write centered words."""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="middle" '
            f'fill="{self.palette[color]}">{words}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, color: str = "box") -> None:
        """Draw a rounded rectangle."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" '
            f'fill="{self.palette[color]}" stroke="{self.palette["line"]}"/>'
        )

    def path(self, d: str, *, arrow: bool = True, dashed: bool = False) -> None:
        """Draw a line, with an arrow head at its end."""
        ends = ' marker-end="url(#head)"' if arrow else ""
        dashes = ' stroke-dasharray="5 5"' if dashed else ""
        color = self.palette["line"]
        self.parts.append(
            f'<path d="{d}" fill="none" stroke="{color}" stroke-width="2"{dashes}{ends}/>'
        )

    def plus(self, x: float, y: float) -> None:
        """Draw the sign of a sum."""
        fill, line = self.palette["paper"], self.palette["ink"]
        self.parts.append(f'<circle cx="{x}" cy="{y}" r="13" fill="{fill}" stroke="{line}"/>')
        self.parts.append(
            f'<path d="M{x - 6} {y}h12M{x} {y - 6}v12" stroke="{line}" stroke-width="2"/>'
        )

    def svg(self) -> str:
        """Return the file."""
        width, height = SIZE
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{self.palette["line"]}"'
            "/></marker>"
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="{FONT}">\n<defs>{head}</defs>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


def draw(palette: dict[str, str]) -> str:
    """Return the drawing: the whole network above, one block below."""
    d = Drawing(palette)
    y = 66
    captions = [
        (80, "image", "32 x 32 pixels"),
        (248, "patches", "64 of 4 x 4 pixels"),
        (419, "tokens", "64 vectors with positions"),
        (593, "blocks", "4 in preset quick"),
        (759, "pooling", "or a class token"),
        (888, "classes", "probabilities"),
    ]
    for x, title, detail in captions:
        d.text(x, 28, title)
        d.text(x, 50, detail, 14, "gray")
    _draw_picture(d, 20, y, cut=False)
    d.path(f"M148 {y + 60}H178")
    _draw_picture(d, 188, y, cut=True)
    d.path(f"M316 {y + 60}H352")
    d.text(332, y + 48, "stem", 14, "gray")
    _draw_tokens(d, 364, y)
    d.path(f"M478 {y + 60}H508")
    for shift in (16, 8, 0):
        d.box(520 + shift, y + 16 - shift, 130, 104)
    d.text(585, y + 74, "block")
    d.path(f"M668 {y + 60}H704")
    d.box(714, y + 32, 90, 56)
    d.text(759, y + 66, "mean")
    d.path(f"M806 {y + 60}H828")
    _draw_classes(d, 832, y + 2)
    _draw_block(d)
    return d.svg()


def _draw_picture(d: Drawing, x: int, y: int, *, cut: bool) -> None:
    """Draw a star of the built-in data set, cut into patches or not."""
    raw_HWC = draw_shapes(10, seed=7).raw_BCHW[4].permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(raw_HWC).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    d.parts.append(
        f'<image x="{x}" y="{y}" width="120" height="120" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{data}"/>'
    )
    if cut:
        lines = "".join(f"M{x + 15 * k} {y}v120M{x} {y + 15 * k}h120" for k in range(1, 8))
        d.parts.append(f'<path d="{lines}" stroke="{d.palette["paper"]}" stroke-width="2.5"/>')


def _draw_tokens(d: Drawing, x: int, y: int) -> None:
    """Draw tokens as columns of numbers."""
    for token in range(7):
        if token == 5:
            d.text(x + 5 * 16 + 5, y + 66, "…", 20, "gray")
            continue
        for number in range(8):
            opacity = 0.2 + 0.8 * math.sin(token * 2.3 + number * 1.7) ** 2
            d.parts.append(
                f'<rect x="{x + token * 16}" y="{y + number * 15}" width="11" height="13" '
                f'rx="2" fill="{d.palette["bar"]}" opacity="{opacity:.2f}"/>'
            )


def _draw_classes(d: Drawing, x: int, y: int) -> None:
    """Draw probabilities as bars."""
    for row, (name, length) in enumerate([("circle", 4), ("star", 54), ("cross", 8), ("…", 3)]):
        d.parts.append(
            f'<text x="{x + 48}" y="{y + 19 + row * 30}" font-size="15" text-anchor="end" '
            f'fill="{d.palette["ink"]}">{name}</text>'
            f'<rect x="{x + 56}" y="{y + 6 + row * 30}" width="{length}" height="16" rx="2" '
            f'fill="{d.palette["bar"]}"/>'
        )


def _draw_block(d: Drawing) -> None:
    """Draw the inside of a block: two residual branches."""
    d.path("M520 192L28 240", arrow=False, dashed=True)
    d.path("M650 192L932 240", arrow=False, dashed=True)
    d.parts.append(
        f'<rect x="20" y="240" width="920" height="250" rx="10" fill="none" '
        f'stroke="{d.palette["line"]}"/>'
    )
    y = 390
    d.text(64, y - 14, "tokens", 16)
    d.path(f"M34 {y}H392")
    d.plus(406, y)
    d.path(f"M420 {y}H832")
    d.plus(846, y)
    d.path(f"M860 {y}H928")
    d.path(f"M110 {y}V310H124")
    d.box(130, 288, 64, 44)
    d.text(162, 315, "norm", 16)
    d.path("M194 310H214")
    d.box(220, 266, 160, 88, "attention")
    d.text(300, 294, "attention")
    d.text(300, 318, "tokens exchange", 14, "gray")
    d.text(300, 337, "information", 14, "gray")
    d.path(f"M380 310H406V{y - 16}")
    d.path(f"M500 {y}V310H514")
    d.box(520, 288, 64, 44)
    d.text(552, 315, "norm", 16)
    d.path("M584 310H604")
    d.box(610, 266, 200, 88, "mlp")
    d.text(710, 294, "MLP")
    d.text(710, 318, "each token on its own:", 14, "gray")
    d.text(710, 337, "linear, GELU, linear", 14, "gray")
    d.path(f"M810 310H846V{y - 16}")
    d.text(250, y + 46, "the token passes unchanged, and the branch", 15, "gray")
    d.text(250, y + 66, "adds to it: a residual connection", 15, "gray")
    d.text(690, y + 46, "attention = softmax(Q Kᵀ / √d) V in each head of width d:", 15, "gray")
    d.text(690, y + 66, "its rows are what attention maps show", 15, "gray")


if __name__ == "__main__":
    for name, palette in {"architecture": LIGHT, "architecture-dark": DARK}.items():
        (Path(__file__).parent / f"{name}.svg").write_text(draw(palette))
