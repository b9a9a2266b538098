"""Hot reload: what an alias points to is checked before it is served, and nothing that fails takes anything away."""

import time
from pathlib import Path

import pytest
import torch

from craftor.diffuser import Diffuser, load
from craftor.encoders import Encoder, EncoderRefused, UnknownEncoder, Version, load_encoder
from craftor.recipe import Model
from craftor.serving import library as module
from craftor.serving.engine import Engine
from craftor.serving.library import Library, NotServed
from craftor.serving.settings import Canary, EngineSettings
from craftor.serving.watcher import Seen, Watcher
from craftor.serving.work import ImageRequest, Share
from craftor.tracking import TrackingUnreachable
from serving_parts import drain, encoded, write_tuned_bundle
from waiting import wait_for


class Registry:
    """One name with versions; the alias points where `champion` says."""

    def __init__(self, bundles: dict[str, Path]) -> None:
        self.bundles, self.champion, self.down = bundles, "1", False
        self.loads: list[str] = []
        self.looks = 0

    def resolve(self, text: str) -> Version:
        self.looks += 1
        if self.down:
            raise TrackingUnreachable("MLflow does not answer")
        if text != "style@champion":
            raise UnknownEncoder(f"no encoder {text!r} in the registry")
        return Version("style", self.champion, "run", ("champion",), {}, 0, "store")

    def load(self, found: Version | Path, base: Diffuser) -> Encoder:
        if isinstance(found, Path):
            return load_encoder(found, base)
        self.loads.append(found.version)
        loaded = load_encoder(self.bundles[found.version], base)
        return Encoder("style", found.version, found.uri, loaded.sha256, "run", loaded.modules, loaded.window, {})


@pytest.fixture(scope="module")
def base(tiny: Path) -> Diffuser:
    return load(Model(path=str(tiny / "pipeline")))


@pytest.fixture
def registry(tiny: Path, base: Diffuser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    bundles = {str(seed): write_tuned_bundle(tiny, base, tmp_path, seed) for seed in (1, 2, 3)}
    bad = bundles["3"] / "text_encoder" / "model.safetensors"
    bad.write_bytes(bad.read_bytes()[:-1] + b"!")
    found = Registry(bundles)
    monkeypatch.setattr(module, "load_encoder", found.load)
    return found


def test_names_sources_and_versions_lead_to_an_encoder(registry: Registry, base: Diffuser) -> None:
    folder = str(registry.bundles["2"])
    library = Library(base, {"style": "style@champion", "other": folder}, registry.resolve)
    assert library.find("style") is library.find("style@champion") is library.find("style/1")
    assert library.find("other") is library.find(folder)
    with pytest.raises(NotServed, match="no encoder 'style/2' is served here; there are: style, other"):
        library.find("style/2")


def test_a_promotion_is_swapped_in_while_rows_keep_what_they_began_with(registry: Registry, base: Diffuser) -> None:
    library = Library(base, {"style": "style@champion"}, registry.resolve)
    engine = Engine(base, EngineSettings(bucket=4, queue_seconds=100.0))

    def ask() -> ImageRequest:
        shares = (Share(library.find("style"), 1.0, (999, 0)),)
        return ImageRequest("a red star", seed=1, shares=shares, num_steps=6)

    (first,) = drain(engine, engine.submit([ask()]))
    rows = engine.submit([ask()])
    encoded(rows)
    engine.step()
    registry.champion = "2"
    library.refresh()
    assert library.find("style").version == "2" and library.problems == {}
    pinned, after = drain(engine, [*rows, *engine.submit([ask()])])
    engine.stop()
    assert pinned.equal(first) and not after.equal(first)
    library.refresh()
    assert registry.loads == ["1", "2"], "what has not moved is not loaded again"


def test_a_bad_bundle_is_refused_once_and_the_old_version_stays(registry: Registry, base: Diffuser) -> None:
    library = Library(base, {"style": "style@champion"}, registry.resolve)
    registry.champion = "3"
    for _ in range(3):
        library.refresh()
        assert library.find("style").version == "1" and "missing or changed" in library.problems["style"]
    assert registry.loads == ["1", "3"]
    registry.champion = "2"
    library.refresh()
    assert library.find("style").version == "2" and library.problems == {}


def test_without_its_registry_it_serves_on_and_says_so(registry: Registry, base: Diffuser) -> None:
    library = Library(base, {"style": "style@champion"}, registry.resolve)
    registry.down = True
    library.refresh()
    assert library.find("style").version == "1" and library.problems == {"registry": "MLflow does not answer"}
    registry.down, registry.champion = False, "2"
    library.refresh()
    assert library.find("style").version == "2" and library.problems == {}


def test_a_server_starts_whole_or_not_at_all(registry: Registry, base: Diffuser) -> None:
    with pytest.raises(UnknownEncoder, match="no encoder 'nothing' in the registry"):
        Library(base, {"style": "nothing"}, registry.resolve)
    with pytest.raises(UnknownEncoder, match="no such folder, and no registry is in use"):
        Library(base, {"style": "nothing"}, None)
    registry.champion = "3"
    with pytest.raises((EncoderRefused, ValueError), match="missing or changed"):
        Library(base, {"style": "style@champion"}, registry.resolve)


def test_what_is_new_in_the_registry_is_served_too(registry: Registry, base: Diffuser) -> None:
    there: dict[str, str] = {}
    library = Library(base, {"own": str(registry.bundles["2"])}, registry.resolve, discover=lambda: there)
    assert list(library.table) == ["own"]
    there |= {"style": "style@champion", "own": "other@champion", "odd": "odd@champion"}
    library.refresh()
    assert set(library.table) == {"own", "style"} and library.find("own").version is None, "settings go first"
    assert library.find("style") is library.find("style@champion")
    assert list(library.problems) == ["odd"], "what cannot be used is said, and nothing else is lost"


def test_who_missed_the_first_sighting_of_a_name_knows_it_from_the_next(registry: Registry, base: Diffuser) -> None:
    there: dict[str, str] = {}
    leader, late = (Library(base, {}, registry.resolve, discover=lambda: there) for _ in range(2))
    there["style"] = "style@champion"
    leader.refresh()
    late.follow(leader.look())
    assert late.find("style@champion") is late.find("style") and late.sources["style"] == "style@champion"


@pytest.mark.parametrize(
    "error",
    [
        TrackingUnreachable("the store gives nothing"),
        OSError("No space left on device"),
        torch.OutOfMemoryError("No memory left"),
        KeyError("a setting"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_version_that_cannot_be_loaded_for_now_is_tried_again(
    registry: Registry, base: Diffuser, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(found: Version | Path, base: Diffuser) -> Encoder:
        if isinstance(found, Version) and found.version == "2":
            raise error
        return registry.load(found, base)

    there: dict[str, str] = {}
    library = Library(base, {"style": "style@champion"}, registry.resolve, discover=lambda: there)
    registry.champion = "2"
    monkeypatch.setattr(module, "load_encoder", load)
    library.refresh()
    assert library.find("style").version == "1" and error.args[0] in library.problems["style"]
    there["new"] = "style@champion"
    found = Library(base, {"own": str(registry.bundles["1"])}, registry.resolve, discover=lambda: there)
    assert list(found.table) == ["own"] and list(found.problems) == ["new"]
    monkeypatch.setattr(module, "load_encoder", registry.load)
    for one in (library, found):
        one.refresh()
        assert one.find("style@champion").version == "2" and one.problems == {}


def served(version: str, *libraries: Library) -> None:
    wait_for(lambda: all(one.find("style").version == version for one in libraries))


def test_the_watcher_looks_at_once_when_hinted(registry: Registry, base: Diffuser) -> None:
    library = Library(base, {"style": "style@champion"}, registry.resolve)
    watcher = Watcher([library], seconds=3600)
    registry.champion = "2"
    watcher.hint()
    served("2", library)
    assert watcher.problem is None
    watcher.stop()
    assert "has ended" in str(watcher.problem)


def test_one_replica_looks_for_all_and_another_where_it_ends(registry: Registry, base: Diffuser) -> None:
    libraries = [Library(base, {"style": "style@champion"}, registry.resolve) for _ in range(3)]
    watchers: list[Watcher] = []
    first = 0

    def tell(seen: Seen) -> None:
        for watcher in watchers:
            watcher.hear(seen)

    watchers += [Watcher([one], 3600, lambda i=i: first == i, tell) for i, one in enumerate(libraries)]
    looks = registry.looks
    registry.champion = "2"
    for watcher in watchers:
        watcher.hint()
    served("2", *libraries)
    assert registry.looks == looks + 1
    first, registry.champion = 1, "1"
    watchers.pop(0).stop()
    for watcher in watchers:
        watcher.hint()
    served("1", *libraries[1:])
    assert registry.looks == looks + 2 and libraries[0].find("style").version == "2"
    for watcher in watchers:
        watcher.stop()


def test_who_hears_nothing_of_the_registry_says_so(registry: Registry, base: Diffuser, monkeypatch) -> None:  # noqa: ANN001
    watcher = Watcher([Library(base, {"style": "style@champion"}, registry.resolve)], 1.0, leads=lambda: False)
    assert watcher.problem is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 50)
    assert watcher.problem == "no replica has told of the registry for 50 s"
    monkeypatch.undo()
    watcher.stop()


def test_a_share_of_the_callers_get_the_canary_always_the_same_ones(registry: Registry, base: Diffuser) -> None:
    canaries = {"style": Canary(source=str(registry.bundles["2"]), share=0.25)}
    library = Library(base, {"style": "style@champion"}, registry.resolve, canaries)
    got = {caller: library.find("style", caller).version for caller in map(str, range(400))}
    assert 60 < sum(version is None for version in got.values()) < 140
    assert all(library.find("style", caller).version == version for caller, version in got.items())
    assert all(library.find("style@champion", caller).version == version for caller, version in got.items())
    assert library.find("style#canary").version is None
    assert {library.find("style/1", caller).version for caller in got} == {"1"}, "who names a version gets it"
