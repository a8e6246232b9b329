"""The demo in a real browser: pictures, stopping, refusals, two people, and a page that fits a phone."""

import re
import shutil
import time

import pytest
from PIL import Image
from tiny_runs import small_pipeline

from imgdit.apps.demo import app
from imgdit.apps.studio import Studio

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed; apt-get install chromium"),
]
FLAGS = ["no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update"]
TABS = ("Create", "Control", "Any-to-any", "Unlearn", "Features", "Scale")
PATIENCE = 60_000
"""Milliseconds that a picture may take."""


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return Studio(small_pipeline(tmp_path_factory.mktemp("browser")))


@pytest.fixture(scope="module")
def address(studio, tmp_path_factory):
    page, address, holder = app.serve(studio, results=tmp_path_factory.mktemp("results") / "mup")
    yield address
    page.close(verbose=False)
    holder.close()


@pytest.fixture(scope="module")
def browser():
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        yield found
        found.close()


@pytest.fixture
def page(browser, address):
    opened = _open(browser, address)
    yield opened
    opened.context.close()


def _open(browser, address, width=1280, height=900):
    """A page of a person of their own."""
    opened = browser.new_context(viewport={"width": width, "height": height}).new_page()
    opened.asked = []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.goto(address)
    _drawn(opened)
    return opened


def _drawn(page):
    page.get_by_role("button", name="Create", exact=True).wait_for()


def _go(page, tab):
    button = page.get_by_role("tab", name=tab, exact=True)
    if button.is_visible():
        button.click()
    else:  # a narrow window keeps the last tabs in a menu
        page.locator(".overflow-menu button").first.click()
        page.locator(".overflow-dropdown button", has_text=tab).first.click()


def _shown(page):
    return page.get_by_role("tabpanel").filter(visible=True).first


def _says(page, text):
    page.wait_for_function(
        "text => [...document.querySelectorAll('textarea, input')].some(e => e.value.includes(text))",
        arg=text,
        timeout=PATIENCE,
    )


def _photo(tmp_path, name="photo.png"):
    Image.effect_noise((160, 128), 60).convert("RGB").save(tmp_path / name)
    return tmp_path / name


def test_create_control_and_frames_make_their_pictures(page, tmp_path):
    page.get_by_role("button", name="Create", exact=True).click()
    _says(page, "Done.")
    page.locator(".grid-wrap img").first.wait_for()
    page.get_by_role("button", name="Use as condition").click()
    page.get_by_role("button", name="Control", exact=True).click()
    page.get_by_role("link", name=re.compile("KB|B$")).first.wait_for(timeout=PATIENCE)
    _go(page, "Any-to-any")
    _shown(page).locator("input[type=file]").first.set_input_files(_photo(tmp_path))
    _shown(page).locator("img[alt]").first.wait_for()
    page.get_by_role("button", name="Make frames").click()
    _shown(page).locator(".grid-wrap img").first.wait_for(timeout=PATIENCE)
    assert not [url for url in page.asked if not re.match(r"(http://127\.0\.0\.1|data:|blob:)", url)]


def test_a_check_is_drawn(page):
    _go(page, "Scale")
    page.get_by_role("button", name="Check", exact=True).click()
    _shown(page).locator("img").first.wait_for(timeout=PATIENCE)


@pytest.fixture
def slow(studio):
    """A model that nobody is too late to stop."""
    hook = studio.pipe.transformer.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    yield
    hook.remove()


@pytest.mark.usefixtures("slow")
def test_stop_ends_a_picture(page):
    page.get_by_text("Sampling", exact=True).first.click()
    page.get_by_label("number input for Steps").first.fill("50")
    page.get_by_label("number input for Steps").first.press("Tab")
    page.get_by_role("button", name="Create", exact=True).click()
    _says(page, "step ")
    page.get_by_role("button", name="Stop", exact=True).first.click()
    _says(page, "Stopped.")


def test_what_is_too_large_or_no_picture_is_refused_with_a_sentence(page, tmp_path):
    large, wrong = tmp_path / "large.png", tmp_path / "wrong.png"
    large.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(12 * 2**20))
    wrong.write_bytes(b"no picture at all")
    _go(page, "Any-to-any")
    upload = _shown(page).locator("input[type=file]").first
    upload.set_input_files(large)
    page.get_by_text(re.compile("maximum|size|large", re.I)).first.wait_for(timeout=PATIENCE)
    page.reload()
    _drawn(page)
    _go(page, "Any-to-any")
    _shown(page).locator("input[type=file]").first.set_input_files(wrong)
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Make frames").click()
    page.get_by_text("cannot be read").first.wait_for(timeout=PATIENCE)


def test_two_people_take_turns(browser, address):
    people = [_open(browser, address) for _ in range(2)]
    for person in people:
        person.get_by_role("button", name="Create", exact=True).click()
    for person in people:
        _says(person, "Done.")
        person.context.close()


@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1280, 900), ("phone", 390, 844)])
def test_every_tab_fits_its_window(browser, address, tmp_path, name, width, height):
    page = _open(browser, address, width, height)
    for tab in TABS:
        _go(page, tab)
        page.wait_for_timeout(500)
        page.screenshot(path=tmp_path / f"{name}-{tab.lower()}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
    for control in page.locator("input:visible, textarea:visible").all():
        named = control.evaluate("e => e.ariaLabel || e.labels?.length || e.closest('label, fieldset') ? 1 : 0")
        assert named, control.evaluate("e => e.outerHTML")
    page.context.close()


def test_the_keyboard_reaches_the_button(page):
    page.locator("textarea").first.focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent.trim()") == "Create":
            break
    page.keyboard.press("Enter")
    _says(page, "Done.")
