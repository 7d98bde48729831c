"""The page in a real browser, over two real peers: what a person sees, clicks and draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from .browser import browser, draw, needs_browser, quiet_page
from .processes import Peer, gossipml, peers_of, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.real, needs_browser]

DIGITS = ("--model", "digits-mlp", "--data", "digits", "--no-lan")
SEVEN = [(0.3, 0.18), (0.72, 0.18), (0.6, 0.5), (0.45, 0.85)]
ONE = [(0.5, 0.12), (0.5, 0.88)]


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Peer, Peer]]:
    """Two peers that know the digits."""
    folder = tmp_path_factory.mktemp("page")
    with peers_of(folder) as make:
        ada, bela = make("ada"), make("bela <b>&amp;")
        ada.start(*DIGITS, "--part", "1/2")
        bela.start(*DIGITS, "--part", "2/2", "--join", str(ada.token_file(folder)))
        until(
            lambda: (ada.status()["accuracy"] or 0) > 0.94 and ada.status()["neighbours"] == 1, 60, "ada knows digits"
        )
        yield ada, bela


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


def address(peer: Peer) -> str:
    return f"http://{peer.home.require_run_info().api}"


def link(peer: Peer) -> str:
    return gossipml("--home", str(peer.home.path), "peer", "open").stdout.strip()


def test_a_person_draws_a_digit_and_reads_what_it_is(peers: tuple[Peer, Peer], chromium: Browser) -> None:
    with quiet_page(chromium) as page:
        page.goto(address(peers[0]))
        draw(page, page.locator("#sheet"), SEVEN)
        page.locator("#label").wait_for()
        assert page.locator("#label").inner_text() == "It is 7"
        assert page.locator("#answer .best span").inner_text() == "7"
        page.get_by_role("button", name="Clear").click()
        assert page.locator("#answer").inner_text() == ""
        page.get_by_role("button", name="Predict").click()
        page.get_by_text("Draw something first.").wait_for()


def test_a_digit_can_be_drawn_with_the_keyboard_alone(peers: tuple[Peer, Peer], chromium: Browser) -> None:
    with quiet_page(chromium) as page:
        page.goto(address(peers[0]))
        page.locator("#which select").focus()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "sheet"
        assert page.locator(".pen").is_visible(), "it shows where the pen is"
        page.keyboard.press("Space")
        for _ in range(20):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("Space")
        page.locator("#label").wait_for()
        assert page.locator("#label").inner_text() == "It is 1"


def test_the_page_shows_the_network_live(peers: tuple[Peer, Peer], chromium: Browser) -> None:
    ada, bela = peers
    with quiet_page(chromium) as page:
        page.goto(address(ada))
        page.get_by_text("1 of 1 peers connected").wait_for()
        assert page.locator("#line").inner_text() == "live"
        assert page.locator("#name").inner_text() == "ada"
        assert page.locator("#graph .name").all_text_contents() == ["ada", bela.name]
        assert page.locator("#peers tbody th").all_inner_texts() == [bela.name]  # as text, whatever it holds
        assert page.locator(".chart.accuracy .line").count() == 1
        page.locator("#graph .node:not(.self) .figure", has_text="9").wait_for()  # bela tells how well she knows them
        assert page.locator("#peers tbody td").nth(2).inner_text().startswith("9")
        first = page.locator("#figures dd").nth(4).inner_text()
        page.wait_for_function("old => document.querySelectorAll('#figures dd')[4].innerText !== old", arg=first)


def test_training_is_controlled_by_whoever_came_by_the_link(peers: tuple[Peer, Peer], chromium: Browser) -> None:
    ada = peers[0]
    with quiet_page(chromium) as page:
        page.goto(link(ada))
        assert page.url == address(ada) + "/"
        page.get_by_role("button", name="Pause training").click()
        page.get_by_role("button", name="Resume training").wait_for()
        assert ada.status()["paused"] == "by its user"
        page.get_by_role("button", name="Resume training").click()
        page.get_by_role("button", name="Pause training").wait_for()
        until(lambda: ada.status()["state"] == "training", 10, "training goes on")
        page.get_by_role("button", name="Publish a version").click()
        page.get_by_text("Published version").wait_for()
        page.locator("#models article h3", has_text="digits-mlp").wait_for()
        page.locator("#models summary").last.click()
        page.locator("#models tbody tr").first.wait_for()


def test_without_the_link_the_page_changes_nothing(peers: tuple[Peer, Peer], chromium: Browser) -> None:
    ada = peers[0]
    used = link(ada)
    with quiet_page(chromium) as page:
        page.goto(used)
    with quiet_page(chromium) as page:
        assert page.request.get(used).status == 403
        page.goto(address(ada))
        page.get_by_text("gossipml peer open").wait_for()
        assert page.get_by_role("button", name="Pause training").count() == 0
        assert page.request.post(f"{address(ada)}/v1/training/pause").status == 401


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(peers: tuple[Peer, Peer], chromium: Browser, scheme: str) -> None:
    with quiet_page(chromium, viewport={"width": 340, "height": 700}, color_scheme=scheme) as page:
        page.goto(address(peers[0]))
        page.locator("#sheet").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 340
        assert contrast(page, "#figures dt") > 4.5
        assert contrast(page, "#network-sum") > 4.5


def test_the_language_is_the_browsers_and_can_be_chosen(peers: tuple[Peer, Peer], chromium: Browser) -> None:
    with quiet_page(chromium, locale="pt-BR") as page:
        page.goto(address(peers[0]))
        page.get_by_role("heading", name="Rede").wait_for()
        assert page.locator("html").get_attribute("lang") == "pt"
        draw(page, page.locator("#sheet"), ONE)
        page.locator("#label").wait_for()
        assert page.locator("#label").inner_text() == "É 1"
        page.get_by_role("button", name="English").click()
        page.get_by_role("heading", name="Network").wait_for()
        page.reload()
        page.get_by_role("heading", name="Network").wait_for()


def test_everything_is_reached_and_named_without_a_mouse(peers: tuple[Peer, Peer], chromium: Browser) -> None:
    with quiet_page(chromium) as page:
        page.goto(address(peers[0]))
        page.locator("#sheet").wait_for()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        names = [region.get_attribute("aria-labelledby") for region in page.locator("main > section").all()]
        assert all(name and page.locator(f"#{name}").inner_text() for name in names)
        unnamed = page.evaluate(
            """[...document.querySelectorAll("button, select, input, textarea, a, [role=img], [tabindex='0']")]
            .filter(e => !(e.innerText || e.ariaLabel || e.getAttribute("aria-labelledby") || e.labels?.length))
            .map(e => e.outerHTML)"""
        )
        assert unnamed == []
        assert "peers connected" in str(page.locator("#graph svg").get_attribute("aria-label"))


def contrast(page: Page, selector: str) -> float:
    """Of a text against the card that it stands on (WCAG 2, 1.4.3)."""
    value = page.evaluate(
        """selector => {
            const shine = colour => {
                const [r, g, b] = colour.match(/[\\d.]+/g).map(Number)
                    .map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const text = document.querySelector(selector);
            const one = shine(getComputedStyle(text).color);
            const other = shine(getComputedStyle(text.closest("section")).backgroundColor);
            return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        }""",
        selector,
    )
    return float(value)
