"""What one replica consists of: the base model, the engine, the encoders, and who may ask."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from craftor.diffuser import load
from craftor.encoders import resolve, versions
from craftor.serving.control import load_controlnet
from craftor.serving.engine import Engine
from craftor.serving.gate import Gate
from craftor.serving.interpret import Interpreter, check_sizes
from craftor.serving.jobs import Jobs
from craftor.serving.library import Discover, Library, Resolve, Watcher
from craftor.serving.metrics import Metrics
from craftor.serving.pictures import Pictures
from craftor.serving.settings import Serving
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

    @property
    def problems(self) -> dict[str, str]:
        """Why this replica does not do all that it should; `engine` alone means that it cannot do anything."""
        problems = dict(self.library.problems)
        if not self.engine.alive:
            problems["engine"] = "a thread of the engine has ended; the log says why"
        if not self.watcher.alive:
            problems["watcher"] = "the thread that follows the registry has ended; the log says why"
        return problems


@contextmanager
def service(settings: Serving) -> Iterator[Service]:
    """Load, measure and start; stop at the end of the block. Raises what loading the base and the encoders raises."""
    base = load(settings.model, "cuda" if settings.replicas.num_gpus else "cpu").hold_rounded()
    check_sizes(settings, base)
    look_up, discover = _registry(settings)
    library = Library(base, settings.encoders, look_up, settings.canaries, discover)
    metrics = Metrics()
    controlnet = None if settings.controlnet is None else load_controlnet(settings.controlnet, base)
    engine = Engine(base, settings.engine, metrics, controlnet).start()
    metrics.watch(engine, library)
    watcher = Watcher(library, settings.poll_seconds)
    pictures = Pictures(Path(settings.runs) / "served", settings.http.url_seconds)
    try:
        yield Service(
            settings,
            engine,
            library,
            watcher,
            Interpreter(settings, base, library),
            Gate(settings.tokens),
            Jobs(engine),
            metrics,
            pictures,
        )
    finally:
        watcher.stop()
        engine.stop()


def _registry(settings: Serving) -> tuple[Resolve | None, Discover]:
    """Look-ups in the registry, where some encoder comes from there."""
    sources = [*settings.encoders.values(), *(canary.source for canary in settings.canaries.values())]
    alias = settings.registered
    if alias is None and all(Path(source).is_dir() for source in sources):
        return None, dict
    Path(settings.runs).mkdir(parents=True, exist_ok=True)
    connected = client(Path(settings.runs))

    def discover() -> dict[str, str]:
        found = [version.name for version in versions(connected) if alias in version.aliases]
        return {name: f"{name}@{alias}" for name in found if name != "base"}  # which names the model's own

    return lambda text: resolve(connected, text), dict if alias is None else discover
