"""A name in the MLflow Model Registry -> the version of a tuned encoder that it means now.

An alias is resolved to a version once, and everything after speaks of that version and the hash of its weights.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from craftor import registry
from craftor.tracking import answering

_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[^/@:'\"]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))?")


class UnknownEncoder(ValueError):
    """No such name, alias or version in the registry; the message lists those there are."""


@dataclass(frozen=True)
class Version:
    """One version of a registered encoder. Aliases move; this does not."""

    name: str
    version: str
    run_id: str | None
    aliases: tuple[str, ...]
    """Those that named it when it was looked up."""
    tags: dict[str, str]
    created: int
    """Milliseconds since 1970."""
    store: str
    """The MLflow store's URI."""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def own_tags(self) -> dict[str, str]:
        """Those that people gave it."""
        return {key: value for key, value in self.tags.items() if not key.startswith("craftor.")}

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """By metric: base, tuned, delta, ci95, and whether it is `held_out`; empty before an evaluation."""
        return json.loads(self.tags.get(registry.HELD_OUT, "{}"))


def versions(connected: MlflowClient) -> list[Version]:
    """Every registered encoder, by name, newest version first. Raises TrackingUnreachable."""
    with answering(connected):
        models = connected.search_registered_models(max_results=1000)
        return [version for model in models for version in _versions_of(connected, model)]


def resolve(connected: MlflowClient, text: str) -> Version:
    """`name` (its newest version), `name@alias` or `name/3`, with or without `models:/` -> that version.

    Raises UnknownEncoder listing what there is, TrackingUnreachable when the server does not answer.
    """
    parsed = _REFERENCE.fullmatch(text)
    if parsed is None:
        raise UnknownEncoder(f"{text!r}: expected name, name@alias or name/version")
    name, alias, number = parsed["name"], parsed["alias"], parsed["version"]
    with answering(connected):
        try:
            there = _versions_of(connected, connected.get_registered_model(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            there = []
    if not there:
        names = ", ".join(dict.fromkeys(v.name for v in versions(connected)))
        raise UnknownEncoder(f"no encoder {name!r} in the registry; there are: {names or 'none'}")
    for found in there:
        if number in (None, found.version) and (alias is None or alias in found.aliases):
            return found
    known = [*(f"@{alias}" for v in there for alias in v.aliases), *(f"/{v.version}" for v in there)]
    raise UnknownEncoder(f"no encoder {text!r} in the registry; of {name} there are: {', '.join(known)}")


def _versions_of(connected: MlflowClient, model: RegisteredModel) -> list[Version]:
    """Newest first. MLflow's search leaves `aliases` of versions empty; the registered model has them."""
    found = [v for v in connected.search_model_versions(f"name = '{model.name}'") if registry.SHA256 in v.tags]
    return [
        Version(
            v.name,
            str(v.version),
            v.run_id or None,
            tuple(sorted(alias for alias, version in model.aliases.items() if str(version) == str(v.version))),
            dict(v.tags),
            v.creation_timestamp,
            connected.tracking_uri,
        )
        for v in sorted(found, key=lambda v: -int(v.version))
    ]
