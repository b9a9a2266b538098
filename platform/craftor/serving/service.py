"""What one replica consists of: the base model, the engine, the encoders, and who may ask."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from craftor import registry
from craftor.diffuser import load
from craftor.encoders import resolve, versions
from craftor.serving.control import load_controlnet
from craftor.serving.engine import Engine
from craftor.serving.gate import Gate
from craftor.serving.interpret import Interpreter, check_sizes
from craftor.serving.jobs import Jobs
from craftor.serving.library import Library
from craftor.serving.metrics import Metrics
from craftor.serving.objects import ON_THE_SHELF, ObjectEncoder, object_encoders
from craftor.serving.pictures import Pictures
from craftor.serving.settings import OBJECT_SLOTS, Serving
from craftor.serving.shelf import Discover, Resolve, Shelf
from craftor.serving.watcher import Seen, Watcher
from craftor.tracking import client


@dataclass(frozen=True)
class Service:
    settings: Serving
    engine: Engine
    library: Library
    watcher: Watcher
    interpreter: Interpreter
    gate: Gate
    jobs: Jobs
    metrics: Metrics
    pictures: Pictures
    objects: Shelf[ObjectEncoder]
    """The one that draws objects, or none."""

    @property
    def alive(self) -> bool:
        """Whether this process should live on: no thread of it has ended."""
        return self.engine.alive and self.watcher.alive

    @property
    def object_encoder(self) -> ObjectEncoder | None:
        """The version of now."""
        return self.objects.table.get(ON_THE_SHELF)

    @property
    def problems(self) -> dict[str, str]:
        """Why this replica does not do all that it should; `engine` alone means that it cannot do anything."""
        problems = self.library.problems | self.objects.problems
        if not self.engine.alive:
            problems["engine"] = "a thread of the engine has ended; the log says why"
        if self.watcher.problem is not None:
            problems["watcher"] = self.watcher.problem
        return problems


@contextmanager
def service(
    settings: Serving, leads: Callable[[], bool] = lambda: True, tell: Callable[[Seen], None] | None = None
) -> Iterator[Service]:
    """Load, measure and start; stop at the end of the block. Raises what loading the base and the encoders raises.

    `leads` and `tell` are a `Watcher`'s.
    """
    base = load(settings.model, "cuda" if settings.replicas.num_gpus else "cpu")
    check_sizes(settings, base)
    look_up, discover = _registry(settings)
    base.hold_rounded()
    objects = object_encoders(settings.model, base, settings.object_encoder, look_up)
    library = Library(base, settings.encoders, look_up, settings.canaries, discover)
    metrics = Metrics()
    controlnet = None if settings.controlnet is None else load_controlnet(settings.controlnet, base)
    engine = Engine(base, settings.engine, metrics, controlnet, OBJECT_SLOTS if objects.table else 2)
    interpreter = Interpreter(settings, base, library)
    if base.compile:
        engine.prepare(list(interpreter.sizes.values()))
    engine.start()
    metrics.watch(engine, library, objects)
    watcher = Watcher([library, objects], settings.poll_seconds, leads, tell)
    pictures = Pictures(Path(settings.runs) / "served", settings.http.url_seconds)
    try:
        yield Service(
            settings,
            engine,
            library,
            watcher,
            interpreter,
            Gate(settings.tokens),
            Jobs(engine),
            metrics,
            pictures,
            objects,
        )
    finally:
        watcher.stop()
        engine.stop()


def _registry(settings: Serving) -> tuple[Resolve | None, Discover]:
    """Look-ups in the registry, where some encoder comes from there."""
    sources = [*settings.encoders.values(), *(canary.source for canary in settings.canaries.values())]
    sources += [settings.object_encoder] if settings.object_encoder else []
    alias = settings.registered
    if alias is None and all(Path(source).is_dir() for source in sources):
        return None, dict
    Path(settings.runs).mkdir(parents=True, exist_ok=True)
    connected = client(Path(settings.runs))

    def discover() -> dict[str, str]:
        there = [version for version in versions(connected) if registry.KIND not in version.tags]
        found = [version.name for version in there if alias in version.aliases]
        return {name: f"{name}@{alias}" for name in found if name != "base"}  # which names the model's own

    return lambda text: resolve(connected, text), dict if alias is None else discover
