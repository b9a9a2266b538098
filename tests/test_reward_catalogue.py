"""Public weights: found, fetched, hashed; rewards of the user's own; the golden self-test; `craftor rewards`."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from conftest import save_tiny_clip
from craftor.commands.rewards import MICRO, app
from craftor_rewards import CATALOGUE, REWARDS, ClipScore, build, catalogue, declaration, probes
from craftor_rewards import clip as clip_module
from craftor_rewards.loading import find, is_here, verify
from craftor_rewards.preprocess import preprocess

PUBLIC = [name for name, entry in CATALOGUE.items() if entry.kind != "tokenizer"]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub's and of torch's."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(cache: Path, repo: str, revision: str) -> Path:
    """Lay a folder out as the hub's cache does; returns the snapshot to put files into."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    return snapshot


def test_the_catalogue_names_kinds_and_hashes_that_exist():
    for name, entry in CATALOGUE.items():
        assert set(entry.needs) <= set(CATALOGUE), name
        assert entry.sha256 is None or (len(entry.sha256) == 64 and int(entry.sha256, 16) >= 0), name
        assert entry.revision is None or len(entry.revision) == 40, name
        assert entry.licence and entry.gigabytes > 0, name
    for kind in ("clip_score", "aesthetic", "pick_score", "hps"):
        assert any(entry.kind == kind for entry in CATALOGUE.values())


@pytest.mark.parametrize("name", PUBLIC)
def test_missing_weights_are_one_error_with_the_command_that_fetches_them(name, hub_cache):
    entry = CATALOGUE[name]
    assert not is_here(name)
    for weights in (name, entry.repo):
        if [e.repo for e in CATALOGUE.values()].count(weights) > 1 and entry.file.endswith(".pt"):
            with pytest.raises(
                ValueError, match="'xswu/HPSv2' holds several weights; name one of them: hps-v2, hps-v2.1"
            ):
                find(weights)
            continue
        with pytest.raises(FileNotFoundError) as raised:
            find(weights)
        message = str(raised.value)
        assert entry.repo in message and f"{entry.gigabytes} GB" in message and "HF_HUB_OFFLINE" in message
        assert f"craftor rewards fetch {name}" in message


def test_unknown_weights_and_repositories(hub_cache):
    with pytest.raises(
        FileNotFoundError, match="no weights at 'runs/none/here': neither a folder.*hf download OWNER/NAME"
    ):
        find("runs/none/here")
    with pytest.raises(FileNotFoundError, match="`hf download some/clip` fetches"):
        build("clip_score", "some/clip")


def test_a_repository_in_the_cache_loads_offline(hub_cache):
    snapshot = put_in_cache(hub_cache, "some/clip", "a" * 40)
    save_tiny_clip(snapshot, seed=1)
    assert find("some/clip") == snapshot
    assert build("clip_score", "some/clip").input_size == 32
    # An older repository: a pickled checkpoint, read without running anything in it.
    older = put_in_cache(hub_cache, "some/older", "b" * 40)
    save_tiny_clip(older, seed=1)
    torch.save(build("clip_score", snapshot).towers.clip.state_dict(), older / "pytorch_model.bin")
    (older / "model.safetensors").unlink()
    images, prompts = torch.rand(2, 3, 40, 40), ["a red circle", "a blue star"]
    new, old = (build("clip_score", repo)(images, prompts) for repo in ("some/clip", "some/older"))
    torch.testing.assert_close(new, old)


def test_a_file_of_the_catalogue_must_have_its_hash_and_keep_it(hub_cache, monkeypatch):
    entry = catalogue.Weights("pick_score", "some/pick", "model.safetensors", 0.1, "MIT", revision="c" * 40)
    monkeypatch.setitem(CATALOGUE, "pick", entry)
    snapshot = put_in_cache(hub_cache, "some/pick", "c" * 40)
    assert not is_here("pick")
    save_tiny_clip(snapshot, seed=1)
    assert is_here("pick") and find("pick") == snapshot
    record = json.loads((snapshot / "model.safetensors.sha256.json").read_text())
    data = (snapshot / "model.safetensors").read_bytes()
    assert record["sha256"] == hashlib.sha256(data).hexdigest() and record["num_bytes"] == len(data)
    (snapshot / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(snapshot / "model.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match="has SHA-256 .*; expected .*remove the file and fetch it again"):
        build("pick_score", "pick")
    (snapshot / "model.safetensors").write_bytes(data)
    find("pick")
    monkeypatch.setitem(CATALOGUE, "pick", catalogue.Weights(**{**entry.__dict__, "sha256": "0" * 64}))
    with pytest.raises(ValueError, match=f"expected {'0' * 64}"):
        find("pick")


def test_an_unchanged_file_is_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"weights")
    seen = verify(path, None)
    monkeypatch.setattr("craftor_rewards.loading.sha256", lambda _: pytest.fail("hashed again"))
    assert verify(path, seen) == seen


def test_a_file_of_an_address_is_fetched_once_and_checked(hub_cache, tmp_path, monkeypatch):
    source = tmp_path / "head.pth"
    torch.save({"weight": torch.ones(1, 8), "bias": torch.zeros(1)}, source)
    right = hashlib.sha256(source.read_bytes()).hexdigest()
    for name, sha256 in {"head": right, "other": "0" * 64}.items():
        entry = catalogue.Weights("aesthetic", source.as_uri(), f"{name}.pth", 0.1, "MIT", sha256=sha256, beside=())
        monkeypatch.setitem(CATALOGUE, name, entry)
    with pytest.raises(FileNotFoundError, match="no weights of 'head'"):
        find("head")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(RuntimeError, match="invalid hash value"):
        find("other")
    assert find("head") == tmp_path / "torch" / "checkpoints" / "head.pth" and is_here("head") and not is_here("other")
    source.unlink()
    reward = build("aesthetic", "head", clip=save_tiny_clip(tmp_path / "clip", seed=1))
    assert reward(torch.rand(2, 3, 32, 32), ["", ""]).shape == (2,)


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The four requests of a download from the hub, served from the class's `files`."""

    files: dict[str, bytes] = {}

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        headers = {"X-Repo-Commit": "d" * 40}
        if path.startswith("/api/models/owner/name/tree/"):
            rows = [{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in self.files.items()]
            data = json.dumps(rows).encode()
        elif path.startswith("/api/models/owner/name/"):
            rows = [{"rfilename": name} for name in self.files]
            data = json.dumps({"id": "owner/name", "sha": "d" * 40, "siblings": rows}).encode()
        elif path.rpartition("/")[2] in self.files and path.startswith("/owner/name/resolve/"):
            data = self.files[path.rpartition("/")[2]]
            headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        else:
            data, headers = b"", {"X-Error-Code": "RepoNotFound"}
        self.send_response(404 if "X-Error-Code" in headers else 200)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


FETCH = """
import sys
from huggingface_hub import constants
from typer.testing import CliRunner
from craftor.commands.rewards import app
from craftor_rewards import CATALOGUE
from craftor_rewards.catalogue import Weights

for name, sha256 in {"right": sys.argv[1], "wrong": "0" * 64}.items():
    CATALOGUE[name] = Weights("clip_score", "owner/name", "model.safetensors", 0.1, "MIT", "d" * 40, sha256)
for name, offline in (("right", True), ("wrong", False), ("right", False), ("right", True)):
    constants.HF_HUB_OFFLINE = offline
    result = CliRunner().invoke(app, ["fetch", name])
    print(result.exit_code, result.output.splitlines()[-1])
"""


def test_fetch_downloads_from_the_hub_and_checks_the_hash(tmp_path):
    """In a process of its own: the hub's address is read when its client is imported."""
    folder = save_tiny_clip(tmp_path / "clip", seed=1)
    FakeHub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    right = hashlib.sha256(FakeHub.files["model.safetensors"]).hexdigest()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", FETCH, right]
        done = subprocess.run(command, env={**os.environ, **hub}, capture_output=True, text=True, check=False)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    offline, wrong, good, cached = done.stdout.splitlines()
    assert offline.startswith("2 error: no weights of 'right' on this machine (owner/name, model.safetensors, 0.1 GB")
    assert wrong.startswith("2 error: ") and f"expected {'0' * 64}" in wrong
    assert good.startswith("0 ") and cached == good, "what is in the cache needs no network"
    snapshot = Path(good.removeprefix("0 "))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in snapshot.iterdir()}


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    """A module of the user's own on Python's path."""
    (tmp_path / "own_rewards.py").write_text(
        "import torch\n"
        "class Redness:\n"
        "    differentiable, needs_prompt = True, False\n"
        "    def __init__(self, weights): self.weights = weights\n"
        "    def __call__(self, images, prompts): return images[:, 0].mean((1, 2))\n"
        "class Module(torch.nn.Module):\n"
        "    differentiable, needs_prompt = True, True\n"
        "    def __init__(self, weights, factor=1.0): super().__init__(); self.factor = factor\n"
        "    def forward(self, images, prompts): return self.factor * images.mean((1, 2, 3))\n"
        "class Silent:\n"
        "    def __init__(self, weights): pass\n"
        "class OneArgument:\n"
        "    differentiable = needs_prompt = False\n"
        "    def __init__(self, weights): pass\n"
        "    def __call__(self, images): return images.mean()\n"
        "class Mean(Redness):\n"
        "    def __call__(self, images, prompts): return images.mean()\n"
        "some_number = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import no_such_module_of_theirs\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_class_of_the_users_own_is_a_reward(own_rewards):
    reward = build("own_rewards:Redness", "anything")
    assert reward(torch.full((2, 3, 4, 4), 0.25), ["a", "b"]).tolist() == [0.25, 0.25]
    assert declaration(reward).fit == "none" and declaration(reward).input_size is None
    assert build("own_rewards:Module", "", factor=2.0)(torch.ones(1, 3, 4, 4), ["a"]).item() == 2.0


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no_such_module:Reward", "no module 'no_such_module' in this Python's path"),
        ("own_rewards:Blueness", "has no class or function 'Blueness'; it has: Redness, Module, Silent"),
        ("own_rewards:some_number", "has no class or function 'some_number'"),
        ("own_rewards:Silent", r"'own_rewards:Silent' \(Silent\) lacks differentiable = True or False; needs_prompt ="),
        ("own_rewards:OneArgument", r"lacks a call with \(images, prompts\); it has \(images\)"),
    ],
)
def test_what_is_no_reward_is_refused(own_rewards, kind, message):
    with pytest.raises(ValueError, match=message):
        build(kind, "")


def test_an_import_error_inside_the_users_module_stays_what_it_is(own_rewards):
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_theirs"):
        build("broken_rewards:Reward", "")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_list_shows_every_kind_and_every_public_weight():
    code, output = run("list")
    assert code == 0
    for word in (*REWARDS, *(name for name in PUBLIC if CATALOGUE[name].kind in REWARDS), *MICRO, "letterbox", "MIT"):
        assert word in output, word


def test_the_shipped_rewards_say_what_was_recorded():
    """The golden self-test of this very environment."""
    code, output = run("check", *MICRO)
    assert code == 0, output
    assert output.count("8 values as recorded") == len(MICRO)


def without_antialias(images, size, **options):
    return preprocess(torch.nn.functional.interpolate(images, size=(size, size), mode="bicubic"), size, **options)


DAMAGES = {
    "average pooling": lambda images, size, **options: preprocess(
        images, size, **{**options, "resize": "average_pool"}
    ),
    "no antialiasing": without_antialias,
    "no mean, no std": lambda images, size, **options: preprocess(images, size, mean=(0, 0, 0), std=(1, 1, 1)),
    "a clamp that kills gradient": lambda images, size, **options: preprocess(images, size, clamp="hard"),
    "another crop": lambda images, size, **options: preprocess(images, size, fit="crop_torchvision"),
    "[-1, 1]": lambda images, size, **options: preprocess(images * 2 - 1, size, **options),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_preprocessing_fails_the_check(damage, monkeypatch):
    monkeypatch.setattr(clip_module, "preprocess", DAMAGES[damage])
    code, output = run("check", "micro:reward_clip")
    assert code == 1 and "differs" in output and "weights are the recorded ones" in output, output
    assert "not as recorded: micro:reward_clip; do not train" in output


def test_half_precision_another_tokenizer_or_no_gradient_fail_the_check(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(REWARDS, "clip_score", partial(ClipScore, dtype=torch.bfloat16))
        assert run("check", "micro:reward_clip")[0] == 1
    with monkeypatch.context() as patch:
        encode = clip_module.ClipTowers._encode
        patch.setattr(clip_module.ClipTowers, "_encode", lambda self, prompts: encode(self, [p[2:] for p in prompts]))
        assert run("check", "micro:reward_clip")[0] == 1
    with monkeypatch.context() as patch:
        patch.setattr(clip_module, "preprocess", lambda images, size, **options: preprocess(images, size).detach())
        code, output = run("check", "micro:reward_clip")
        assert code == 1 and "says it is differentiable, but its score has no gradient" in output
    assert run("check", "micro:reward_clip")[0] == 0


def test_record_then_check_any_weights(tmp_path):
    folder, golden = save_tiny_clip(tmp_path / "clip", seed=1), str(tmp_path / "golden.json")
    name = f"pick_score={folder}"
    code, output = run("check", name, "--golden", golden)
    assert code == 1 and "no recorded values" in output
    assert run("check", name, "--golden", golden, "--record")[0] == 0
    assert run("check", name, "--golden", golden)[0] == 0
    save_tiny_clip(folder, seed=2)
    code, output = run("check", name, "--golden", golden)
    assert code == 1 and "weights ARE NOT the recorded ones" in output


def test_check_names_what_it_does_not_know_or_have(own_rewards, tmp_path, hub_cache):
    code, output = run("check", "clip-vit-z")
    assert code == 2 and "unknown weights 'clip-vit-z'; available: micro:reward_clip" in output
    code, output = run("check", "hps-v2.1")
    assert code == 1 and "craftor rewards fetch hps-v2.1" in output
    code, output = run("check", "own_rewards:Mean=none")
    assert code == 1 and "returned torch.float32 of shape (); expected floating point of shape (1,)" in output
    golden = str(tmp_path / "own.json")
    assert run("check", "own_rewards:Redness=none", "--golden", golden, "--record")[0] == 0
    assert run("check", "own_rewards:Redness=none", "--golden", golden)[0] == 0
    assert run("fetch", "nothing")[0] == 2


def test_probes_are_the_same_bits_everywhere():
    """Drawn in integers; this hash is of their bytes."""
    data = b"".join((image * 255).to(torch.uint8).numpy().tobytes() for image, _ in probes.probe_images().values())
    assert hashlib.sha256(data).hexdigest()[:16] == "515a0e0935547a61"
    for image, prompt in probes.probe_images().values():
        assert image.min() >= 0 and image.max() <= 1 and prompt
