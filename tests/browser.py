"""The notebooks in a reader's hands: JupyterLab in a headless Chromium runs each and moves widgets.

    python -m pytest tests/browser.py            needs Debian's chromium and chromium-driver

Screenshots of every page, in the light and the dark theme, are left in runs/browser/. Moves
to a state that was seen before are timed.
"""

import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import partial
from urllib.parse import urlsplit

import nbformat
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from notebooks import CELL_SECONDS, METADATA, NOTEBOOKS, ROOT, names, time_limit

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    missing = (
        "not here: no chromium and chromedriver (Debian: apt install chromium chromium-driver)"
    )
    pytest.skip(missing, allow_module_level=True)

SHOTS = ROOT / "runs" / "browser"
SEEN = 100  # milliseconds that a state seen before may take on an idle machine
BADGES = ("colab.research.google.com", "mybinder.org")  # all that a page asks other hosts for
TOKEN = secrets.token_hex(16)  # of the server, for this run
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # else cells out of sight are not in the page
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
}
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--window-size=1300,1500",
]
# a hash of the image that a Slot shows: a new address of the same image is no change
IMAGE = """const [slot, done] = arguments;
fetch(slot.querySelector('img').src).then(r => r.arrayBuffer())
.then(b => crypto.subtle.digest('SHA-256', b))
.then(h => done(new Uint8Array(h).slice(0, 8).join()), e => done('none: ' + e));"""

# when the reader last acted, and when the Slot's image was last there, by the page's clock
CLOCK = """const slot = arguments[0]; window.acted = window.shown = 0;
for (const name of ['keydown', 'click', 'change'])
    document.addEventListener(name,
        e => { if (slot.contains(e.target)) window.acted = performance.now() }, true);
slot.addEventListener('load', e => { window.shown = performance.now() }, true);"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab of its own, over copies of the notebooks; gives its address and its runs."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    home, pages = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("pages")
    for name in names():
        shutil.copy(NOTEBOOKS / f"{name}.ipynb", pages)
    cells = [nbformat.v4.new_code_cell(cell) for cell in FAULTY]
    faulty = nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
    nbformat.write(faulty, pages / "faulty.ipynb")
    for plugin, values in SETTINGS.items():
        path = home / "settings" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = tmp_path_factory.mktemp("runs")
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "NOISOUT_RUNS": str(runs),
        "NOISOUT_RECORD": "",  # with progress bars, as a reader sees them
        "JUPYTER_TOKEN": TOKEN,
    }
    command = (
        f"-m jupyterlab --no-browser --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0 "
        f"--allow-root --LabApp.expose_app_in_browser=True --ServerApp.root_dir={pages}"
    )
    with open(home / "log", "w", encoding="utf-8") as log:
        arguments = [sys.executable, *command.split()]
        server = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/api/status?token={TOKEN}", timeout=2)
            break
        except OSError:
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(0.5)
    with pytest.raises(urllib.error.HTTPError):  # nobody else may use it
        urllib.request.urlopen(f"{address}/api/contents", timeout=20)
    yield address, runs
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()


@pytest.fixture
def page(lab, tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    for flag in [*FLAGS, offline, f"--user-data-dir={tmp_path}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(service=webdriver.ChromeService(DRIVER), options=options)
    driver.set_script_timeout(30)
    yield Page(driver, *lab)
    # a notebook that failed must not burden the next one
    sessions = "window.jupyterapp.serviceManager.sessions"
    driver.execute_async_script(f"{sessions}.shutdownAll().finally(arguments[0])")
    driver.quit()


def slowness():
    """How many times slower than an idle machine this one is now."""
    return time_limit() / CELL_SECONDS


class Page:
    """A notebook in JupyterLab."""

    def __init__(self, driver, address, runs):
        self.driver, self.address, self.runs = driver, address, runs
        self.slowness = slowness()

    def find(self, css, within=None):
        return (within or self.driver).find_elements(By.CSS_SELECTOR, css)

    def wait(self, condition, seconds, what):
        """Until the condition holds; `seconds` on an idle machine."""
        wait = WebDriverWait(
            self.driver, seconds * self.slowness, 0.05, [StaleElementReferenceException]
        )
        try:
            return wait.until(lambda driver: condition())
        except TimeoutException:
            self.driver.save_screenshot(str(SHOTS / "failed.png"))
            told = [(number, *cell) for number, cell in enumerate(self.cells(), 1)]
            told = [cell for cell in told if cell[2] != "idle" or cell[3]]
            pytest.fail(
                f"{what}: not within {seconds * self.slowness:.0f} seconds; cells that wait or "
                f"failed: {told}; see {SHOTS.relative_to(ROOT)}/failed.png"
            )

    def command(self, name, **arguments):
        execute = "window.jupyterapp.commands.execute(arguments[0], arguments[1])"
        self.driver.execute_script(execute, name, arguments)

    def open(self, name):
        self.driver.get(f"{self.address}/lab/tree/{name}.ipynb?reset&token={TOKEN}")
        self.idle(60)
        self.command("application:toggle-left-area")

    def idle(self, seconds):
        status = """const w = window.jupyterapp?.shell.currentWidget;
            return w?.content?.widgets?.length && w?.sessionContext?.session?.kernel?.status"""

        def idle():
            return self.driver.execute_script(status) == "idle"

        self.wait(idle, seconds, "the kernel is idle")

    def cells(self):
        """Of each code cell: its execution count, whether it waits or runs, its tracebacks."""
        return self.driver.execute_script("""
            return [...window.jupyterapp.shell.currentWidget.content.model.cells]
            .filter(cell => cell.type == 'code')
            .map(cell => [cell.executionCount, cell.executionState,
                cell.outputs.toJSON().filter(o => o.output_type == 'error')
                .map(o => [o.ename + ': ' + o.evalue, ...o.traceback].join('\\n'))])""")

    def errors(self):
        return [error for *_, errors in self.cells() for error in errors]

    def start(self):
        self.command("notebook:clear-all-cell-outputs")  # the stored ones
        self.command("notebook:run-all-cells")

    def run(self, seconds=900):
        """Run all cells; the errors of those that failed."""
        self.start()
        time.sleep(1)

        def done():
            return all(state == "idle" for _, state, _ in self.cells())

        self.wait(done, seconds, "all cells have run")
        self.idle(30)
        return self.errors()

    def slots(self):
        """The explorers, as soon as they show their images."""
        found = [slot for slot in self.find(".noisout-slot") if slot.is_displayed()]
        found = [slot for slot in found if self.find(".widget-inline-hbox", slot)]
        for slot in found:

            def images(slot=slot):
                return self.find("img", slot)

            def drawn(images=images):
                return images() and images()[0].get_property("naturalWidth")

            self.wait(drawn, 20, "the first image")
        return found

    def image(self, slot):
        return self.driver.execute_async_script(IMAGE, slot)

    def after(self, slot, act, what):
        """Milliseconds from a key or a click to another image, by the page's clock.

        0 for a handle that is dragged, which has no such moment.
        """
        before = self.image(slot)
        self.driver.execute_script(CLOCK, slot)
        act()
        self.wait(lambda: self.image(slot) not in (before, ""), 60, f"{what}: another image")
        time.sleep(0.3)  # of several images the last one counts
        return self.driver.execute_script("return Math.max(0, window.shown - window.acted)")

    def look(self, name):
        """Screenshots from top to bottom, in both themes."""
        panel = self.find(".jp-WindowedPanel-outer")[0]
        for theme in ("Light", "Dark"):
            self.command("apputils:change-theme", theme=f"JupyterLab {theme}")
            time.sleep(1)
            height = panel.size["height"]
            seen = self.driver.execute_script("return arguments[0].scrollHeight", panel)
            for number, top in enumerate(range(0, seen, height - 60)):
                self.driver.execute_script("arguments[0].scrollTop = arguments[1]", panel, top)
                time.sleep(0.2)
                shot = SHOTS / f"{name}-{theme.lower()}-{number:02}.png"
                shot.write_bytes(self.driver.get_screenshot_as_png())

    def strangers(self):
        """Hosts that the page has asked for something, apart from the badges'."""
        urls = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                urls.append(urlsplit(message["params"].get("request", message["params"])["url"]))
        own = urlsplit(self.address).netloc
        hosts = {url.netloc for url in urls if url.scheme in ("http", "https", "ws", "wss")}
        return hosts - {own, *BADGES}


def moves(page, slot):
    """Every way to move a Slot's controls: a name and a function without arguments."""
    for slider in page.find(".widget-slider", slot):
        label = page.find(".widget-label", slider)[0].text
        assert label, "a slider without a label"
        handle = page.find(".noUi-handle", slider)[0]
        drag = ActionChains(page.driver).drag_and_drop_by_offset(handle, 40, 0)
        yield f"{label}: arrow key", partial(handle.send_keys, Keys.ARROW_RIGHT)
        yield f"{label}: mouse", drag.perform
    for menu in page.find(".widget-dropdown", slot):
        label = page.find(".widget-label", menu)[0].text
        assert label, "a menu without a label"
        choice = page.find("select", menu)[0]
        other = next(
            option.text for option in page.find("option", choice) if not option.is_selected()
        )
        yield f"{label}: {other}", partial(Select(choice).select_by_visible_text, other)
    for button in page.find("button.widget-button", slot):
        yield f"{button.text}: click", button.click
        yield f"{button.text}: space bar", partial(button.send_keys, Keys.SPACE)
    for play in page.find(".widget-play button", slot)[:1]:
        yield "play: click", play.click


def moves_seen_before(page, slot):
    """Step to and fro with the first slider: how long do two states take that were seen before?

    Of three series of moves the fastest counts: the page may still be busy with other things.
    """
    for handle in page.find(".noUi-handle", slot)[:1]:
        ends = [handle.get_attribute(f"aria-value{end}") for end in ("now", "min")]
        keys = [Keys.ARROW_LEFT, Keys.ARROW_RIGHT]
        if ends[0] == ends[1]:
            keys.reverse()
        to_and_fro = [partial(handle.send_keys, key) for key in keys]
        drawn = [page.after(slot, act, "a step") for act in to_and_fro]
        seen = [page.after(slot, act, "a step to a state seen before") for act in to_and_fro * 9]
        fastest = min(statistics.median(seen[i : i + 6]) for i in (0, 6, 12))
        limit = SEEN * slowness()
        print(f"drawn in {drawn[0]:.0f} ms, seen before {fastest:.0f} ms, limit {limit:.0f} ms")
        assert fastest < limit, [round(t) for t in seen]


@pytest.mark.parametrize("name", names())
def test_notebook(page, name):
    page.open(name)
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
    if name == "04_training":
        stop_the_training(page)
    errors = page.run()
    meant = sum("raises-exception" in cell.metadata.get("tags", []) for cell in cells)
    assert len(errors) == meant, "\n".join(errors)
    slots = page.slots()
    explorers = sum("\nExplorer(" in f"\n{cell.source}" for cell in cells)
    assert len(slots) == explorers
    for number, slot in enumerate(slots):
        page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", slot)
        assert page.find("img", slot)[0].get_attribute("title"), "an image without a description"
        moves_seen_before(page, slot)
        for what, act in moves(page, slot):
            print(f"{name}, {what}: {page.after(slot, act, what):.0f} ms")
            alerts = page.find("[role=alert]", slot)
            assert not alerts, alerts[0].text
        (SHOTS / name).with_suffix(f".widget{number}.png").write_bytes(slot.screenshot_as_png)
    page.look(name)
    assert not page.strangers()


def stop_the_training(page):
    """Press the stop button: the loop ends, and the next run goes on from its checkpoint."""

    def stop_buttons():
        shown = [button for button in page.find("button.widget-button") if button.is_displayed()]
        return [button for button in shown if button.text.strip() == "stop"]

    page.start()
    page.wait(stop_buttons, 120, "the stop button")
    time.sleep(5)
    stop_buttons()[0].click()
    page.wait(page.errors, 60, "the loop ends")
    assert "stopped early" in page.errors()[0]
    assert list(page.runs.glob("quick/*checkpoint*"))


FAULTY = [
    """import ipywidgets as widgets
import torch
from noisout_nb.data import species_labels
from noisout_nb.figures import filmstrip, image_grid
from noisout_nb.unet import UNet
from noisout_nb.widgets import Explorer
net = UNet(channels=32, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=())""",
    """def draw(fault):
    if fault == 1:
        species_labels(["sun flower"], ("sunflower", "rose"))
    if fault == 2:
        net(torch.zeros(1, 3, 33, 33), torch.zeros(1, dtype=torch.int64))
    if fault == 3:
        return filmstrip([])
    if fault == 4:
        return None
    return image_grid(torch.full((1, 3, 8, 8), fault / 9))
Explorer(draw, fault=widgets.IntSlider(0, 0, 5))""",
]


def test_a_fault_is_told_in_the_page(page):
    page.open("faulty")
    assert page.run(20) == []
    slot, told = page.slots()[0], []

    def alerts():
        return page.find("[role=alert]", slot)

    handle = page.find(".noUi-handle", slot)[0]
    for _ in range(4):
        handle.send_keys(Keys.ARROW_RIGHT)
        page.wait(lambda: alerts() and alerts()[0].text not in told, 10, "another message")
        told.append(alerts()[0].text)
    further = partial(handle.send_keys, Keys.ARROW_RIGHT)
    assert page.after(slot, further, "after the faults") < 10_000
    assert not alerts()
    print(*told, sep="\n")
    words = ("sunflower", "33", "frames", "nothing to show")
    for message, word in zip(told, words, strict=True):
        assert word in message and message.startswith("ValueError")
