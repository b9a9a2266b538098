"""The endpoint as its callers meet it: OpenAI's own client, mixtures, previews, limits, and every mistake a 4xx."""

import asyncio
import base64
import gc
import hashlib
import io
import json
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import torch
from fastapi.testclient import TestClient
from mlflow.webhooks import delivery
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from PIL import Image

from craftor import registry
from craftor.diffuser import load
from craftor.recipe import Model
from craftor.serving import api, tracing, webhook
from craftor.serving.admission import Load
from craftor.serving.api import Everywhere, build_app
from craftor.serving.generation import begin
from craftor.serving.jobs import NOT_HERE
from craftor.serving.metrics import Metrics
from craftor.serving.pictures import Pictures
from craftor.serving.provenance import png
from craftor.serving.service import Service, service
from craftor.serving.settings import Serving
from encoder_bundles import METRICS, make_bundle, new_store, recipe_for, register
from serving_parts import listening, write_controlnet, write_tuned_bundle
from waiting import wait_for

PROMPT = "a small red star"
TOKENS = {name: f"{name}-secret" for name in ("alice", "bob", "poor", "slow")}
SMALL = base64.b64encode(png(torch.zeros(3, 32, 32))).decode()
PNG_1X1 = base64.b64encode(png(torch.zeros(3, 1, 1))).decode()
ALICE = {"Authorization": "Bearer alice-secret"}


@pytest.fixture(scope="module")
def settings(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Serving:
    folder = tmp_path_factory.mktemp("served")
    base = load(Model(path=str(tiny / "pipeline")))
    bundles = {f"tuned{seed}": str(write_tuned_bundle(tiny, base, folder, seed)) for seed in (1, 2)}
    tokens = {name: {"sha256": hashlib.sha256(token.encode()).hexdigest()} for name, token in TOKENS.items()}
    tokens["poor"]["requests_per_minute"] = 1
    tokens["slow"]["seconds_per_minute"] = 1e-6
    return Serving.model_validate(
        {
            "name": "tiny",
            "model": {"path": str(tiny / "pipeline")},
            "controlnet": write_controlnet(base, folder / "controlnet"),
            "encoders": bundles,
            "runs": str(folder),
            "engine": {"bucket": 4, "queue_seconds": 60.0},
            "limits": {
                "images": 6,
                "steps": 500,
                "prompt_chars": 60,
                "body_bytes": 16384,
                "encoders": 2,
                "sizes": ["32x48"],
            },
            "defaults": {"steps": 4, "guidance_scale": 3.0},
            "tokens": tokens,
        }
    )


@pytest.fixture(scope="module")
def served(settings: Serving) -> Iterator[Service]:
    with service(settings) as one:
        yield one


@pytest.fixture(scope="module")
def http(served: Service) -> Iterator[TestClient]:
    with TestClient(build_app(served), headers=ALICE, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def url(served: Service) -> Iterator[str]:
    with listening(served) as address:
        yield address


def ask(http: TestClient, **body: object) -> dict:
    answer = http.post("/v1/images/generations", json={"prompt": PROMPT, "seed": 1, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def pictures(answer: dict) -> list[bytes]:
    return [base64.b64decode(one["b64_json"]) for one in answer["data"]]


def test_openais_client_works_unchanged(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="alice-secret", max_retries=0)
    answer = client.images.generate(model="tiny", prompt=PROMPT, n=2, size="32x32", response_format="b64_json")
    images = [Image.open(io.BytesIO(base64.b64decode(one.b64_json or ""))) for one in answer.data or []]
    assert [image.size for image in images] == [(32, 32)] * 2
    mixed = client.images.generate(prompt=PROMPT, extra_body={"mix": {"tuned1": 0.5}, "seed": 3})
    assert mixed.data and mixed.data[0].provenance["mixture"][0]["weight"] == 0.5
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="size: '1x1' is not offered; allowed: auto, 32x32, 32x48"):
        client.images.generate(prompt=PROMPT, size="1x1")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()


def test_openais_client_streams_previews(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="alice-secret", max_retries=0)
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 5, "steps": 6, "mix": {"tuned2": 1.0}}
    )
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    whole = client.images.generate(prompt=PROMPT, extra_body={"seed": 5, "steps": 6, "mix": {"tuned2": 1.0}})
    assert events[-1].b64_json == whole.data[0].b64_json, "streamed or not, the same bytes"


def test_openais_client_hears_that_its_stream_was_cancelled(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="alice-secret", max_retries=0)
    body = {"steps": 500, "seed": 1}
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=16, extra_body=body, extra_headers={"X-Job-Id": "streamed"}
    )
    assert next(iter(stream)).type == "image_generation.partial_image"
    assert client.delete("/jobs/streamed", cast_to=dict[str, object])["cancelled_images"] == 1
    with pytest.raises(openai.APIError, match="the job was cancelled"):
        list(stream)


def test_a_picture_tells_where_it_came_from(http: TestClient, served: Service) -> None:
    answer = ask(http, mix={"tuned1": {"weight": 0.5, "from": 800, "to": 100}, "base": 0.5}, steps=4)
    (data,) = pictures(answer)
    inside = json.loads(Image.open(io.BytesIO(data)).text["craftor"])
    assert inside == answer["data"][0]["provenance"]
    (member,) = inside["mixture"]
    assert member["sha256"] == served.library.table["tuned1"].sha256
    assert (member["weight"], member["from"], member["to"], member["steps"]) == (0.5, 800, 100, [1, 4])
    assert inside["seed"] == 1 and inside["engine"]["bucket"] == 4 and inside["engine"]["mode"] == "strict"


def test_null_is_what_is_not_said(http: TestClient) -> None:
    nothing = dict.fromkeys(("n", "size", "response_format", "stream", "partial_images", "quality", "user", "steps"))
    assert pictures(ask(http, **nothing)) == pictures(ask(http))


def test_each_encoder_acts_in_the_window_of_its_training(http: TestClient) -> None:
    mixture = ask(http, mix={"tuned1": 1.0})["data"][0]["provenance"]["mixture"][0]
    assert (mixture["from"], mixture["to"], mixture["steps"]) == (499, 0, [2, 4])


def test_pictures_are_begun_from_and_kept_where_the_mask_says(http: TestClient) -> None:
    (drawn,) = pictures(ask(http))
    begun = base64.b64encode(drawn).decode()
    half = torch.zeros(1, 32, 32).expand(3, -1, -1).clone()
    half[:, :, 16:] = 1
    body = {"image": begun, "strength": 0.5, "prompt": "a large blue ring"}
    answer = ask(http, **body)
    described = answer["data"][0]["provenance"]["image"]
    assert described == {
        "sha256": hashlib.sha256(drawn).hexdigest(),
        "mask_sha256": None,
        "strength": 0.5,
        "steps": [2, 4],
    }
    masked = ask(http, **body | {"mask": "data:image/png;base64," + base64.b64encode(png(half)).decode()})
    assert len({drawn, *pictures(answer), *pictures(masked)}) == 3


def test_a_controlnets_picture_steers_where_the_server_has_one(http: TestClient, served: Service) -> None:
    plain = ask(http)
    steered = ask(http, control_image=SMALL, mix={"tuned1": 0.5}, control_scale=0.5)
    described = steered["data"][0]["provenance"]
    assert described["control"] == {"sha256": hashlib.sha256(base64.b64decode(SMALL)).hexdigest(), "scale": 0.5}
    assert described["engine"]["controlnet"] == served.engine.controlnet.sha256
    assert "controlnet" not in plain["data"][0]["provenance"]["engine"]
    assert pictures(steered) != pictures(ask(http, mix={"tuned1": 0.5}))
    without = served.settings.model_copy(update={"controlnet": None})
    interpreter = replace(served.interpreter, settings=without)
    with TestClient(build_app(replace(served, settings=without, interpreter=interpreter)), headers=ALICE) as bare:
        refused = bare.post("/v1/images/generations", json={"prompt": PROMPT, "control_image": SMALL})
        assert refused.status_code == 400 and "has no ControlNet" in refused.json()["error"]["message"]


def test_a_sweep_is_its_mixtures_one_by_one_with_the_same_seeds(http: TestClient) -> None:
    mixes: list[dict] = [{}, {"tuned1": 0.5}, {"tuned1": 0.5, "tuned2": 0.5}]
    swept = pictures(ask(http, sweep=mixes, n=2))
    alone = [pictures(ask(http, mix=mix, seed=seed))[0] for mix in mixes for seed in (1, 2)]
    assert swept == alone and len(set(swept)) == 6


def test_the_same_bytes_under_load(http: TestClient) -> None:
    body = {"mix": {"tuned1": 0.7}, "steps": 9, "seed": 42}
    alone = pictures(ask(http, **body))
    crowd = [
        threading.Thread(
            target=ask, args=(http,), kwargs={"n": 2, "steps": 3 + i, "guidance_scale": 1.0 + i % 3, "seed": i}
        )
        for i in range(8)
    ]
    for thread in crowd:
        thread.start()
    crowded = [pictures(ask(http, **body)) for _ in range(3)]
    for thread in crowd:
        thread.join()
    assert crowded == [alone] * 3


def test_a_requests_pictures_are_gone_when_it_is_answered(
    http: TestClient, served: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the garbage collector: thousands of requests would make it late by hundreds of megabytes."""
    submit, rows = served.engine.submit, []

    def noted(*given: object, **more: object) -> list:
        found = submit(*given, **more)
        rows.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr(served.engine, "submit", noted)
    gc.collect()
    gc.disable()
    try:
        ask(http, n=3, steps=2)
        assert len(rows) == 3
        # The engine's threads let go of them within a step; the decoder's may hold its last.
        wait_for(lambda: sum(row() is not None for row in rows) <= 1, seconds=60)
    finally:
        gc.enable()


def test_urls_lead_to_the_same_bytes_for_a_while(http: TestClient, served: Service) -> None:
    link = ask(http, response_format="url")["data"][0]["url"]
    found = http.get(link, headers={"Authorization": ""})
    assert found.headers["content-type"] == "image/png" and found.content == pictures(ask(http))[0]
    assert http.get("/v1/images/..%2fsecret.png").status_code == 404
    assert http.get(f"/v1/images/{'a' * 32}.png").status_code == 404


def test_a_picture_that_another_request_renames_or_removes_meanwhile_is_no_error(tmp_path: Path) -> None:
    kept = Pictures(tmp_path, 60.0)
    (tmp_path / ".gone.png").symlink_to(tmp_path / "nothing")  # listed, and not there when it is looked at
    assert kept.read(kept.keep(b"picture")) == b"picture"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"mix": {"none": 1.0}}, "mix.none", "no encoder 'none' is served here; there are: tuned1, tuned2"),
        ({"mix": {"tuned1@champion": 1.0}}, "mix.tuned1@champion", "there are: tuned1, tuned2"),
        ({"mix": {"tuned1": 0.7, "tuned2": 0.7}}, "mix", "sum to 1.4, allowed: up to 1"),
        ({"mix": {"tuned1": -0.1}}, "mix", "weight is -0.1, allowed: 0 to 1"),
        ({"mix": {"base": 0.5, "tuned1": 0.2}}, "mix", "base is 0.5 and the others sum to 0.2"),
        ({"mix": {"tuned1": "much"}}, "mix.tuned1", "valid number"),
        ({"mix": {"tuned1": {"weight": 1.0, "from": 10, "to": 500}}}, "mix.tuned1", "from = 10 comes before to = 500"),
        ({"mix": {"tuned1": {"weight": 1.0, "until": 5}}}, "mix.tuned1.until", "not supported"),
        ({"mix": {"tuned1": 0.1, "tuned2": 0.1, "other": 0.1}}, "mix", "3 encoders in one mixture, allowed: up to 2"),
        ({"sweep": []}, "sweep", "at least 1"),
        ({"sweep": [{}, {"none": 1.0}]}, "sweep.1.none", "no encoder 'none'"),
        ({"sweep": [{}], "mix": {"tuned1": 1.0}}, "sweep", "stands in for mix"),
        ({"sweep": [{}] * 7}, "sweep", "7 images of one request, allowed: up to 6"),
        ({"prompt": "  "}, "prompt", "is empty"),
        ({"prompt": "x" * 61}, "prompt", "61 characters, allowed: 60"),
        ({"prompt": "a\x00b"}, "prompt", "control characters"),
        ({"prompt": 3}, "prompt", "valid string (got 3)"),
        ({"negative_prompt": "x" * 61}, "negative_prompt", "allowed: 60"),
        ({"size": "33x33"}, "size", "'33x33' is not offered"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 7}, "n", "7 images of one request, allowed: up to 6"),
        ({"n": "2"}, "n", "valid integer"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**53}, "seed", "less than or equal to 9007199254740991"),
        ({"seed": 2**53 - 1, "n": 2}, "seed", "is over"),
        ({"steps": 501}, "steps", "501, allowed: up to 500"),
        ({"steps": 0}, "steps", "greater than or equal to 1"),
        ({"guidance_scale": 0.5}, "guidance_scale", "greater than or equal to 1"),
        ({"guidance_scale": 1e9}, "guidance_scale", "allowed: up to 30"),
        ({"scheduler": "magic"}, "scheduler", "'ddim', 'euler' or 'dpm_solver_2m'"),
        ({"partial_images": 2}, "partial_images", "goes with stream"),
        ({"stream": True, "response_format": "url"}, "response_format", "'url' does not go with stream"),
        ({"mix": {"base": {"weight": 1.0, "from": 500}}}, "mix", "base acts at every timestep"),
        ({"style": "vivid"}, "style", "parameter not supported here: style"),
        ({"quality": "hd"}, "quality", "Input should be 'auto'"),
        ({"image": "?"}, "image", "image: not base64"),
        ({"image": "p\u00efcture"}, "image", "image: not base64"),
        ({"control_image": "data:image/png;base64"}, "control_image", "not a picture of an allowed format"),
        ({"image": "aGVsbG8="}, "image", "not a picture of an allowed format"),
        ({"image": PNG_1X1}, "image", "1x1 pixels, allowed: 32x32, the size asked for"),
        ({"image": 3}, "image", "valid string"),
        ({"image": SMALL, "size": "32x48"}, "image", "32x32 pixels, allowed: 32x48, the size asked for"),
        ({"image": SMALL, "mask": PNG_1X1}, "mask", "1x1 pixels, allowed: 32x32"),
        ({"image": SMALL, "mask": "data:,"}, "mask", "not a picture of an allowed format"),
        ({"image": SMALL, "strength": 1.5}, "strength", "less than or equal to 1"),
        ({"mask": SMALL}, "mask", "goes with image"),
        ({"strength": 0.5}, "strength", "goes with image"),
        ({"image": PNG_1X1, "strength": 0}, "strength", "greater than 0"),
        ({"control_image": PNG_1X1}, "control_image", "1x1 pixels, allowed: 32x32, the size asked for"),
        ({"control_image": SMALL, "control_scale": 3}, "control_scale", "less than or equal to 2"),
        ({"control_scale": 1}, "control_scale", "goes with control_image"),
    ],
)
def test_mistakes_are_400_and_say_what_is_allowed(http: TestClient, body: dict, param: str, message: str) -> None:
    answer = http.post("/v1/images/generations", json={"prompt": PROMPT, **body})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text
    assert error["param"] == param and message in error["message"], error


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_weights_that_are_not_finite_are_refused(http: TestClient, weight: str) -> None:
    text = f'{{"prompt": "star", "mix": {{"tuned1": {weight}}}}}'
    answer = http.post("/v1/images/generations", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "allowed: 0 to 1" in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"", 400, "missing_parameter"),
        (b"[]", 400, "invalid_value"),
        (b"null", 400, "invalid_value"),
        (b"\xff\xfe", 400, None),
        (rb'{"prompt": "\ud800"}', 400, "invalid_value"),
        (rb'{"prompt": "star", "mix": {"\ud800": 1}}', 400, "encoder_not_found"),
        (rb'{"prompt": "star", "\ud800": 1}', 400, "invalid_value"),
        (b"[" * 4000, 400, None),
        (b'{"prompt": "' + b"x" * 20_000 + b'"}', 413, "body_too_large"),
    ],
)
def test_bodies_that_are_no_requests(http: TestClient, content: bytes, status: int, code: str | None) -> None:
    headers = {"Content-Type": "application/json"}
    for sent in (content, iter([content])):  # with a length and, chunked, without
        answer = http.post("/v1/images/generations", content=sent, headers=headers)
        error = answer.json()["error"]
        assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert (
        code is None
        or http.post("/v1/images/generations", content=content, headers=headers).json()["error"]["code"] == code
    )


def test_unknown_models_paths_and_methods(http: TestClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "nonsense"):
        sent = http.post("/v1/images/generations", content=b'{"prompt": "star"}', headers={"Content-Type": kind})
        assert sent.status_code == 400 and sent.json()["error"]["type"] == "invalid_request_error", kind
    wrong = http.post("/v1/images/generations", json={"prompt": PROMPT, "model": "dall-e-3"})
    assert wrong.status_code == 404 and wrong.json()["error"]["message"] == "no model 'dall-e-3'; there is: tiny"
    assert http.get("/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found"
    assert http.get("/v1/images/generations").status_code in (404, 405)
    assert "422" not in http.get("/openapi.json").text


def test_only_token_holders_come_in_and_each_has_its_rate(http: TestClient) -> None:
    for header in (
        "",
        "Bearer",
        "Bearer wrong",
        "Basic alice-secret",
        f"Bearer {hashlib.sha256(b'alice-secret').hexdigest()}",
    ):
        answer = http.get("/v1/encoders", headers={"Authorization": header})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    for name, spent in (("poor", "1 requests"), ("slow", "1e-06 seconds of work")):
        token, body = {"Authorization": f"Bearer {name}-secret"}, {"prompt": PROMPT, "steps": 1}
        first, second = (http.post("/v1/images/generations", json=body, headers=token) for _ in range(2))
        error = second.json()["error"]
        assert (first.status_code, second.status_code, error["code"]) == (200, 429, "rate_limit_exceeded")
        assert f"your limit of {spent} a minute is spent" in error["message"] and int(second.headers["Retry-After"]) > 0


def test_a_deadline_that_cannot_be_met_is_refused_at_once(http: TestClient) -> None:
    body = {"prompt": PROMPT, "steps": 500}
    answer = http.post("/v1/images/generations", json=body, headers={"X-Deadline-Ms": "1"})
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "deadline"
    assert int(answer.headers["Retry-After"]) >= 1
    assert http.post("/v1/images/generations", json=body, headers={"X-Deadline-Ms": "soon"}).status_code == 400


def test_jobs_are_cancelled_by_their_owner(http: TestClient, served: Service) -> None:
    answers = []

    def wait_for_it() -> None:
        headers = {"X-Job-Id": "mine"}
        answers.append(http.post("/v1/images/generations", json={"prompt": PROMPT, "steps": 500}, headers=headers))

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    wait_for(lambda: served.engine.load().running > 0)
    assert http.delete("/v1/jobs/mine", headers={"Authorization": "Bearer bob-secret"}).status_code == 404
    again = http.post("/v1/images/generations", json={"prompt": PROMPT}, headers={"X-Job-Id": "mine"})
    assert again.status_code == 409
    assert http.delete("/v1/jobs/mine").json()["cancelled_images"] == 1
    thread.join()
    assert answers[0].status_code == 499 and answers[0].json()["error"]["code"] == "cancelled"
    assert http.delete("/v1/jobs/mine").status_code == 404
    for name in ("a b", "x" * 65, "../x"):
        bad = http.post("/v1/images/generations", json={"prompt": PROMPT}, headers={"X-Job-Id": name})
        assert bad.status_code == 400 and bad.json()["error"]["param"] == "X-Job-Id"


def test_who_hangs_up_frees_the_engine(url: str, served: Service) -> None:
    import httpx

    for stream in (False, True):
        with httpx.Client(base_url=url, headers=ALICE) as client:
            body = {
                "prompt": PROMPT,
                "steps": 500,
                "n": 4,
                "stream": stream,
                **({"partial_images": 3} if stream else {}),
            }
            with (
                pytest.raises(httpx.ReadTimeout),
                client.stream("POST", "/v1/images/generations", json=body, timeout=0.3) as s,
            ):
                for _ in s.iter_bytes():
                    time.sleep(0)
        wait_for(lambda: served.engine.load() == Load(waiting=0, running=0), seconds=60)


def test_what_operators_read(http: TestClient) -> None:
    ask(http)
    assert http.get("/healthz", headers={"Authorization": ""}).json() == {"alive": True}
    ready = http.get("/readyz").json()
    assert ready["ready"] and not ready["degraded"] and set(ready["encoders"]) == {"tuned1", "tuned2"}
    text = http.get("/metrics").text
    for metric in ("queue_wait_seconds_bucket", "step_seconds_sum", "slots_used_total", "prompt_cache_total"):
        assert f"craftor_{metric}" in text
    assert 'craftor_http_requests_total{route="/v1/images/generations",status="200"}' in text
    assert 'craftor_batch_stops_total{reason="nothing_waiting"}' in text
    encoders = http.get("/v1/encoders").json()["data"]
    assert [e["id"] for e in encoders] == ["tuned1", "tuned2"] and encoders[0]["window"] == {"from": 499, "to": 0}
    assert "clip" in encoders[0]["rewards"]


def test_what_goes_wrong_is_counted_by_its_status(
    http: TestClient, served: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(route: str, status: str) -> float:
        labels = {"route": route, "status": status}
        return served.metrics.registry.get_sample_value("craftor_http_requests_total", labels) or 0.0

    before = [counted("/v1/models", "500"), counted("/v1/models", "none"), counted("other", "413")]
    monkeypatch.setattr(api, "model_entry", lambda _: {}["nothing"])
    assert http.get("/v1/models").status_code == 500
    assert http.post("/v1/images/generations", content=b"x" * 20_000).status_code == 413
    after = [counted("/v1/models", "500"), counted("/v1/models", "none"), counted("other", "413")]
    assert after == [before[0] + 1, before[1], before[2] + 1]


def test_pages_elsewhere_may_not_call_unless_they_are_named(http: TestClient, served: Service) -> None:
    elsewhere, friend = ({"Origin": f"https://{name}.example"} for name in ("elsewhere", "friend"))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = "access-control-allow-origin"
    assert allowed not in http.get("/v1/models", headers=elsewhere).headers
    assert http.options("/v1/images/generations", headers=elsewhere | asked).status_code == 405
    opened = served.settings.http.model_copy(update={"cors_origins": ("https://friend.example",)})
    settings = served.settings.model_copy(update={"http": opened})
    with TestClient(build_app(replace(served, settings=settings)), headers=ALICE) as open_to_one:
        path = "/v1/images/generations"
        assert open_to_one.options(path, headers=friend | asked).headers[allowed] == "https://friend.example"
        assert allowed not in open_to_one.options(path, headers=elsewhere | asked).headers
        refused = open_to_one.post(path, headers=friend | {"Authorization": ""}, json={"prompt": PROMPT})
        assert refused.status_code == 401 and allowed in refused.headers, "a page may read why"


def test_each_image_is_a_span_below_its_callers(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "TRACER", provider.get_tracer("test"))
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    body = {"prompt": PROMPT, "mix": {"tuned1": 0.5}, "steps": 3}
    headers = {"traceparent": f"00-{trace}-{parent}-01"}
    assert http.post("/v1/images/generations", json=body, headers=headers).status_code == 200
    found = {span.name: span for span in exporter.get_finished_spans()}
    image = found.pop("craftor.image")
    assert f"{image.context.trace_id:032x}" == trace and f"{image.parent.span_id:016x}" == parent
    assert image.attributes["craftor.weights"] == (0.5,) and image.attributes["craftor.steps"] == 3
    queue, denoise, decode = (found.pop(f"craftor.{name}") for name in ("queue", "denoise", "decode"))
    assert not found and all(span.parent.span_id == image.context.span_id for span in (queue, denoise, decode))
    moments = [image.start_time, queue.end_time, denoise.end_time, decode.end_time]
    assert moments == sorted(moments) and queue.start_time == image.start_time and decode.end_time == image.end_time


def test_hints_come_from_token_holders_and_from_mlflow(
    served: Service, http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    hints: list[str] = []
    monkeypatch.setattr(served.watcher, "hint", lambda: hints.append("here"))
    monkeypatch.setenv(webhook.SECRET, "shared")

    def sent(secret: str = "shared", age: int = 0, **headers: str | bytes) -> int:
        body, at = '{"entity": "model_version_alias"}', str(int(time.time()) - age)
        signature = delivery._generate_hmac_signature(secret, "d1", at, body)
        signed = {"X-MLflow-Delivery-Id": "d1", "X-MLflow-Timestamp": at, "X-MLflow-Signature": signature}
        own = {"Authorization": "", **signed, **headers}
        return http.post("/v1/encoders/refresh", content=body, headers=own).status_code

    assert sent() == 202 and hints == ["here"]
    assert [sent("another"), sent(age=3600), sent(**{"X-MLflow-Timestamp": "9" * 5000})] == [401] * 3
    assert sent(**{"X-MLflow-Signature": b"v1,\xe9"}) == 401
    monkeypatch.delenv(webhook.SECRET)
    assert sent() == 401 and sent("") == 401
    assert http.post("/v1/encoders/refresh").status_code == 202 and hints == ["here"] * 2


def test_what_concerns_all_replicas_reaches_them(served: Service) -> None:
    told: list[tuple[str, ...]] = []

    async def cancel(job: str, client: str) -> int:
        told.append(("cancel", job, client))
        return 3 if job == "there" else NOT_HERE

    async def look() -> None:
        told.append(("look",))

    async def metrics() -> dict[str, bytes]:
        return {"one": served.metrics.text(), "two": Metrics().text()}

    with TestClient(build_app(served, Everywhere(cancel, look, metrics)), headers=ALICE) as http:
        text = http.get("/metrics").text
        assert text.count("# TYPE craftor_slots_total counter") == 1
        assert 'craftor_slots_total{replica="two"} 0.0' in text
        assert text.count('craftor_step_seconds_bucket{le="+Inf"') == 2
        assert http.delete("/v1/jobs/there").json()["cancelled_images"] == 3
        assert http.delete("/v1/jobs/nowhere").status_code == 404
        assert http.post("/v1/encoders/refresh").status_code == 202
    assert told == [("cancel", "there", "alice"), ("cancel", "nowhere", "alice"), ("look",)]


def test_a_stream_that_nobody_reads_gives_its_job_up() -> None:
    seen: list[str] = []

    @contextmanager
    def job() -> Iterator[None]:
        seen.append("entered")
        try:
            yield
        finally:
            seen.append("left")

    async def parts() -> AsyncGenerator[bytes, None]:
        for part in (b"a", b"b"):
            yield part

    async def unread() -> None:
        stream = await begin(parts(), job())
        assert seen == ["entered"]
        del stream
        for _ in range(5):
            await asyncio.sleep(0)

    async def read() -> list[bytes]:
        return [part async for part in await begin(parts(), job())]

    asyncio.run(unread())
    assert seen == ["entered", "left"]
    assert asyncio.run(read()) == [b"a", b"b"] and seen == ["entered", "left"] * 2


def test_a_promotion_in_the_registry_reaches_the_endpoint(
    tiny: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions, aliases and held-out scores are listed as in MLflow; a hint is enough for an alias that has moved."""
    monkeypatch.setenv("CRAFTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    connected, recipe = new_store(tmp_path / "runs"), recipe_for(tiny_recipe)
    for seed, aliases in ((1, ["champion"]), (2, ["candidate"])):
        registered = register(connected, make_bundle(recipe, tmp_path / str(seed), seed), "style", *aliases)
        registry.score(connected, registered, METRICS)
    given = {
        "model": {"path": str(tiny / "pipeline")},
        "encoders": {"style": "style@champion"},
        "canaries": {"style": {"source": "style@candidate", "share": 0.5}},
        "runs": str(tmp_path / "runs"),
        "engine": {"bucket": 2},
        "registered": "champion",
        "poll_seconds": 3600.0,
    }
    with service(Serving.model_validate(given)) as one, TestClient(build_app(one)) as http:

        def listed() -> dict[str, dict]:
            return {entry["id"]: entry for entry in http.get("/v1/encoders").json()["data"]}

        before = listed()
        assert {name: (e["version"], e["aliases"]) for name, e in before.items()} == {
            "style": ("1", ["champion"]),
            "style#canary": ("2", ["candidate"]),
        }
        assert before["style"]["scores"]["quality"]["delta"] == 0.5 and before["style"]["run_id"]
        drawn = {
            user: ask(http, mix={"style": 1.0}, steps=2, user=user)["data"][0]["provenance"]["mixture"][0]["version"]
            for user in map(str, range(12))
        }
        assert set(drawn.values()) == {"1", "2"}, "a canary for some of the callers"
        again = ask(http, mix={"style": 1.0}, steps=2, user="0")["data"][0]["provenance"]["mixture"][0]["version"]
        assert again == drawn["0"]
        connected.set_registered_model_alias("style", "champion", "2")
        assert http.post("/v1/encoders/refresh").status_code == 202
        wait_for(lambda: listed()["style"]["version"] == "2")
        assert listed()["style"]["aliases"] == ["candidate", "champion"]

        register(connected, make_bundle(recipe, tmp_path / "3", 3), "fresh", "champion")
        register(connected, make_bundle(recipe, tmp_path / "4", 4), "unready")
        http.post("/v1/encoders/refresh")
        wait_for(lambda: "fresh" in listed())
        assert {"style", "style#canary", "fresh"} == set(listed()) and listed()["fresh"]["source"] == "fresh@champion"
        assert ask(http, mix={"fresh": 0.5, "style": 0.5}, steps=2)["data"]
