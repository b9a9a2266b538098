"""An image -> a PNG that says exactly where it came from: encoders by version and hash, weights, seed, steps."""

import io
import json
from typing import Any

from jaxtyping import Float
from PIL import Image, PngImagePlugin
from torch import Tensor

from craftor import __version__
from craftor.serving.work import Row

KEY = "craftor"
"""Of the PNG's text chunk, which holds the record as JSON."""
FILES = {"sha256": "image", "mask_sha256": "mask", "region_sha256": "region"}
"""The record's keys for the files of an object's picture."""


def record(row: Row, model: str, engine: dict[str, Any]) -> dict[str, Any]:
    """What decides a row's image. No time and no id: equal requests are equal bytes."""
    request = row.request
    mixture = []
    for share in request.shares:
        acts, encoder = share.steps(row.schedule), share.encoder
        mixture.append(
            {
                "encoder": encoder.name,
                "version": encoder.version,
                "uri": encoder.uri,
                "sha256": encoder.sha256,
                "run_id": encoder.run_id,
                "weight": share.weight,
                "from": share.window[0],
                "to": share.window[1],
                "steps": [acts.start, acts.stop] if acts else [],
            }
        )
    upload = request.upload
    begun: dict[str, Any] = {}
    if upload is not None:
        files = {"sha256": upload.sha256, "mask_sha256": upload.mask_sha256}
        begun = {"image": files | {"strength": upload.strength, "steps": [request.first_step, request.num_steps]}}
    if (control := request.control) is not None:
        begun |= {"control": {"sha256": control.sha256, "scale": control.scale}}
    if (shown := request.shown) is not None:
        eye = shown.encoder
        begun |= {
            "object": {
                **{"encoder": eye.name, "version": eye.version, "uri": eye.uri, "sha256": eye.sha256},
                "run_id": eye.run_id,
                "images": [{key: one.hashes.get(name) for key, name in FILES.items()} for one in shown.references],
                "weight": shown.weight,
                "steps": [shown.from_step, request.num_steps],
            }
        }
    return begun | {
        "craftor": __version__,
        "model": model,
        "engine": engine,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "mixture": mixture,
        "seed": request.seed,
        "steps": request.num_steps,
        "guidance_scale": request.guidance_scale,
        "scheduler": request.solver,
    }


def png(image: Float[Tensor, "3 H W"], described: dict[str, Any] | None = None) -> bytes:
    """An image in [0, 1] as a PNG."""
    text = PngImagePlugin.PngInfo()
    if described is not None:
        text.add_itxt(KEY, json.dumps(described, ensure_ascii=False))
    out = io.BytesIO()
    pixels = (image * 255).round().byte().movedim(0, -1).contiguous()
    Image.fromarray(pixels.numpy()).save(out, "png", pnginfo=text)
    return out.getvalue()
