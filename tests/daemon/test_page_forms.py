"""The page's forms for models that take no drawing, in a real browser: number fields, rows of numbers, pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from .browser import browser, draw, drop, needs_browser, quiet_page
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
        address = started(peer, "--model", f"{tmp_path / 'tones.py'}:Spec", "--data", f"images:{tmp_path / 'pictures'}")
        page.goto(address)
        until(lambda: peer.status()["accuracy"] == 1.0, 60, "it tells red from blue")
        page.locator("#picture").set_input_files(tmp_path / "pictures" / "blue" / "3.png")
        page.locator("#label").wait_for()
        assert page.locator("#label").inner_text() == "It is blue"
        page.get_by_role("button", name="Clear").click()
        page.get_by_role("button", name="Predict").click()
        page.get_by_text("Choose a picture first.").wait_for()
        drop(page, page.locator(".drop"), tmp_path / "pictures" / "red" / "5.png")
        page.locator("#label").wait_for()
        assert page.locator("#label").inner_text() == "It is red"
        assert page.locator(".drop [role=status]").inner_text() == "Picture chosen: 5.png"

        (tmp_path / "broken.png").write_bytes(b"no picture")
        with closing(chromium.new_context()) as context:  # not a quiet one: the browser notes every 400 on its console
            other = context.new_page()
            other.goto(address)
            drop(other, other.locator(".drop"), tmp_path / "broken.png")
            other.locator("#answer .problem").wait_for()
            assert "not a picture that can be read" in other.locator("#answer .problem").inner_text()


def test_a_model_that_is_on_another_peer_has_its_form_and_answers(tmp_path: Path, chromium: Browser) -> None:
    with peers_of(tmp_path) as make, quiet_page(chromium) as page:
        bela, ada = make("bela"), make("ada")
        bela.start("--no-lan", "--replicas", "1", "--model", "digits-mlp", "--target-accuracy", "0.96")
        until(lambda: bela.status()["state"] == "averaging", 60, "bela knows digits, and says so")
        token = str(bela.token_file(tmp_path))
        page.goto(started(ada, "--model", "xor", "--replicas", "1", "--pull-after", "0", "--join", token))
        page.locator("#which option", has_text="digits-mlp").wait_for(state="attached")
        assert [line["here"] for line in ada.ask("/v1/models")["models"] if line["name"] == "digits-mlp"] == ["no"]
        page.get_by_label("a", exact=True).fill("7")  # its own model is the one that is shown first
        page.locator("#which select").select_option("digits-mlp")
        draw(page, page.locator("#sheet"), [(0.5, 0.12), (0.5, 0.88)])
        page.locator("#label").wait_for()
        assert page.locator("#label").inner_text() == "It is 1"
        assert bela.status()["peer"][:8] in page.locator("#answer .quiet").inner_text()
