"""What `/v1/models` and `/v1/encoders` tell of the model and of each encoder that can be mixed."""

from typing import Any

from craftor.encoders import Encoder
from craftor.serving.objects import ObjectEncoder
from craftor.serving.service import Service
from craftor.serving.work import ImageRequest


def size_name(request: ImageRequest) -> str:
    """`WIDTHxHEIGHT`, as requests name it."""
    assert request.size is not None
    height, width = request.size
    return f"{width}x{height}"


def model_entry(service: Service) -> dict[str, Any]:
    settings = service.settings
    return {
        "id": settings.name,
        "object": "model",
        "created": 0,
        "owned_by": "craftor",
        "base": settings.model.path,
        "controlnet": settings.controlnet,
        "object_encoder": None if (eye := service.object_encoder) is None else object_encoder_entry(eye),
        "sizes": list(service.interpreter.sizes),
        "defaults": settings.defaults.model_dump(),
        "limits": settings.limits.model_dump(),
    }


def object_encoder_entry(encoder: ObjectEncoder) -> dict[str, Any]:
    return {
        "id": encoder.name,
        "object": "object_encoder",
        "version": encoder.version,
        "uri": encoder.uri,
        "sha256": encoder.sha256,
        "run_id": encoder.run_id,
        **{key: encoder.description.get("object", {}).get(key) for key in ("domain", "tokens", "unet")},
    }


def encoder_entry(service: Service, name: str, encoder: Encoder) -> dict[str, Any]:
    library = service.library
    version = library.versions.get(name)
    return {
        "id": name,
        "object": "encoder",
        "source": library.sources[name],
        "name": encoder.name,
        "version": encoder.version,
        "aliases": list(version.aliases) if version else [],
        "uri": encoder.uri,
        "sha256": encoder.sha256,
        "run_id": encoder.run_id,
        "window": {"from": encoder.window[0], "to": encoder.window[1]},
        "rewards": encoder.description.get("rewards", {}),
        "scores": version.scores if version else {},
        "problem": library.problems.get(name),
    }
