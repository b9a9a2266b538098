"""`POST /v1/images/edits` as callers meet it: OpenAI's own client, what happens to files, and every mistake a 4xx."""

import base64
import hashlib
import io
import json
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import hypothesis
import numpy as np
import openai
import pytest
import schemathesis
from fastapi.testclient import TestClient
from PIL import Image, ImageOps

from craftor import registry
from craftor.diffuser import load
from craftor.recipe import Model
from craftor.serving.api import build_app
from craftor.serving.gate import Gate
from craftor.serving.service import Service, service
from craftor.serving.settings import Serving, Token
from craftor.serving.shelf import Shelf
from encoder_bundles import new_store
from serving_parts import listening, write_object_bundle, write_tuned_bundle

PROMPT = "a small red star"
PATH = "/v1/images/edits"


def packed(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def bars(size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Red on the left half, blue on the right."""
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 255), (size[0] // 2, 0, *size))
    return image


def left_half(size: tuple[int, int] = (40, 30)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def cut(size: tuple[int, int] = (40, 30)) -> Image.Image:
    image = bars(size).convert("RGBA")
    image.putalpha(left_half(size))
    return image


BARS = packed(bars())


@pytest.fixture(scope="module")
def settings(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Serving:
    folder = tmp_path_factory.mktemp("edited")
    base = load(Model(path=str(tiny / "pipeline")))
    return Serving.model_validate(
        {
            "name": "tiny",
            "model": {"path": str(tiny / "pipeline")},
            "object_encoder": str(write_object_bundle(tiny, folder)),
            "encoders": {"tuned1": str(write_tuned_bundle(tiny, base, folder, 1))},
            "runs": str(folder),
            "engine": {"bucket": 8, "queue_seconds": 60.0},
            "limits": {"images": 4, "references": 2, "picture_pixels": 5000, "edit_bytes": 3 << 20, "body_bytes": 4096},
            "defaults": {"steps": 3, "guidance_scale": 3.0},
        }
    )


@pytest.fixture(scope="module")
def served(settings: Serving) -> Iterator[Service]:
    with service(settings) as one:
        yield one


@pytest.fixture(scope="module")
def http(served: Service) -> Iterator[TestClient]:
    with TestClient(build_app(served), raise_server_exceptions=False) as client:
        yield client


def ask(
    http: TestClient,
    *images: bytes,
    mask: bytes | None = None,
    regions: Sequence[bytes] = (),
    others: Mapping[str, bytes] = MappingProxyType({}),
    **fields: object,
) -> dict:
    files = [("image", ("object", image)) for image in images or (BARS,)]
    files += [] if mask is None else [("mask", ("mask", mask))]
    files += [("region", ("region", region)) for region in regions]
    files += [(name, (name, file)) for name, file in others.items()]
    answer = http.post(PATH, files=files, data={"prompt": PROMPT, "seed": "1", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def pictures(answer: dict) -> list[bytes]:
    return [base64.b64decode(one["b64_json"]) for one in answer["data"]]


def pixels(answer: dict) -> list[bytes]:
    """Without what the PNGs say of themselves."""
    return [Image.open(io.BytesIO(data)).tobytes() for data in pictures(answer)]


def test_openais_client_works_unchanged(served: Service) -> None:
    with listening(served) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = client.images.edit(model="tiny", image=BARS, prompt=PROMPT, n=2, size="32x32", response_format="url")
        assert len({one.url for one in answer.data or []}) == 2
        file = ("toy.png", BARS, "image/png")
        own = {"seed": 3, "steps": 2, "mix": {"tuned1": {"weight": 0.5, "from": 999, "to": 0}}, "object_weight": 1.5}
        mixed = client.images.edit(image=[file, cut_file()], mask=packed(left_half()), prompt=PROMPT, extra_body=own)
        described = mixed.data[0].provenance
        assert described["mixture"][0]["weight"] == 0.5 and described["mixture"][0]["from"] == 999
        assert described["object"]["weight"] == 1.5 and len(described["object"]["images"]) == 2
        events = list(
            client.images.edit(image=BARS, prompt=PROMPT, stream=True, partial_images=1, extra_body={"seed": 1})
        )
        assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
        whole = client.images.edit(image=BARS, prompt=PROMPT, extra_body={"seed": 1})
        assert events[-1].b64_json == whole.data[0].b64_json, "streamed or not, the same bytes"
        with pytest.raises(openai.BadRequestError, match="image: not a picture of an allowed format"):
            client.images.edit(image=b"hello", prompt=PROMPT)


def cut_file() -> tuple[str, bytes, str]:
    return "other.webp", packed(cut(), "WEBP", lossless=True), "image/webp"


def test_a_picture_tells_which_object_it_shows_and_by_which_encoder(http: TestClient, served: Service) -> None:
    answer = ask(http, BARS, mask=packed(left_half()), object_from="1", mix='{"tuned1": 0.5}')
    (data,) = pictures(answer)
    inside = json.loads(Image.open(io.BytesIO(data)).text["craftor"])
    assert inside == answer["data"][0]["provenance"]
    assert inside["object"] == {
        "encoder": "pooled-objects",
        "version": None,
        "uri": served.settings.object_encoder,
        "sha256": registry.weights_sha256(Path(served.settings.object_encoder or "")),
        "run_id": None,
        "images": [
            {
                "sha256": hashlib.sha256(BARS).hexdigest(),
                "mask_sha256": hashlib.sha256(packed(left_half())).hexdigest(),
                "region_sha256": None,
            }
        ],
        "weight": 3.0,
        "steps": [1, 3],
    }
    assert inside["mixture"][0]["encoder"] == "tuned1" and inside["seed"] == 1


def test_no_object_is_the_other_endpoints_picture_and_an_object_another(http: TestClient) -> None:
    plain = http.post("/v1/images/generations", json={"prompt": PROMPT, "seed": 1}).json()
    assert pictures(ask(http, object_weight="0")) == pictures(plain)
    drawn = pictures(ask(http))
    assert drawn != pictures(plain) and drawn == pictures(ask(http, n="", size="", mix="", steps=""))
    assert drawn != pictures(ask(http, packed(bars().transpose(Image.Transpose.FLIP_LEFT_RIGHT))))
    swept = ask(http, sweep='[{}, {"tuned1": 1}]')
    assert pictures(swept)[0] == drawn[0] and len(set(pictures(swept))) == 2


def test_what_is_transparent_is_not_part_of_the_object(http: TestClient) -> None:
    """A picture's own transparency is its mask; a mask that is sent takes its place, opaque or white."""
    whole, by_alpha = pixels(ask(http)), pixels(ask(http, packed(cut())))
    assert whole != by_alpha
    assert by_alpha == pixels(ask(http, mask=packed(left_half()))) == pixels(ask(http, mask=packed(cut())))
    assert by_alpha == pixels(ask(http, mask=packed(left_half().convert("RGBA"))))
    assert whole == pixels(ask(http, packed(cut()), mask=packed(Image.new("L", (40, 30), 255))))


def test_regions_say_where_each_of_several_objects_may_be(http: TestClient) -> None:
    other = packed(bars().transpose(Image.Transpose.ROTATE_180))
    left, right = packed(left_half((64, 64))), packed(ImageOps.invert(left_half((64, 64))))
    everywhere = packed(Image.new("L", (8, 8), 255))
    placed = ask(http, BARS, other, regions=[left, right])
    assert pixels(placed) != pixels(ask(http, BARS, other))
    assert pixels(placed) == pixels(ask(http, other, BARS, regions=[right, left]))
    assert pixels(placed) != pixels(ask(http, BARS, other, regions=[right, left]))
    assert pixels(placed) == pixels(ask(http, BARS, other, regions=[packed(left_half((8, 20))), right])), "of any size"
    found = placed["data"][0]["provenance"]["object"]["images"]
    assert [one["region_sha256"] for one in found] == [hashlib.sha256(one).hexdigest() for one in (left, right)]
    whole = np.frombuffer(pixels(ask(http))[0], dtype=np.uint8).astype(int)
    same = np.frombuffer(pixels(ask(http, regions=[everywhere]))[0], dtype=np.uint8)
    assert abs(whole - same).max() <= 1, "a region of everywhere is none"


def test_an_object_comes_into_a_scene_where_its_mask_says(http: TestClient) -> None:
    scene, hole = packed(bars((32, 32))), packed(left_half((32, 32)))
    files, how = {"scene": scene, "scene_mask": hole}, {"strength": "0.7"}
    drawn = ask(http, others=files, **how)
    assert drawn["data"][0]["provenance"]["image"] == {
        "sha256": hashlib.sha256(scene).hexdigest(),
        "mask_sha256": hashlib.sha256(hole).hexdigest(),
        "strength": 0.7,
        "steps": [1, 3],
    }
    spelled = {"image": base64.b64encode(scene).decode(), "mask": base64.b64encode(hole).decode(), "strength": 0.7}
    plain = http.post("/v1/images/generations", json={"prompt": PROMPT, "seed": 1, **spelled}).json()
    assert pictures(ask(http, others=files, object_weight="0", **how)) == pictures(plain)
    different = np.frombuffer(pixels(drawn)[0], dtype=np.uint8) != np.frombuffer(pixels(plain)[0], dtype=np.uint8)
    assert different.reshape(32, 32, 3)[:, :12].any(), "the object is drawn in the hole"
    assert pictures(drawn) != pictures(ask(http, others={"scene": scene}, **how))


def test_a_camera_s_rotation_and_inks_are_what_they_mean(http: TestClient) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = packed(bars((32, 32)), "PNG", exif=exif)
    assert pixels(ask(http, lying)) == pixels(ask(http, packed(bars((32, 32)).rotate(-90))))
    assert pixels(ask(http, lying)) != pixels(ask(http, packed(bars((32, 32)))))
    inks = packed(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=100)
    light = packed(Image.open(io.BytesIO(inks)).convert("RGB"))
    assert pixels(ask(http, inks)) == pixels(ask(http, light))


def test_nothing_that_is_uploaded_comes_to_lie_on_a_disk(
    http: TestClient, served: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", None)
    before = sorted(Path(served.settings.runs).rglob("*"))
    large = BARS + b"\0" * (2 << 20)
    assert (
        ask(http, large)["data"][0]["provenance"]["object"]["images"][0]["sha256"] == hashlib.sha256(large).hexdigest()
    )
    assert sorted(Path(served.settings.runs).rglob("*")) == before


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims so many pixels."""
    data = bytearray(packed(Image.new("L", (1, 1))))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


MOVING = packed(bars(), "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30))])


@pytest.mark.parametrize(
    ("images", "mask", "param", "message"),
    [
        ([claiming(60_000, 60_000)], None, "image", "far more pixels than the 5000 allowed"),
        ([packed(Image.new("L", (100, 100)))], None, "image", "100x100 pixels; allowed: at most 5000 in all"),
        ([packed(Image.effect_noise((60, 60), 80))[:900]], None, "image", "broken or cut short"),
        ([MOVING], None, "image", "2 frames; allowed: a picture that does not move"),
        ([packed(bars(), "GIF")], None, "image", "allowed format (PNG, JPEG, WEBP)"),
        ([b""], None, "image", "not a picture"),
        ([packed(Image.new("I;16", (4, 4)))], None, "image", "allowed: 8 bits a channel"),
        ([BARS, b"x"], None, "image.1", "not a picture"),
        ([BARS] * 3, None, "image", "3 pictures of the object, allowed: up to 2"),
        ([packed(Image.new("RGBA", (40, 30)))], None, "image", "transparent everywhere: there is no object in 40x30"),
        ([BARS], packed(left_half((30, 40))), "mask", "30x40 pixels, image has 40x30; allowed: the same size"),
        (
            [BARS],
            packed(Image.new("L", (40, 30))),
            "mask",
            "empty, black or transparent everywhere: there is no object",
        ),
        ([BARS], b"x", "mask", "not a picture"),
    ],
)
def test_bad_files_are_named(
    http: TestClient, images: list[bytes], mask: bytes | None, param: str, message: str
) -> None:
    files = [("image", ("x", image)) for image in images] + ([] if mask is None else [("mask", ("m", mask))])
    answer = http.post(PATH, files=files, data={"prompt": PROMPT})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and message in error["message"], answer.text


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "is empty"),
        ({"prompt": None}, "prompt", "missing parameter: prompt"),
        ({"n": "many"}, "n", "valid integer"),
        ({"n": "5"}, "n", "5 images of one request, allowed: up to 4"),
        ({"size": "1x1"}, "size", "'1x1' is not offered"),
        ({"mix": "{"}, "mix", "not valid JSON"),
        ({"mix": "[" * 5000}, "mix", "not valid JSON"),
        ({"mix": "[1]"}, "mix", "valid dictionary"),
        ({"mix": '{"none": 1}'}, "mix.none", "no encoder 'none' is served here; there are: tuned1"),
        ({"mix": '{"tuned1": NaN}'}, "mix", "allowed: 0 to 1"),
        ({"mix[tuned1]": "2"}, "mix", "allowed: 0 to 1"),
        ({"mix[tuned1]": "0.5", "mix": '{"tuned1": 0.5}'}, "mix", "given twice"),
        ({"seed": ["1", "2"]}, "seed", "given twice"),
        ({"object_weight": "-1"}, "object_weight", "greater than or equal to 0"),
        ({"object_weight": "31"}, "object_weight", "31, allowed: up to 30"),
        ({"object_weight": "nan"}, "object_weight", "finite number"),
        ({"object_from": "3"}, "object_from", "3, allowed: up to 2"),
        ({"strength": "0.5"}, "strength", "goes with scene"),
        ({"control_scale": "1"}, "control_scale", "goes with control_image"),
        ({"scene": "text"}, "scene", "text, allowed: a file"),
        ({"input_fidelity": "high"}, "input_fidelity", "not supported"),
        ({"image": "text"}, "image", "text, allowed: a file"),
        ({"partial_images": "2"}, "partial_images", "goes with stream"),
    ],
)
def test_mistakes_are_400_and_say_what_is_allowed(http: TestClient, fields: dict, param: str, message: str) -> None:
    data = {name: value for name, value in {"prompt": PROMPT, **fields}.items() if value is not None}
    answer = http.post(PATH, files={"image": ("x.png", BARS)}, data=data)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text
    assert error["param"] == param and message in error["message"], error


def test_what_is_no_form_with_an_object(http: TestClient) -> None:
    for kind, content, message in (
        ("application/json", b'{"prompt": "star"}', "Content-Type: application/json, allowed: multipart/form-data"),
        ("multipart/form-data", b"", "Missing boundary"),
        ("multipart/form-data; boundary=x", b"nonsense", "not a valid form"),
        ("multipart/form-data; boundary=x", b"--x--\r\n", "missing parameter"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--", "name"),
        (
            "multipart/form-data; boundary=x; charset=idna",
            b'--x\r\nContent-Disposition: form-data; name="..a"\r\n\r\n..\r\n--x--\r\n',
            "",
        ),
    ):
        answer = http.post(PATH, content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text
    black = packed(Image.new("L", (8, 8)))
    for files, message in (
        ([("image", ("x", BARS)), ("region", ("r", BARS)), ("region", ("r", BARS))], "region: 2 for 1 images, allowed"),
        ([("image", ("x", BARS)), ("region", ("r", black))], "region: black everywhere"),
        ([*[("image", ("x", BARS))] * 2, *[("region[]", ("r", b"x"))] * 2], "region.0: not a picture"),
        ([("image", ("x", BARS)), ("other", ("y", b"y"))], "other: not supported here"),
        ([("image", ("x", BARS)), ("seed", ("y", b"1"))], "seed: a file, allowed: text"),
        ([("image", ("x", BARS)), *[("mask", ("m", BARS))] * 2], "mask: 2 files, allowed: one"),
        ([("image", ("x", BARS)), ("scene", ("s", BARS))], "scene: 40x30 pixels, allowed: 32x32, the size asked for"),
        ([("image", ("x", BARS)), ("scene_mask", ("s", BARS))], "scene_mask: goes with scene"),
        ([("image", ("x", BARS)), ("control_image", ("c", BARS))], "control_image: this server has no ControlNet"),
        ([("image", ("x", BARS))] * 65, "Too many files"),
        ([("mask", ("x", BARS))], "missing parameter: image"),
    ):
        answer = http.post(PATH, files=files, data={"prompt": PROMPT})
        assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text
    large = http.post(PATH, files={"image": ("x", b"\0" * (4 << 20))}, data={"prompt": PROMPT})
    assert large.status_code == 413 and "over 3145728 bytes" in large.json()["error"]["message"]


def test_work_with_an_object_is_counted_and_let_in_as_any(http: TestClient, served: Service) -> None:
    late = {"X-Deadline-Ms": "1"}
    form: dict = {"files": {"image": ("x", BARS)}, "data": {"prompt": PROMPT, "steps": "90"}}
    refused = http.post(PATH, headers=late, **form)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "deadline"
    digest = hashlib.sha256(b"secret").hexdigest()
    gate = Gate({"alice": Token(sha256=digest, seconds_per_minute=1e-6)})
    with TestClient(build_app(replace(served, gate=gate))) as guarded:
        assert guarded.post(PATH, content=b"unread", headers={"Content-Type": "text/plain"}).status_code == 401
        alice = {"Authorization": "Bearer secret"}
        form["data"] = {"prompt": PROMPT, "steps": "1"}
        assert [guarded.post(PATH, headers=alice, **form).status_code for _ in range(2)] == [200, 429]
    text = http.get("/metrics").text
    assert 'craftor_object_encoder_info{encoder="pooled-objects"' in text
    assert 'craftor_references_total{outcome="read"}' in text
    assert f'craftor_http_requests_total{{route="{PATH}",status="429"}}' in text


def test_it_is_listed_and_documented(http: TestClient, served: Service) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    entry = model["object_encoder"]
    assert (entry["id"], entry["domain"], entry["tokens"]) == ("pooled-objects", "toys", "pooled")
    assert entry["sha256"] == served.object_encoder.sha256
    document = http.get("/openapi.json").json()
    content = document["paths"][PATH]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert content["schema"]["required"] == ["image", "prompt"]
    assert content["schema"]["properties"]["image"]["items"] == {"type": "string", "format": "binary"}
    assert {"mask", "region", "scene", "mix", "object_weight", "object_from"} <= content["schema"]["properties"].keys()
    assert "Portion" in document["components"]["schemas"]


def test_whatever_the_document_allows_is_answered(served: Service) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", build_app(served))

    @hypothesis.given(case=schema[PATH]["POST"].as_strategy())
    @hypothesis.settings(
        max_examples=40, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    def answered(case: schemathesis.Case) -> None:
        assert case.call().status_code < 500

    answered()


def test_without_an_object_encoder_it_says_how_to_have_one(served: Service) -> None:
    none: Shelf = Shelf(Path, {}, None)
    with TestClient(build_app(replace(served, objects=none))) as bare:
        answer = bare.post(PATH, files={"image": ("x", BARS)}, data={"prompt": PROMPT})
        error = answer.json()["error"]
        assert answer.status_code == 404 and error["code"] == "object_encoder_not_found"
        assert "object_encoder = 'FOLDER' or 'NAME@ALIAS'" in error["message"]


def test_it_is_served_by_its_name_in_the_registry(
    settings: Serving, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And followed there; it is no text encoder that is to be mixed, though it has the alias of those that are."""
    monkeypatch.setenv("CRAFTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    connected = new_store(tmp_path / "runs")
    registry.add(connected, Path(settings.object_encoder or ""), "toys", ["champion"])
    changed = {
        "object_encoder": "toys@champion",
        "registered": "champion",
        "encoders": {},
        "runs": str(tmp_path / "runs"),
    }
    with service(settings.model_copy(update=changed)) as one, TestClient(build_app(one)) as http:
        described = ask(http, steps="1")["data"][0]["provenance"]["object"]
        assert (described["uri"], described["version"]) == ("models:/toys/1", "1")
        assert http.get("/readyz").json()["problems"] == {} and http.get("/v1/encoders").json()["data"] == []

        registry.add(connected, write_tuned_bundle(tiny, load(one.settings.model), tmp_path, 1), "toys", ["champion"])
        one.objects.refresh()
        assert "a text encoder" in http.get("/readyz").json()["problems"]["object_encoder"]
        assert "craftor_encoder_problems 1.0" in http.get("/metrics").text
        before = pixels(ask(http, steps="1"))

        registry.add(connected, write_object_bundle(tiny, tmp_path / "new", unet={}), "toys", ["champion"])
        one.objects.refresh()
        assert http.get("/readyz").json()["problems"] == {}
        assert http.get("/v1/models").json()["data"][0]["object_encoder"]["version"] == "3"
        assert pixels(ask(http, steps="1")) != before
