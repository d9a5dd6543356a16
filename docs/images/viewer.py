"""Pictures of the viewer for README and docs: a real edit of the bundled cat, watched in headless Chromium.

    python docs/images/viewer.py [--steps 150]

Writes viewer-*.png beside this file. Needs the extra [browser] and Chromium.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

import splatedit

HERE = Path(__file__).resolve().parent
SCENE = HERE.parents[1] / "scenes" / "cat.ply"


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def shoot(page: Page, name: str) -> None:
    """Save what the page shows with 256 colours, which is enough for it and a third of the size."""
    page.mouse.move(300, 20)  # no tooltip
    page.wait_for_timeout(4000)  # the picture gets sharp, the panel settles
    path = HERE / f"viewer-{name}.png"
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size // 1000, "kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        for ending in (".ply", ".yaml"):
            shutil.copy(SCENE.with_suffix(ending), folder)
        os.chdir(folder)  # so that no path of this machine is in the pictures
        app = splatedit.view("cat.ply")
        app.stage.change(display="frames")
        chromium = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1200, "height": 760})
        page.goto(app.url)
        page.get_by_role("alert").locator("button").first.click(timeout=60_000)  # that the GPU is missing is known
        tab(page, "Edit")
        for label, text in (("Target", "a pig"), ("Steps", str(steps))):
            page.get_by_text(label, exact=True).locator("xpath=following::input[1]").fill(text)
            page.keyboard.press("Tab")
        page.get_by_role("button", name="Run", exact=True).click()
        while app.job is None or app.job.last is None or app.job.last.index < steps // 2:
            page.wait_for_timeout(500)
        app.job.pause()
        app.job.settle()
        shoot(page, "edit")
        tab(page, "Compare")
        app.stage.change(look="gradient")
        shoot(page, "gradient")
        app.stage.change(look="after")
        app.job.resume()
        while not app.job.ended:
            page.wait_for_timeout(500)
        app.stage.change(look="split", split=0.36)
        shoot(page, "compare")
        app.stage.change(look="after")
        tab(page, "Diagnose")
        page.get_by_role("button", name="Diagnose this view").click()
        page.get_by_text("identity").or_(page.get_by_text("diverges")).first.wait_for(timeout=240_000)
        shoot(page, "diagnose")
        chromium.close()
        app.close()


if __name__ == "__main__":
    main()
