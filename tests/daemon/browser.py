"""A real browser for tests of the page: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium (apt-get install chromium) and the package playwright (of the extra test)",
)


@contextmanager
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = [] if os.getuid() else ["--no-sandbox"]  # Chromium has none for root
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def quiet_page(chromium: Browser, **options: object) -> Iterator[Page]:
    """A page of a browser of its own; nothing may be said on its console: no error, no violation of the policy."""
    context = chromium.new_context(**options)  # type: ignore[arg-type]  # Playwright's own names
    page, said = context.new_page(), list[str]()
    page.set_default_timeout(15_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    try:
        yield page
        assert said == []
    finally:
        context.close()


def draw(page: Page, sheet: Locator, *strokes: list[tuple[float, float]]) -> None:
    """Draw with the mouse; places are shares of the sheet's width and height."""
    sheet.scroll_into_view_if_needed()
    box = sheet.bounding_box()
    assert box is not None
    for first, *rest in strokes:
        page.mouse.move(box["x"] + first[0] * box["width"], box["y"] + first[1] * box["height"])
        page.mouse.down()
        for x, y in rest:
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
        page.mouse.up()


def drop(page: Page, place: Locator, file: Path) -> None:
    """Drag a file from outside onto the place, and let it go."""
    held = page.evaluate_handle(
        """([name, bytes]) => {
            const held = new DataTransfer();
            held.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
            return held;
        }""",
        [file.name, list(file.read_bytes())],
    )
    place.dispatch_event("dragover", {"dataTransfer": held})
    assert "over" in str(place.get_attribute("class")), "it shows that it takes the file"
    place.dispatch_event("drop", {"dataTransfer": held})
    assert "over" not in str(place.get_attribute("class"))
