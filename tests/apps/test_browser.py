"""The demo in a real browser: images, stopping, refusals, two people, and a page that fits its window."""

import asyncio
import contextlib
import re
import shutil
import socket
import threading
import time

import httpx
import pytest
from PIL import Image, ImageStat
from tiny_runs import small_pipeline, with_concepts

from imgdit.apps.demo import app, features
from imgdit.apps.jobs.png import read_origin
from imgdit.apps.jobs.run import same_pixels
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.session import Session
from imgdit.images import open_image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed; apt-get install chromium"),
]
FLAGS = ["no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update"]
TABS = ("Create", "Control", "Any-to-any", "Views", "Unlearn", "Features", "Caption & Ask")
PATIENCE = 60_000
"""Milliseconds that an image may take."""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return Session(Shelf(with_concepts(small_pipeline(tmp_path_factory.mktemp("browser")))))


@pytest.fixture(scope="module")
def served(session, tmp_path_factory):
    """Address and `Holder` of the demo."""
    page, address, holder = app.serve(session, results=tmp_path_factory.mktemp("results") / "mup")
    yield address, holder
    page.close(verbose=False)
    holder.close()


@pytest.fixture(scope="module")
def address(served):
    return served[0]


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
    page.get_by_role("tab", name=tab, exact=True).click()  # all are seen, whatever the width


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


def _press(page, name):
    _shown(page).get_by_role("button", name=name, exact=True).click()


def _status(page):
    return _shown(page).get_by_label("Status").first.input_value()


def _steps(page, steps):
    """Set the sampler's steps of the tab."""
    for accordion in _shown(page).get_by_text("Sampling", exact=True).all():
        accordion.click()
    for number in _shown(page).get_by_label("number input for Steps").all():
        number.fill(str(steps))
        number.press("Tab")


def _bytes(page, image):
    """What an image on the page shows, from its source, as a PIL image."""
    return open_image(httpx.get(image.get_attribute("src")).content)


CLIPPED = """
image => {
  const box = image.getBoundingClientRect(), fit = getComputedStyle(image).objectFit, hidden = [];
  if (fit != "contain" && fit != "scale-down") hidden.push("object-fit " + fit);
  if (box.width < 40 || box.height < 40) hidden.push("size " + box.width + " x " + box.height);
  for (let e = image.parentElement; e && e !== document.body; e = e.parentElement) {
    const around = e.getBoundingClientRect();
    if (getComputedStyle(e).overflowY != "visible" && (
      box.top < around.top - 2 || box.bottom > around.bottom + 2 ||
      box.left < around.left - 2 || box.right > around.right + 2)) hidden.push(e.className);
  }
  return hidden;
}"""
"""What cuts an image off, or makes it too small to be seen."""


def _whole(image):
    image.wait_for(timeout=PATIENCE)
    image.evaluate("image => image.decode()")
    assert image.evaluate(CLIPPED) == []


def _files(holder):
    """Finished images, the newest last."""
    files = [file for file in holder.folder.glob("*.png") if read_origin(file) is not None]
    return sorted(files, key=lambda file: file.stat().st_mtime_ns)


def _no_error(page):
    """Nothing red: no veil over anything, no box of an error."""
    assert page.locator(".toast-body.error, .toast-wrap .error").count() == 0
    assert page.get_by_text("Error", exact=True).filter(visible=True).count() == 0


def test_what_is_created_is_what_is_shown(page, served):
    _press(page, "Create")
    _says(page, "Done.")
    result = _shown(page).locator(".result img")
    _whole(result)
    shown = _bytes(page, result)  # not a step on the way
    assert same_pixels(shown, open_image(_files(served[1])[-1]))
    thumb = page.locator(".history img").first
    thumb.wait_for(timeout=PATIENCE)
    assert same_pixels(_bytes(page, thumb), shown)
    assert not [url for url in page.asked if not re.match(r"(http://127\.0\.0\.1|data:|blob:)", url)]


def test_one_of_several_is_taken_as_the_condition(page, served):
    _shown(page).get_by_text("More", exact=True).click()
    number = _shown(page).get_by_label("number input for Images")
    number.fill("2")
    number.press("Tab")
    # A slider that has just been laid out takes its first value once more.
    page.wait_for_function("() => [...document.querySelectorAll('input')].filter(e => e.value === '2').length >= 2")
    _press(page, "Create")
    _says(page, "Done.")
    thumbs = page.locator(".history .thumbnail-item img")
    thumbs.nth(1).wait_for(timeout=PATIENCE)
    assert thumbs.count() == 2
    thumbs.nth(1).click()  # the newest is the first
    first = _files(served[1])[-2]
    page.wait_for_function(
        "name => document.querySelector('.result img').src.includes(name)", arg=first.name, timeout=PATIENCE
    )
    _press(page, "Use as condition")
    page.get_by_role("button", name="Control", exact=True).wait_for()
    _press(page, "Control")
    _says(page, "Done.")
    before = _shown(page).locator(".result:not(.square) img").first
    assert same_pixels(_bytes(page, before), open_image(first).convert("RGB"))


def test_a_result_is_the_starting_image_of_the_next_one(page, served):
    _steps(page, 2)
    _press(page, "Create")
    _says(page, "Done.")
    first = _files(served[1])[-1]
    page.locator(".history .thumbnail-item").first.wait_for(timeout=PATIENCE)  # it is the chosen one then
    _press(page, "Use as starting image")
    _says(page, "begins at the starting image")
    _whole(_shown(page).locator(".starting img").first)  # its drawer is open
    _press(page, "Create")
    _until(lambda: _files(served[1])[-1] != first)
    assert same_pixels(read_origin(_files(served[1])[-1]).request.image, open_image(first).convert("RGB"))


def test_without_an_image_there_is_no_condition_to_use(page):
    _press(page, "Use as condition")
    _says(page, "Create an image first")
    page.get_by_text("Create an image first").first.wait_for()
    assert page.get_by_role("tab", name="Create", exact=True).get_attribute("aria-selected") == "true"
    _no_error(page)


def test_an_image_that_was_created_is_asked_about(page):
    _steps(page, 1)
    _press(page, "Create")
    _says(page, "Done.")
    page.wait_for_timeout(500)  # until the image is the chosen one
    _press(page, "Caption or ask about it")
    panel = page.get_by_role("tabpanel").filter(has=page.get_by_label("Question")).first
    panel.locator("img").first.wait_for()
    panel.get_by_text("what object is it?", exact=True).first.click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('textarea')].some(e => e.value === 'what object is it?')"
    )
    panel.get_by_role("button", name="Ask", exact=True).click()
    _says(page, "This demo's model writes no texts")
    _no_error(page)


@pytest.mark.parametrize("number", range(4))
def test_every_example_of_control_works(page, served, number):
    _go(page, "Control")
    _steps(page, 2)
    example = _shown(page).locator(".gallery-item").nth(number)
    example.click()
    page.wait_for_timeout(1500)  # until it stands on the canvas
    _press(page, "Control")
    _says(page, "Done.")
    made = _files(served[1])[-1]
    condition = _shown(page).locator(".result.square img")
    _whole(condition)
    assert same_pixels(_bytes(page, condition), read_origin(made).request.controls[0].image)
    images = _shown(page).locator(".result:not(.square) img")
    assert images.count() == 2
    assert any(same_pixels(_bytes(page, image), open_image(made)) for image in images.all())
    for image in images.all():
        _whole(image)
    _no_error(page)


@pytest.mark.parametrize(("tab", "button"), [("Any-to-any", "Make frames"), ("Views", "Show view")])
def test_every_example_of_frames_works(page, served, tab, button):
    _go(page, tab)
    _steps(page, 2)
    for number in range(4):
        before = len(_files(served[1]))
        _shown(page).locator(".gallery-item").nth(number).click()
        page.wait_for_timeout(500)
        _press(page, button)
        _until(lambda before=before: len(_files(served[1])) > before)
        image = _shown(page).locator(".results img").first
        made = _files(served[1])[-1]
        page.wait_for_function(
            "name => [...document.querySelectorAll('.results img')].some(e => e.src.includes(name))", arg=made.name
        )
        _whole(image)
        assert same_pixels(_bytes(page, image), open_image(made))
    _no_error(page)


def _until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def _draw(page):
    """A stroke of the brush as it is at first."""
    page.get_by_role("button", name="Brush", exact=True).first.click()
    page.wait_for_timeout(500)
    box = page.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y - 40)
    page.mouse.down()
    page.mouse.move(x + 60, y - 40, steps=8)
    page.mouse.move(x + 60, y + 40, steps=8)
    page.mouse.up()
    page.wait_for_timeout(800)


@pytest.mark.parametrize("find", [True, False], ids=["found", "as it is"])
def test_a_drawing_arrives_after_an_empty_canvas_was_refused(page, served, monkeypatch, find):
    given = []
    monkeypatch.setattr(app.control, "condition_of", lambda *args, **_: given.append(args[2]) or args[2])
    _go(page, "Control")
    _steps(page, 2)
    if not find:
        page.get_by_label("It is a photo: find the condition in it").click()
    _press(page, "Control")
    _says(page, "Draw or upload an image first.")
    _no_error(page)
    page.evaluate("window.scrollTo(0, 0)")
    _draw(page)
    _press(page, "Control")
    _says(page, "Done.")
    condition = _shown(page).locator(".result.square img")
    _whole(condition)
    seen = _bytes(page, condition)
    read = read_origin(_files(served[1])[-1]).request.controls[0].image
    light = ImageStat.Stat(seen.convert("L")).mean[0]
    if find:  # black on white, as it was drawn; the finding itself is tested elsewhere
        assert given[0].getextrema() == ((0, 255),) * 3 and 150 < light < 254
    else:
        assert 1 < light < 100 and "Inverted" in _status(page) and not given
        assert 1 < ImageStat.Stat(read.convert("L")).mean[0] < 100


def test_main_buttons_of_an_empty_page_say_what_is_missing_or_work(page, monkeypatch):
    monkeypatch.setattr(features, "STEPS", 1)
    said = {
        ("Control", "Control"): "Draw or upload an image first.",
        ("Any-to-any", "Make frames"): "upload one first",
        ("Views", "Show view"): "Upload an image first",
        ("Unlearn", "Unlearn"): "Done.",
        ("Features", "Search"): "is chosen",
        ("Features", "Steer"): "Done.",
        ("Features", "Top images"): "active on",
        ("Create", "Create"): "Done.",
    }
    for (tab, button), text in said.items():
        _go(page, tab)
        if button in ("Unlearn", "Search", "Create"):
            _steps(page, 2)
        _press(page, button)
        _says(page, text)
        _no_error(page)
    for tab in ("Unlearn", "Features"):
        _go(page, tab)
        for image in _shown(page).locator(".result img, .results img").all():
            _whole(image)


def test_a_word_and_a_row_are_told_on_the_page(page, monkeypatch):
    monkeypatch.setattr(features, "STEPS", 1)
    prompt = _shown(page).get_by_label("Prompt", exact=True)
    prompt.fill("a red cube")
    _shown(page).get_by_role("button", name="octahedron", exact=True).click()  # what the model can draw
    _shown(page).get_by_role("button", name="neon", exact=True).click()
    _says(page, "a red octahedron, neon")
    prompt.fill("a cat")
    page.get_by_text('The model was never taught "cat"').first.wait_for()  # while it is written
    _steps(page, 1)
    _press(page, "Create")
    _says(page, 'The model was never taught "cat"')
    _go(page, "Features")
    _press(page, "Search")
    _says(page, "is chosen")
    cell = _shown(page).locator("[role=gridcell]").nth(3)  # the first of the second row
    number = cell.inner_text().strip()
    cell.click()
    page.wait_for_function(  # the status goes on to its strongest images
        "number => [...document.querySelectorAll('input')].some(e => e.ariaLabel === 'Feature' && e.value === number)",
        arg=number,
        timeout=PATIENCE,
    )
    _says(page, "the strongest first")


@contextlib.contextmanager
def _behind(address, prefix):
    """Address of a proxy that shows a server under a path, which it takes off; the header Host stays as it is."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    client = httpx.AsyncClient(timeout=None)

    async def forward(request):
        if not request.url.path.startswith(prefix + "/"):
            return Response(status_code=404)
        url = address.rstrip("/") + request.url.path.removeprefix(prefix)
        headers = {k: v for k, v in request.headers.items() if k != "content-length"}
        asked = client.build_request(
            request.method, url, params=request.query_params, headers=headers, content=await request.body()
        )
        answer = await client.send(asked, stream=True)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in ("content-length", "transfer-encoding")}
        return StreamingResponse(
            answer.aiter_raw(), answer.status_code, headers=kept, background=BackgroundTask(answer.aclose)
        )

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    routes = [Route("/{path:path}", forward, methods=["GET", "POST", "HEAD"])]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=port, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    _until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}{prefix}/"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)


def test_a_path_of_a_proxy(browser, session, tmp_path):
    shown, address, holder = app.serve(session, results=tmp_path / "mup", root_path="/imgdit")
    try:
        with _behind(address, "/imgdit") as outside:
            page = _open(browser, outside)
            _steps(page, 2)
            _press(page, "Create")
            _says(page, "Done.")
            image = _shown(page).locator(".result img")
            _whole(image)
            assert image.get_attribute("src").startswith(outside)
            assert same_pixels(_bytes(page, image), open_image(_files(holder)[-1]))
            _go(page, "Control")
            _steps(page, 2)
            _shown(page).locator(".gallery-item").first.click()
            _press(page, "Control")
            _says(page, "Done.")
            assert not [url for url in page.asked if not url.startswith((outside, "data:", "blob:"))]
            page.context.close()
    finally:
        shown.close(verbose=False)
        holder.close()


def test_a_check_is_drawn(page):
    page.get_by_text("For researchers").first.click()
    page.get_by_role("button", name="Check", exact=True).click()
    page.locator("#scale .result img").first.wait_for(timeout=PATIENCE)


@pytest.fixture
def slow(session):
    """A model that nobody is too late to stop."""
    hook = session.pipe.transformer.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    yield
    hook.remove()


@pytest.mark.usefixtures("slow")
def test_stop_ends_an_image(page):
    page.get_by_text("Sampling", exact=True).first.click()
    page.get_by_label("number input for Steps").first.fill("50")
    page.get_by_label("number input for Steps").first.press("Tab")
    page.get_by_role("button", name="Create", exact=True).click()
    _says(page, "step ")
    page.get_by_role("button", name="Stop", exact=True).first.click()
    _says(page, "Stopped.")


@pytest.mark.usefixtures("slow")
def test_keys_make_and_stop(page):
    page.locator("textarea").first.focus()
    page.keyboard.press("Control+Enter")
    _says(page, "step ")
    page.keyboard.press("Escape")
    _says(page, "Stopped.")


def test_a_phone_shows_the_result_and_dark_is_a_click_away(browser, address):
    page = _open(browser, address, 390, 844)
    page.evaluate("window.scrollTo(0, 10000)")
    page.locator("button.make").first.evaluate("button => button.click()")
    _says(page, "Done.")
    image = page.locator(".main-result img").first
    _whole(image)
    page.wait_for_timeout(1000)
    box = image.bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 844 and box["width"] > 300
    dark = "document.body.classList.contains('dark')"
    assert not page.evaluate(dark)
    page.locator("#theme").click()
    assert page.evaluate(dark)
    page.context.close()


def test_concepts_have_images_and_rows_take_features(page, monkeypatch):
    monkeypatch.setattr(features, "STEPS", 1)
    _go(page, "Unlearn")
    chip = "getComputedStyle(document.querySelector('#concepts label'), '::before').backgroundImage"
    assert page.evaluate(chip).startswith('url("data:image/jpeg')
    _go(page, "Features")
    _press(page, "Search")
    _says(page, "the strongest first")  # of the best feature, without another click
    _whole(_shown(page).locator(".results img").first)


def test_what_is_too_large_or_no_image_is_refused_with_a_sentence(page, tmp_path):
    large, wrong = tmp_path / "large.png", tmp_path / "wrong.png"
    large.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(12 * 2**20))
    wrong.write_bytes(b"no image at all")
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


@pytest.mark.parametrize(
    ("name", "width", "height"),
    [("wide", 1920, 1080), ("desktop", 1280, 900), ("tablet", 768, 1024), ("phone", 390, 844)],
)
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
    _shown(page).get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('button.make')")  # not the tab of that name
    page.keyboard.press("Enter")
    _says(page, "Done.")
