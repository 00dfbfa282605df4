"""An explanation as a notebook shows it under the cell."""

import base64
import html

from vitrail.explain.explanation import Explanation
from vitrail.explain.gif import encode_gif, encode_png, same_size
from vitrail.explain.sheet import Look, draw_frames, draw_sheet

MOVING = ("rollout", "layers", "training")
"""Kinds that are animated; the others are grids, or a single map."""


def to_png(explanation: Explanation) -> bytes:
    """Return all frames side by side as a PNG file."""
    return encode_png(draw_sheet(explanation, Look()))


def to_html(explanation: Explanation) -> str:
    """Return an image tag that contains the image, animated if the frames are a sequence."""
    look = Look()
    if explanation.kind in MOVING and len(explanation.frames) > 1:
        frames = same_size(draw_frames(explanation, look))
        kind, content = "gif", encode_gif(frames, [look.duration] * len(frames), look.loop)
    else:
        kind, content = "png", to_png(explanation)
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(repr(explanation))}" src="data:image/{kind};base64,{data}">'
