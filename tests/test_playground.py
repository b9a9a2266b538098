"""The playground in a real browser: type, slide, generate, see two different pictures, no error in the console."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from craftor.diffuser import load
from craftor.recipe import Model
from craftor.serving.service import service
from craftor.serving.settings import Serving
from serving_parts import listening, write_object_bundle, write_tuned_bundle

CHROMIUM = Path("/usr/bin/chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}")
PATIENCE = 300_000
"""Milliseconds that a page may take beside other lanes of tests."""


@pytest.fixture(scope="module")
def url(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("playground")
    base = load(Model(path=str(tiny / "pipeline")))
    settings = {
        "name": "tiny",
        "model": {"path": str(tiny / "pipeline")},
        "object_encoder": str(write_object_bundle(tiny, folder)),
        "encoders": {f"tuned{seed}": str(write_tuned_bundle(tiny, base, folder, seed)) for seed in (1, 2)},
        "runs": str(folder),
        "engine": {"bucket": 8, "queue_seconds": 60.0},
        "defaults": {"steps": 9, "guidance_scale": 3.0},
    }
    with service(Serving.model_validate(settings)) as one, listening(one) as address:
        yield address


def test_the_api_has_a_page_that_loads_nothing_from_elsewhere(url: str) -> None:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{url}/docs")
        page.get_by_text("/v1/images/generations").first.wait_for()
        assert all(one.startswith((url, "data:")) for one in asked), asked
        browser.close()


@pytest.mark.parametrize("width", [1200, 390])
def test_type_slide_generate(url: str, width: int) -> None:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(PATIENCE)
        errors: list[str] = []
        page.on(
            "console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{url}/playground")
        page.get_by_label("Weight of tuned2").wait_for()

        page.get_by_label("Prompt", exact=True).fill("a small red star")
        page.get_by_label("Weight of tuned2").fill("0.6")
        assert page.get_by_label("Weight of tuned1").input_value() == "0.4", "weights that act together give way"
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("2 pictures of one seed").wait_for()
        base, mixture = page.locator("figure.picture img").all()
        assert base.get_attribute("src") != mixture.get_attribute("src")
        assert base.evaluate("img => img.naturalWidth") == 32
        assert '"tuned2":0.6' in (page.locator("#curl").text_content() or "")
        assert '"sha256"' in (page.locator("#provenance").text_content() or "")

        page.get_by_role("button", name="Strip").click()
        page.get_by_text("5 pictures of one seed").wait_for()
        page.get_by_role("button", name="Triangle").click()
        page.get_by_text("15 pictures of one seed").wait_for()
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, "nothing sticks out sideways"
        if folder := os.environ.get("CRAFTOR_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/playground-{width}.png", full_page=True)
        assert errors == []
        browser.close()


@pytest.mark.parametrize("width", [1200, 390])
def test_upload_an_object_and_generate(url: str, width: int, tmp_path: Path) -> None:
    toy = Image.new("RGBA", (60, 40), (255, 0, 0, 255))
    toy.paste((0, 0, 0, 0), (0, 0, 20, 40))
    toy.save(tmp_path / "toy.png")
    Image.new("L", (60, 40), 255).save(tmp_path / "all.png")
    right = Image.new("L", (32, 32))
    right.paste(255, (16, 0, 32, 32))
    right.save(tmp_path / "right.png")
    Image.new("L", (40, 40), 255).save(tmp_path / "other.png")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(PATIENCE)
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{url}/playground")
        page.get_by_label("Weight of tuned2").fill("0.6")
        page.get_by_label("A picture of an object").set_input_files(tmp_path / "toy.png")
        page.get_by_label("Prompt", exact=True).fill("on a small blue ring")
        page.get_by_role("slider", name="Object strength").fill("1.5")
        assert page.locator("#object-shown").evaluate("img => img.src.startsWith('data:image/png')")

        def drawn() -> list[str]:
            page.get_by_role("button", name="Generate").click()
            page.get_by_text("2 pictures of one seed").wait_for()
            return [picture.get_attribute("src") or "" for picture in page.locator("figure.picture img").all()]

        without, with_it = drawn()
        assert without != with_it
        described = json.loads(page.locator("#provenance").text_content() or "")
        assert described["object"]["weight"] == 1.5 and described["mixture"][-1]["weight"] == 0.6
        curl = page.locator("#curl").text_content() or ""
        assert "-F 'image=@toy.png'" in curl and "--form-string 'object_weight=1.5'" in curl

        page.get_by_label("Its mask").set_input_files(tmp_path / "all.png")
        again, masked = drawn()
        assert again == without and masked != with_it
        page.get_by_label("Where it may be").set_input_files(tmp_path / "right.png")
        again, placed = drawn()
        assert again == without and placed != masked
        assert "-F 'region=@right.png'" in (page.locator("#curl").text_content() or "")
        page.get_by_role("button", name="Strip").click()
        page.get_by_text("5 pictures of one seed").wait_for()
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, "nothing sticks out sideways"
        if folder := os.environ.get("CRAFTOR_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/playground-object-{width}.png", full_page=True)
        assert errors == []

        page.get_by_label("Its mask").set_input_files(tmp_path / "other.png")
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("mask: 40x40 pixels, image has 60x40").wait_for()
        page.get_by_role("button", name="Without an object again").click()
        assert page.get_by_role("button", name="Base and mixture").is_visible()
        assert "/edits" not in (page.locator("#curl").text_content() or "")
        browser.close()
