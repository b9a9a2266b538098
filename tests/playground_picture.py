"""`make playground-picture`: the playground as a visitor sees it, drawing with two registered encoders, for the README.

`python playground_picture.py [--width 1200] [--view compare] [--prompt TEXT] [--seed 7] OUT.png NAME=BUNDLE …`.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright import sync_api

from craftor.serving.service import service
from craftor.serving.settings import Serving
from encoder_bundles import new_store, register
from serving_parts import listening

CHROMIUM = Path("/usr/bin/chromium")
VIEWS = {"compare": "2 pictures", "strip": "5 pictures", "triangle": "15 pictures"}
"""And what the page says when it has drawn them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("bundles", nargs="+", metavar="NAME=BUNDLE")
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--view", choices=VIEWS, default="compare")
    parser.add_argument("--prompt", help="by default the page's own")
    parser.add_argument("--seed", default="7")
    arguments = parser.parse_args()
    bundles = dict(pair.split("=", 1) for pair in arguments.bundles)
    with TemporaryDirectory() as folder:
        connected = new_store(Path(folder) / "runs")
        for name, bundle in bundles.items():
            register(connected, Path(bundle), name, "champion")
        settings = Serving.model_validate(
            {
                "name": "micro",
                "model": {"path": "micro:base"},
                "encoders": {name: f"{name}@champion" for name in bundles},
                "runs": str(Path(folder) / "runs"),
                "engine": {"bucket": 8, "queue_seconds": 60.0},
                "defaults": {"steps": 20, "guidance_scale": 4.0},
            }
        )
        with service(settings) as one, listening(one) as url, sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": arguments.width, "height": 800}, color_scheme="light")
            draw(page, url, list(bundles), arguments)
            page.screenshot(path=arguments.out, full_page=True)
            browser.close()
    print(arguments.out)


def draw(page: sync_api.Page, url: str, encoders: list[str], arguments: argparse.Namespace) -> None:
    page.goto(f"{url}/playground")
    page.get_by_label(f"Weight of {encoders[-1]}").wait_for()
    if arguments.prompt:
        page.get_by_label("Prompt", exact=True).fill(arguments.prompt)
    page.locator("#seed").evaluate("(field, seed) => field.value = seed", arguments.seed)  # in a closed fold
    for name in encoders:  # each in its own timesteps, so that none gives way to another
        page.get_by_label(f"Weight of {name}").fill("1")
    if arguments.view == "compare":
        page.get_by_role("button", name="Generate").click()
    else:
        page.get_by_role("button", name=arguments.view.capitalize()).click()
    page.get_by_text(VIEWS[arguments.view]).wait_for(timeout=120_000)


if __name__ == "__main__":
    main()
