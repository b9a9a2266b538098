"""Rewards without a model here: file sizes, and a scorer behind HTTP (a real server, in a thread)."""

import base64
import contextlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from craftor_rewards import http_scorer
from craftor_rewards.compressibility import Compressibility, encode
from craftor_rewards.http_scorer import HttpScorer
from craftor_rewards.protocol import Reward


def pictures():
    """Flat, smooth, noise: ever harder to compress."""
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    return torch.stack([torch.full((3, 64, 64), 0.5), ramp, noise])


@pytest.mark.parametrize("file_format", ["jpeg", "png"])
def test_scores_are_minus_the_size_in_kilobytes(file_format):
    images = pictures()
    scores = Compressibility(file_format)(images, ["", "", ""])
    sizes = []
    for image in images:
        file = io.BytesIO()
        picture = Image.fromarray((image * 255).round().permute(1, 2, 0).numpy().astype(np.uint8))
        picture.save(file, **({"format": "JPEG", "quality": 95} if file_format == "jpeg" else {"format": "PNG"}))
        sizes.append(file.tell() / 1000)
    assert sizes[0] < sizes[1] < sizes[2]
    torch.testing.assert_close(scores, -torch.tensor(sizes))
    torch.testing.assert_close(Compressibility(file_format, incompressible=True)(images, [""] * 3), -scores)
    torch.testing.assert_close(Compressibility(file_format)(images[2:], [""]), scores[2:])


def test_sizes_have_no_gradient_and_say_so():
    reward = Compressibility()
    assert isinstance(reward, Reward) and not reward.differentiable and not reward.needs_prompt
    assert not reward(pictures().requires_grad_(True), [""] * 3).requires_grad
    with pytest.raises(ValueError, match="unknown format 'webp'; available: jpeg, png"):
        Compressibility("webp")


def test_png_files_hold_the_images_in_8_bits():
    images = pictures()
    images[0, 0, 0, 0], images[0, 0, 0, 1] = -0.2, 1.3
    for image, file in zip(images, encode(images.bfloat16(), "png"), strict=True):
        decoded = torch.from_numpy(np.array(Image.open(io.BytesIO(file)))).permute(2, 0, 1) / 255
        assert (decoded - image.clamp(0, 1)).abs().max() < 0.5 / 255 + 1 / 256


class Scorer(BaseHTTPRequestHandler):
    """Mean brightness plus the length of the prompt; `server.replies` come first, one for each request."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append({"headers": dict(self.headers), "path": self.path, **request})
        status, headers, body = 200, {}, None
        if self.server.replies:
            status, headers, body = self.server.replies.pop(0)
        if body is None:
            images = [np.array(Image.open(io.BytesIO(base64.b64decode(text)))) for text in request["images"]]
            scores = [image.mean() / 255 + len(p) for image, p in zip(images, request["prompts"], strict=True)]
            body = json.dumps({"scores": scores}).encode()
        if body == b"silent":
            time.sleep(0.6)
        with contextlib.suppress(ConnectionError):  # the client may have given up
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            for part in [b" "] * 30 if body == b"trickling" else [body]:
                self.wfile.write(part)
                time.sleep(0.02 if body == b"trickling" else 0)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(http_scorer, "FIRST_WAIT", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
    server.seen, server.replies = [], []
    server.address = f"http://127.0.0.1:{server.server_port}/score"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


PROMPTS = ["a", "a cat", "the rest"]


def test_images_and_prompts_go_out_and_scores_come_back(server):
    scorer = HttpScorer(server.address)
    assert isinstance(scorer, Reward) and not scorer.differentiable
    images = pictures().requires_grad_(True)
    scores = scorer(images, PROMPTS)
    expected = images.mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in PROMPTS])
    torch.testing.assert_close(scores, expected.detach(), rtol=0, atol=2e-3)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scorer(images[1:2], PROMPTS[1:2])[0], scores[1])
    assert server.seen[0]["prompts"] == PROMPTS and len(server.seen) == 2
    with pytest.raises(ValueError, match="prompt 0 is ''"):
        scorer(images[:1], [""])
    assert HttpScorer(server.address, needs_prompt=False)(images[:1], [""]).shape == (1,)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failing_scorer_is_asked_again(server, status):
    server.replies = [(status, {}, b"busy")] * 2
    assert HttpScorer(server.address, num_retries=2)(pictures(), PROMPTS).shape == (3,)
    assert len(server.seen) == 3
    server.replies = [(status, {}, b"busy")] * 2
    with pytest.raises(ConnectionError, match=f"failed 2 times, last with status {status}"):
        HttpScorer(server.address, num_retries=1)(pictures(), PROMPTS)


def test_a_refusal_is_final(server):
    server.replies = [(404, {}, b"")]
    with pytest.raises(ConnectionError, match="refused: status 404"):
        HttpScorer(server.address)(pictures(), PROMPTS)
    server.replies = [(302, {"Location": server.address}, b"")]
    with pytest.raises(ConnectionError, match="refused: status 302"):
        HttpScorer(server.address)(pictures(), PROMPTS)
    assert len(server.seen) == 2, "neither repeated nor followed"


def test_lost_connections_and_timeouts_are_repeated(server):
    cut_short = (200, {"Content-Length": "500"}, b'{"scores": [1.0')
    server.replies = [cut_short, (200, {}, b"silent"), (200, {"Content-Length": "30"}, b"trickling")]
    assert HttpScorer(server.address, timeout=0.3)(pictures(), PROMPTS).shape == (3,)
    assert len(server.seen) == 4
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match="failed 2 times, last with .*refused"):
        HttpScorer(server.address, num_retries=1)(pictures(), PROMPTS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", "answered something that is not JSON: b'<html>'"),
        (b"[1, 2, 3]", 'expected {"scores"'),
        (b'{"scores": 3}', 'expected {"scores"'),
        (b'{"scores": [1, true, 3]}', 'expected {"scores"'),
        (b'{"scores": [1, 2]}', "answered 2 scores for 3 images"),
        (b'{"scores": [1, NaN, 3]}', r"NaN, infinity or .* for images \[1\]"),
        (b'{"scores": [1, 2, 1e99]}', r"for images \[2\]"),
        (b'{"scores": [1, 2, 1' + b"0" * 400 + b"]}", r"for images \[2\]"),
        (b" " * 1_000_001, "more than 1000000 bytes"),
    ],
    ids=["html", "list", "number", "boolean", "two", "nan", "above float32", "a googol to the fourth", "long"],
)
def test_answers_that_are_not_scores_are_refused(server, body, message):
    server.replies = [(200, {}, body)]
    with pytest.raises(ValueError, match=message):
        HttpScorer(server.address)(pictures(), PROMPTS)
    assert len(server.seen) == 1


def test_a_token_comes_from_the_environment_and_is_never_shown(server, monkeypatch):
    with pytest.raises(ValueError, match="'SCORER_TOKEN', the token for .*, is missing"):
        HttpScorer(server.address, token_env="SCORER_TOKEN")
    monkeypatch.setenv("SCORER_TOKEN", "s3cret\n")
    scorer = HttpScorer(f"{server.address}?key=hidden", token_env="SCORER_TOKEN")
    scorer(pictures(), PROMPTS)
    assert server.seen[0]["headers"]["Authorization"] == "Bearer s3cret"
    assert server.seen[0]["path"] == "/score?key=hidden"
    assert "s3cret" not in repr(vars(scorer))
    server.replies = [(403, {}, b"")]
    with pytest.raises(ConnectionError) as raised:
        scorer(pictures(), PROMPTS)
    assert "s3cret" not in str(raised.value) and "hidden" not in str(raised.value)
    monkeypatch.setenv("SCORER_TOKEN", "s3c\nret")
    with pytest.raises(ValueError, match="missing or unusable") as raised:
        scorer(pictures(), PROMPTS)
    assert "ret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "address 'file://'; expected http"),
        ("ftp://host/x", "address 'ftp://host'; expected http"),
        ("scorer:8000", "expected http"),
        ("https://", "expected http"),
        ("http://user:s3cret@host/", "'host' holds a user or password"),
        ("http://host/a b", "must be %-encoded"),
        ("http://host:port/", "[Pp]ort"),
    ],
)
def test_addresses_are_http_and_without_secrets(url, message):
    with pytest.raises(ValueError, match=message) as raised:
        HttpScorer(url)
    assert "s3cret" not in str(raised.value)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="timeout is 0; expected seconds above 0"):
        HttpScorer("http://host", timeout=0)
    with pytest.raises(ValueError, match="num_retries is -1"):
        HttpScorer("http://host", num_retries=-1)
