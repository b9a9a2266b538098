"""What would keep `craftor serve` from starting, said in one line before Ray and its replicas start."""

import os
import socket
from contextlib import closing
from pathlib import Path

from craftor.preflight import check_hub_id, check_model
from craftor.recipe import RecipeError
from craftor.serving.settings import Http, Serving


def check(settings: Serving, source: Path) -> None:
    """Raises RecipeError naming file and key, UnknownEncoder, or TrackingUnreachable."""
    try:
        check_model(settings.model.path)
        if settings.controlnet is not None and not Path(settings.controlnet).is_dir():
            check_hub_id("controlnet", settings.controlnet, "config.json")
        _check_address(settings.http)
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from None
    _check_references(settings)


def _check_address(http: Http) -> None:
    for key, file in (("certificate", http.certificate), ("key", http.key)):
        if file is not None and not Path(file).is_file():
            raise ValueError(f"http.{key} = {file!r}: no such file")
    if "RAY_ADDRESS" in os.environ:  # a Serve that is running there may be the one that listens
        return
    try:
        with closing(socket.create_server((http.host, http.port), family=_family(http))):
            pass
    except OSError as error:
        raise ValueError(f"http.port = {http.port}: cannot listen at {http.host} ({error.strerror})") from None


def _family(http: Http) -> socket.AddressFamily:
    return socket.getaddrinfo(http.host, http.port)[0][0]


def _check_references(settings: Serving) -> None:
    canaries = {name: canary.source for name, canary in settings.canaries.items()}
    named = [*settings.encoders.values(), *canaries.values(), *filter(None, [settings.object_encoder])]
    wanted = [source for source in named if not Path(source).is_dir()]
    if not wanted and settings.registered is None:
        return
    from craftor.tracking import client
    from craftor.versions import resolve

    Path(settings.runs).mkdir(parents=True, exist_ok=True)
    connected = client(Path(settings.runs))
    for source in wanted:
        resolve(connected, source)
