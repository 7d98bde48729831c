"""The page's forms for models that take no drawing, in a real browser: number fields, rows of numbers, pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from .browser import browser, needs_browser, quiet_page
from .processes import Peer, peers_of, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser

TONES = """
from torch import nn

from gossipml.models.spec import Classifier


class Spec(Classifier):
    name = "tones"
    input_shape = (8, 8, 3)
    labels = ("blue", "red")
    scale = 255.0

    def build(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
"""
pytestmark = [pytest.mark.real, needs_browser]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


def started(peer: Peer, *options: str) -> str:
    """The address of a peer that can answer."""
    peer.start("--no-lan", *options)
    until(lambda: peer.ask("/readyz") is not None if peer.status()["round"] else False, 60, "it is ready")
    return f"http://{peer.home.require_run_info().api}"


def test_numbers_are_typed_into_named_fields(tmp_path: Path, chromium: Browser) -> None:
    with peers_of(tmp_path) as make, quiet_page(chromium) as page:
        peer = make("ada")
        page.goto(started(peer, "--model", "xor"))
        until(lambda: peer.status()["accuracy"] == 1.0, 60, "it knows xor")
        page.get_by_label("a", exact=True).fill("0")
        page.get_by_label("b", exact=True).fill("1")
        page.get_by_role("button", name="Predict").click()
        page.locator("#answer dd").first.wait_for()
        assert page.locator("#answer dd").first.inner_text() == "1"


def test_a_picture_is_chosen_and_named(tmp_path: Path, chromium: Browser) -> None:
    for name, colour in (("red", (250, 10, 10)), ("blue", (10, 10, 250))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            shade = tuple(max(0, part - number) for part in colour)
            Image.new("RGB", (8, 8), shade).save(tmp_path / "pictures" / name / f"{number}.png")
    (tmp_path / "tones.py").write_text(TONES)
    with peers_of(tmp_path) as make, quiet_page(chromium) as page:
        peer = make("ada")
        page.goto(
            started(peer, "--model", f"{tmp_path / 'tones.py'}:Spec", "--data", f"images:{tmp_path / 'pictures'}")
        )
        until(lambda: peer.status()["accuracy"] == 1.0, 60, "it tells red from blue")
        page.locator("#picture").set_input_files(tmp_path / "pictures" / "blue" / "3.png")
        page.locator("#label").wait_for()
        assert page.locator("#label").inner_text() == "It is blue"
        page.get_by_role("button", name="Clear").click()
        page.get_by_role("button", name="Predict").click()
        page.get_by_text("Choose a picture first.").wait_for()
