"""On Ray Serve: the same bytes from any replica, jobs cancelled wherever they are, promotions everywhere, a killed
replica comes back, and an end that drops nobody.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from conftest import write_tiny_recipe
from craftor.diffuser import load
from craftor.recipe import Model, RecipeError
from craftor.serving import service
from craftor.serving.jobs import NOT_HERE
from craftor.serving.preflight import check
from craftor.serving.settings import Serving, parse
from craftor.serving.settings import load as load_serving
from craftor.tracking import client
from craftor.versions import UnknownEncoder
from encoder_bundles import make_bundle, new_store, recipe_for, register
from serving_parts import replicas, write_tuned_bundle
from waiting import wait_for

ROOT = Path(__file__).parents[1]


def test_the_shipped_files_are_valid_and_mistakes_are_named(tmp_path: Path) -> None:
    import yaml

    assert load_serving(ROOT / "recipes" / "micro_serve.toml").engine.bucket == 8
    (app,) = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())["applications"]
    assert parse(app["args"], "serve.yaml").replicas.max == 4
    kubernetes = yaml.safe_load((ROOT / "cluster" / "rayservice.yaml").read_text())
    (app,) = yaml.safe_load(kubernetes["spec"]["serveConfigV2"])["applications"]
    assert parse(app["args"], "rayservice.yaml").replicas.num_gpus == 1
    wrong = tmp_path / "wrong.toml"
    for text, message in (
        (
            'model = { path = "micro:base" }\nengin = {}',
            "engin: unknown key; allowed here: canaries, controlnet, defaults",
        ),
        ('model = { path = "micro:base" }\nengine = { mode = "quick" }', "engine.mode: Input should be 'strict' or"),
        ('model = { path = "micro:base" }\nhttp = { host = "0.0.0.0" }', "'0.0.0.0' is open to others, and tokens is"),
        ('model = { path = "micro:base" }\nencoders = { base = "x" }', "encoders: 'base' cannot name an encoder"),
        ('model = { path = "micro:base" }\nlimits = { sizes = ["big"] }', "'big': expected WIDTHxHEIGHT"),
        (
            'model = { path = "micro:base", compile = true }\ncontrolnet = "x"',
            "model.compile = true: not with controlnet; allowed there: false",
        ),
        (
            'model = { path = "micro:base" }\nobject_encoder = "x@y"\nengine = { bucket = 2 }',
            "engine.bucket = 2: with an object_encoder at least 3",
        ),
    ):
        wrong.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_serving(wrong)


def test_what_cannot_start_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = {"model": {"path": "micro:base"}, "http": {"port": 0}, "runs": str(tmp_path / "runs")}
        for changed, error, message in (
            ({"model": {"path": "micro:bass"}}, RecipeError, "my.toml: micro:bass: not shipped with craftor_micro"),
            ({"model": {"path": "./nothing"}}, RecipeError, "my.toml: model.path = './nothing': no such folder"),
            ({"controlnet": "./nothing"}, RecipeError, "my.toml: controlnet = './nothing': no such folder"),
            ({"http": {"port": port}}, RecipeError, f"my.toml: http.port = {port}: cannot listen at 127.0.0.1"),
            (
                {"http": {"port": 0, "certificate": "a", "key": "b"}},
                RecipeError,
                "http.certificate = 'a': no such file",
            ),
            ({"encoders": {"style": "style@champion"}}, UnknownEncoder, "no encoder 'style' in the registry"),
            ({"object_encoder": "toys@champion"}, UnknownEncoder, "no encoder 'toys' in the registry"),
        ):
            with pytest.raises(error, match=message):
                check(parse(given | changed, "my.toml"), Path("my.toml"))
    check(parse(given | {"registered": "champion"}, "my.toml"), Path("my.toml"))
    with pytest.raises(RecipeError, match="certificate and key go together"):
        parse(given | {"http": {"certificate": "a"}}, "my.toml")


def test_a_replica_that_has_a_gpu_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def load(model: Model, device: str) -> None:
        raise Seen(device)

    monkeypatch.setattr(service, "load", load)
    for gpus, device in ((0.0, "cpu"), (0.5, "cuda")):
        settings = parse({"model": {"path": "micro:base"}, "replicas": {"num_gpus": gpus}}, "my.toml")
        with pytest.raises(Seen, match=device), service.service(settings):
            pass


def test_the_router_prefers_replicas_that_hold_what_is_asked_for() -> None:
    from ray.serve.request_router import PendingRequest

    from craftor.serving.routing import PreferHolders

    replicas = [
        SimpleNamespace(name=f"{version}-{i}", routing_stats={"encoders": ["style", "pick", f"style/{version}"]})
        for version in (3, 4)
        for i in range(3)
    ]

    def ranks(*headers: tuple[bytes, bytes], args: tuple = ()) -> list[set[str]]:
        http = SimpleNamespace(asgi_scope={"headers": [(b"host", b"x"), *headers]})
        request = PendingRequest(list(args or [http]), {}, None, future=None)
        chosen = asyncio.run(PreferHolders.choose_replicas(None, replicas, request))
        assert all(len({replica.name for replica in rank}) == 2 for rank in chosen), "two of each rank"
        return [{replica.name[0] for replica in rank} for rank in chosen]

    for _ in range(10):
        assert ranks((b"x-encoders", b"style/4")) == [{"4"}, {"3"}]
        assert ranks((b"x-encoders", b"pick , style/3")) == [{"3"}, {"4"}]
    assert len(ranks()) == len(ranks((b"x-encoders", b"style,pick"))) == len(ranks(args=("job", "client"))) == 1
    assert len(ranks((b"x-encoders", b"other"))) == 1, "held by none: any"
    assert asyncio.run(PreferHolders.choose_replicas(None, [], None)) == []


def test_replicas_scale_between_their_bounds_and_see_more_than_they_hold() -> None:
    from craftor.serving.deployment import build

    own = {"min": 1, "max": 3, "num_cpus": 2.0, "num_gpus": 1.0, "target_ongoing_requests": 6}
    scaled = build({"model": {"path": "micro:base"}, "replicas": own})._bound_deployment
    config = scaled._deployment_config
    bounds = config.autoscaling_config
    assert (bounds.min_replicas, bounds.max_replicas, bounds.target_ongoing_requests) == (1, 3, 6)
    assert scaled.ray_actor_options == {"num_cpus": 2.0, "num_gpus": 1.0}
    assert config.max_ongoing_requests == 1000, "Serve's default of 5 would starve the engine"
    fixed = build({"recipe": str(ROOT / "recipes" / "micro_serve.toml")})._bound_deployment._deployment_config
    assert fixed.autoscaling_config is None and fixed.num_replicas == 1


@pytest.mark.parametrize("ended", ["engine", "watcher"])
def test_a_replica_is_started_anew_when_a_thread_of_it_has_ended(ended: str) -> None:
    from craftor.serving.deployment import Replica

    threads = {name: SimpleNamespace(alive=True) for name in ("engine", "watcher")}
    rest = dict.fromkeys(field.name for field in fields(service.Service))
    replica = SimpleNamespace(_service=service.Service(**{**rest, **threads}))
    Replica.check_health(replica)
    threads[ended].alive = False
    with pytest.raises(RuntimeError, match="a thread of the engine or of the watcher has ended"):
        Replica.check_health(replica)


class Answered:
    """What Ray Serve keeps of a replica's answer; without one it was too slow."""

    def __init__(self, answer: object = None) -> None:
        self.answer = answer

    def get(self, timeout_s: float) -> object:
        if self.answer is None:
            raise TimeoutError
        return self.answer

    async def get_async(self) -> object:
        return self.answer or await asyncio.sleep(3600)


def test_a_replica_that_does_not_answer_takes_no_other_answer_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve
    from ray.serve.exceptions import DeploymentUnavailableError
    from ray.serve.handle import DeploymentBroadcastResponse

    from craftor.serving import deployment

    answers: dict[str, object] = {"metrics_here": ("two", b"2"), "cancel_here": 3, "look_here": True}

    async def told(method: str) -> list[Answered]:
        if not answers:
            raise DeploymentUnavailableError(None)
        return [Answered(), Answered(answers[method])]

    handle = SimpleNamespace(broadcast=lambda method, *_: DeploymentBroadcastResponse(told(method), None))
    own = SimpleNamespace(metrics=SimpleNamespace(text=lambda: b"1"))
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    monkeypatch.setattr(serve, "get_deployment_handle", lambda *_: handle)
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    assert asyncio.run(deployment._metrics_everywhere(own)) == {"one": b"1", "two": b"2"}
    assert asyncio.run(deployment._cancel_everywhere("job", "me")) == 3
    asyncio.run(deployment._look_everywhere())
    answers.clear()
    assert asyncio.run(deployment._metrics_everywhere(own)) == {"one": b"1"}
    assert asyncio.run(deployment._cancel_everywhere("job", "me")) == NOT_HERE
    asyncio.run(deployment._look_everywhere())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployed")


@pytest.fixture(scope="module")
def url(tiny: Path, cluster: None, folder: Path) -> Iterator[str]:
    from ray import serve

    from craftor.serving.deployment import start

    recipe, connected = recipe_for(write_tiny_recipe(tiny, folder)), new_store(folder / "runs")
    register(connected, make_bundle(recipe, folder / "1", 1), "style", "champion")
    register(connected, make_bundle(recipe, folder / "2", 2), "style")
    bundle = write_tuned_bundle(tiny, load(Model(path=str(tiny / "pipeline"))), folder, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start(
        Serving.model_validate(
            {
                "model": {"path": str(tiny / "pipeline")},
                "encoders": {"tuned": str(bundle), "style": "style@champion"},
                "poll_seconds": 3600.0,
                "runs": str(folder / "runs"),
                "engine": {"bucket": 4, "queue_seconds": 1000.0},
                "limits": {"steps": 1000},
                "http": {"port": port},
                "replicas": {"min": 2, "max": 2, "num_cpus": 0.5},
            }
        )
    )
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def ask(url: str, *, job: str | None = None, **body: object) -> httpx.Response:
    headers = {"X-Encoders": "tuned"} | ({"X-Job-Id": job} if job else {})
    return httpx.post(
        f"{url}/v1/images/generations", json={"prompt": "a red star", **body}, headers=headers, timeout=60
    )


def served_styles(url: str) -> set[str]:
    """The versions of `style` that some replica serves, as their answers to ten callers show."""
    answers = [ask(url, steps=1, mix={"style": 0.5}).json()["data"][0] for _ in range(10)]
    return {answer["provenance"]["mixture"][0]["version"] for answer in answers}


@pytest.mark.ray
def test_replicas_agree_cancel_follow_come_back_and_end(url: str, folder: Path) -> None:
    from craftor.serving.deployment import stop

    body = {"seed": 1, "steps": 4, "mix": {"tuned": 0.5}}
    answers = [ask(url, **body).json()["data"] for _ in range(6)]
    assert len(answers[0]) == 1 and all(answer == answers[0] for answer in answers)
    assert ask(url, mix={"none": 1}).json()["error"]["code"] == "encoder_not_found"

    ended: list[httpx.Response] = []
    long = threading.Thread(target=lambda: ended.append(ask(url, job="long", steps=1000, n=8)))
    long.start()
    for _ in range(100):  # whichever replica is asked, the one that holds the job hears of it
        if (told := httpx.delete(f"{url}/v1/jobs/long", timeout=30)).status_code == 200:
            break
        time.sleep(0.05)
    long.join()
    assert told.json()["cancelled_images"] == 8 and ended[0].json()["error"]["code"] == "cancelled"

    assert served_styles(url) == {"1"}
    client(folder / "runs").set_registered_model_alias("style", "champion", "2")
    assert httpx.post(f"{url}/v1/encoders/refresh", timeout=30).status_code == 202
    wait_for(lambda: served_styles(url) == {"2"})  # the replica that looks tells the other

    before = replicas()
    assert len(before) == 2
    before[0].kill()
    wait_for(lambda: len(now := replicas()) == 2 and before[0] not in now)
    wait_for(lambda: all(ask(url, **body).status_code == 200 for _ in range(4)))
    assert ask(url, **body).json()["data"] == answers[0]

    last: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: last.append(ask(url, steps=1000, n=2)))
    waiting.start()
    time.sleep(0.5)
    stop()
    waiting.join()
    assert last[0].status_code == 200, "who has been let in is answered"
