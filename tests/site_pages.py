"""The built web site in a headless Chromium: every page, and a flower that the page generates.

    make site && python -m pytest tests/site_pages.py   needs Debian's chromium and chromium-driver

Screenshots at two widths, in the light and the dark theme, are left in build/site/shots/.
"""

import base64
import functools
import gzip
import http.server
import json
import re
import shutil
import threading
import time
import tomllib
from html.parser import HTMLParser
from io import BytesIO
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from noisout_nb.data import to_uint8
from noisout_nb.generate import sample_image
from notebooks import CELL_SECONDS, NOTEBOOKS, ROOT, names, time_limit

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    missing = "no chromium and chromedriver (Debian: apt install chromium chromium-driver)"
    pytest.skip(f"not here: {missing}", allow_module_level=True)

HTML = ROOT / "build" / "site" / "html"
SHOTS = HTML.parent / "shots"
PAGES = [path.relative_to(HTML).as_posix() for path in sorted(HTML.rglob("*.html"))]
PAGES = [page for page in PAGES if not page.startswith("_static/")]
assert PAGES, "the site is not built: make site"
if "demo.html" not in PAGES:
    missing = "npm could not be reached, so the site has neither MathJax nor the network"
    pytest.skip(f"not here: {missing}", allow_module_level=True)
WIDTHS = {"wide": 1280, "phone": 390}
THEMES = ("light", "dark")
OFFLINE = "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
MEGABYTES = 16  # the most that the page with the network may load
SECONDS = 10  # to the first flower, on an idle machine
FAULTS = """
const root = document.documentElement, images = [...document.images];
const clips = (e) => e.closest('article') && getComputedStyle(e).overflowX !== 'visible';
const inside = (e) => { while ((e = e.parentElement)) if (clips(e)) return true; return false; };
const right = (e) => Math.max(0, ...[...e.getClientRects()].map(r => r.right));
const wide = [...document.querySelectorAll('article *')]
    .filter(e => right(e) > root.clientWidth + 1 && !inside(e));
return {
    missing: images.filter(i => !i.naturalWidth).map(i => i.src),
    silent: images.filter(i => !i.hasAttribute('alt') || (i.closest('article') && !i.alt.trim()))
        .map(i => i.src),
    scrolls: root.scrollWidth > root.clientWidth ? [root.scrollWidth] : [],
    overflow: wide.slice(0, 3).map(e => e.outerHTML.slice(0, 150)),
    formulas: [...document.querySelectorAll('.math:not(:has(mjx-container)), [data-mjx-error]')]
        .map(e => e.textContent),
};"""
COMPRESSED = (".html", ".css", ".js", ".mjs", ".json", ".svg")  # by GitHub Pages, too


class Handler(http.server.SimpleHTTPRequestHandler):
    sent = 0

    def log_message(self, *words):
        pass

    def copyfile(self, source, outputfile):
        data = source.read()
        compressed = self.path.partition("?")[0].endswith(COMPRESSED)
        Handler.sent += len(gzip.compress(data, 6)) if compressed else len(data)
        outputfile.write(data)


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Handler, directory=HTML)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    for flag in [*flags, "--disable-background-networking", f"--host-resolver-rules={OFFLINE}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    SHOTS.mkdir(exist_ok=True)
    driver = webdriver.Chrome(service=webdriver.ChromeService(DRIVER), options=options)
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def resize(driver, width, height=900):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def visit(driver, url, theme):
    """Load the page in this theme, all its images and formulas; what the console complains of."""
    chosen = f"localStorage.mode = localStorage.theme = '{theme}';"
    script = {"source": f"try {{ {chosen} }} catch {{}}"}
    added = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", script)
    driver.get(url)
    driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    driver.execute_async_script("""
        const done = arguments[0], images = [...document.images];
        for (const image of images) image.loading = 'eager';
        Promise.all([window.MathJax?.startup?.promise,
            ...images.map(i => i.decode().catch(() => 0))]).then(() => done())""")
    log = driver.get_log("browser")
    return [entry["message"] for entry in log if entry["level"] == "SEVERE"]


def strangers(driver):
    """Other hosts that the pages have asked for something."""
    hosts = set()
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = urlsplit(message["params"]["request"]["url"])
            hosts |= {url.hostname} if url.scheme in ("http", "https") else set()
    return hosts - {"127.0.0.1"}


@pytest.mark.parametrize("page", PAGES)
def test_page(page, address, driver):
    reference = page.startswith("api/")  # all alike: one width and theme each
    looks = [(w, t) for w in WIDTHS for t in THEMES]
    looks = [("phone", "light")] if reference else looks
    for width, theme in looks:
        resize(driver, WIDTHS[width])
        assert not visit(driver, address + page, theme), "the console shows errors"
        assert driver.execute_script("return document.documentElement.dataset.theme") == theme
        faults = driver.execute_script(FAULTS)
        assert not any(faults.values()), f"{width}: {faults}"
        height = driver.execute_script("return document.documentElement.scrollHeight")
        resize(driver, WIDTHS[width], min(height, 5_000))
        shot = SHOTS / f"{page.removesuffix('.html').replace('/', '-')}-{width}-{theme}.png"
        shot.write_bytes(driver.get_screenshot_as_png())
    assert not strangers(driver), "a page loads something from another host"


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.targets, self.ids = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.targets.add(value)
            if name in ("id", "name") and value:
                self.ids.add(value)


@functools.cache
def links(path):
    return Links(path.read_text(encoding="utf-8"))


def test_internal_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in links(HTML / page).targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            path = HTML / page
            path = (path.parent / unquote(url.path)).resolve() if url.path else path
            there = path.is_file()
            if there and url.fragment and path.suffix == ".html":
                there = unquote(url.fragment) in links(path).ids
            if not there:
                broken.append(f"{page}: {target}")
    assert not broken


@pytest.mark.parametrize("name", names())
def test_notebook_is_there_and_opens_on_colab_and_binder(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = urlsplit(project["urls"]["Repository"]).path
    found = links(HTML / "notebooks" / f"{name}.html").targets
    file = f"notebooks/{name}.ipynb"
    assert f"https://colab.research.google.com/github{repository}/blob/main/{file}" in found
    assert f"https://mybinder.org/v2/gh{repository}/main?labpath={file}" in found
    assert f"notebooks/{name}.html" in links(HTML / "index.html").targets
    assert names() == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture
def demo(address, driver):
    resize(driver, WIDTHS["phone"])
    Handler.sent = 0
    driver.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": True})
    assert not visit(driver, f"{address}demo.html", "light")
    WebDriverWait(driver, 30).until(lambda d: d.find_element(By.NAME, "go").is_enabled())
    yield driver
    driver.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": False})


def choose(driver, species, seed, scale, steps):
    Select(driver.find_element(By.NAME, "species")).select_by_visible_text(species)
    for name, value in {"seed": seed, "scale": scale, "steps": steps}.items():
        driver.execute_script(
            "const f = document.getElementById('flower').elements[arguments[0]];"
            "f.value = arguments[1]; f.dispatchEvent(new Event('input'))",
            name,
            value,
        )


def generated(driver, seconds):
    """Wait for the image; uint8 (64, 64, 3)."""
    done = "return document.getElementById('flower').dataset.done"
    WebDriverWait(driver, seconds, 0.05).until(lambda d: d.execute_script(done), status(driver))
    url = driver.execute_script("return document.getElementById('flower-x').toDataURL()")
    return np.array(Image.open(BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))


def status(driver):
    return driver.find_element(By.ID, "flower-status").text


def difference(image, species, seed, **options):
    """Largest difference in grey levels from the image that `sample_image` gives."""
    [expected] = to_uint8(sample_image(species, seed=seed, **options)).permute(0, 2, 3, 1).numpy()
    return np.abs(image.astype(int) - expected).max()


def test_the_first_flower_is_sample_images_and_comes_in_time(demo):
    slowness = time_limit() / CELL_SECONDS
    choose(demo, "sunflower", 3, 3, 20)
    start = time.monotonic()
    demo.find_element(By.NAME, "go").send_keys(Keys.ENTER)
    image = generated(demo, 300)
    seconds = time.monotonic() - start
    (SHOTS / "flower.png").write_bytes(demo.get_screenshot_as_png())
    print(f"first flower in {seconds:.1f} s, {Handler.sent / 1e6:.1f} MB loaded, x{slowness:.1f}")
    assert difference(image, "sunflower", 3) <= 2
    assert Handler.sent < MEGABYTES * 1e6
    assert seconds < SECONDS * slowness
    assert re.search(r"Done: sunflower, seed 3", status(demo))
    assert demo.find_element(By.NAME, "save").is_enabled()


@pytest.mark.parametrize(
    ("species", "seed", "scale", "steps"),
    [("rose", 0, 1, 10), ("water lily", 4_000_000_000, 4.5, 30)],
)
def test_other_settings_give_sample_images_too(demo, species, seed, scale, steps):
    choose(demo, species, seed, scale, steps)
    demo.find_element(By.NAME, "go").click()
    image = generated(demo, 300)
    assert difference(image, species, seed, guidance_scale=scale, steps=steps) <= 2


def test_stop_and_keyboard(demo):
    choose(demo, "rose", 1, 3, 50)
    demo.find_element(By.NAME, "seed").send_keys(Keys.ENTER)
    WebDriverWait(demo, 120).until(
        lambda d: d.find_element(By.ID, "flower-progress").get_property("value") > 0
    )
    demo.find_element(By.NAME, "stop").send_keys(Keys.SPACE)
    WebDriverWait(demo, 30).until(lambda d: status(d) == "Stopped")
    assert demo.find_element(By.NAME, "go").is_enabled()
    for field in demo.find_elements(
        By.CSS_SELECTOR, "#flower :is(input, select, progress, canvas)"
    ):
        assert field.accessible_name, field.get_attribute("outerHTML")
