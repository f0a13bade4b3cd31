"""Widgets: when an interrupt stops a loop and when it fails it, threads, errors on the page."""

import signal
import threading
from types import SimpleNamespace

import ipywidgets
import pytest
from PIL import Image

from noisout_nb import widgets
from noisout_nb.picture import Picture
from noisout_nb.plots import plot_lines
from noisout_nb.progress import progress
from noisout_nb.widgets import Again, Explorer, Live


def picture(words="a curve", value=1):
    return Picture(plot_lines({"a": [0, value]}, size=(200, 150)).image, words)


@pytest.fixture
def notebook(monkeypatch):
    """A live notebook: a kernel, no recording, and a page, whose outputs this is."""
    page = []

    def display(widget, display_id):
        page.append(widget.picture.alt)
        return SimpleNamespace(update=lambda widget: page.append("updated"))

    monkeypatch.delenv("NOISOUT_RECORD", raising=False)
    monkeypatch.setattr(widgets, "get_ipython", lambda: SimpleNamespace(kernel=None))
    monkeypatch.setattr(widgets, "display", display)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield page
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "left as it was found"
    signal.signal(signal.SIGINT, usual)


def loop(interrupts, live):
    """Ten steps with an interrupt in each of the steps named; which ones were done."""
    done = []
    for step in range(10):
        if step in interrupts:
            signal.raise_signal(signal.SIGINT)
        done.append(step)
        live.update(picture)
        if live.stopped and not any(later > step for later in interrupts):
            break
    return done


def test_in_a_notebook_one_interrupt_stops_and_a_second_one_raises(notebook):
    with Live("falling") as live:
        assert loop([3], live) == [0, 1, 2, 3]
    assert notebook[0] == "falling" and notebook[-1] == "updated"
    with pytest.raises(KeyboardInterrupt), Live("falling") as live:
        loop([3, 5], live)


def test_where_an_interrupt_is_a_time_limit_it_raises_at_once(notebook, monkeypatch):
    monkeypatch.setenv("NOISOUT_RECORD", "1")
    with pytest.raises(KeyboardInterrupt), Live("falling") as live:
        loop([3], live)
    assert not live.stopped


def test_in_a_script_an_interrupt_raises_and_nothing_is_drawn(notebook, monkeypatch):
    monkeypatch.setattr(widgets, "get_ipython", lambda: None)
    with pytest.raises(KeyboardInterrupt), Live("falling") as live:
        loop([3], live)
    assert notebook == []


def test_in_a_thread_the_loop_runs_and_the_button_stops_it(notebook):
    ran = []

    def run():
        with Live("falling") as live:
            ran.append(loop([], live))
            live._button.click()
            ran.append(live.stopped)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ran == [list(range(10)), True]
    assert notebook[0] == "falling"


def test_a_recording_draws_the_first_and_the_last_state_only(notebook, monkeypatch):
    monkeypatch.setenv("NOISOUT_RECORD", "1")
    drawn, now = [], [0.0]
    monkeypatch.setattr(widgets.time, "monotonic", lambda: now[0])
    with Live("falling", interval=0) as live:
        for step in range(20):
            now[0] += 60  # whatever the drawings took, the next one would be due
            live.update(lambda step=step: drawn.append(step) or picture())
    assert drawn == [0, 19]


def test_slow_drawing_is_done_less_often(notebook, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(widgets.time, "monotonic", lambda: now[0])
    drawn = []

    def draw():
        now[0] += 2  # a drawing takes 2 s, so the next is due after 40 s
        drawn.append(round(now[0]))
        return picture()

    with Live("falling") as live:
        for _ in range(100):
            now[0] += 1
            live.update(draw)
    assert drawn[:3] == [103, 145, 187]


def test_an_explorer_follows_its_controls_and_tells_errors_as_alerts():
    slider = ipywidgets.IntSlider(1, 0, 9)

    def draw(t):
        if t == 5:
            raise ValueError("t is 5 <b>")
        return picture(f"at {t}", t)

    explorer = Explorer(draw, t=slider)
    assert explorer.picture and explorer.picture.alt == "at 1" and slider.description == "t"
    slider.value = 2
    assert explorer.picture.alt == explorer._image.tooltip == "at 2"
    slider.value = 5
    message = explorer._message.value
    assert 'role="alert"' in message and "ValueError: t is 5 &lt;b&gt;" in message
    assert explorer.picture.alt == "at 2", "the last good figure stays"
    slider.value = 6
    assert explorer._message.value == "" and explorer.picture.alt == "at 6"
    data, metadata = explorer._repr_mimebundle_()
    assert data["text/plain"] == metadata["image/png"]["alt"] == "at 6"


def test_an_explorer_takes_generators_and_refuses_what_is_no_figure():
    def draw(seed):
        yield 0.5
        yield picture(f"seed {seed}")

    again = Again("another seed")
    explorer = Explorer(draw, seed=again)
    assert explorer._bar.value == 0.5 and explorer._bar.layout.visibility == "hidden"
    again.click()
    assert explorer.picture and explorer.picture.alt == "seed 1"
    assert explorer._bar.layout.visibility == "hidden"
    for wrong in (lambda: None, lambda: iter([0.5]), lambda: iter([])):
        with pytest.raises(ValueError, match="nothing to show"):
            Explorer(wrong)


@pytest.fixture
def drawn():
    """A film, and the states that it has drawn."""
    states = []

    def film(t, **others):
        states.append(t)
        return Picture(Image.new("RGB", (80, 60), (t, 0, 0)), f"at {t}", colors=2)

    return SimpleNamespace(film=film, states=states)


def test_a_state_seen_before_is_shown_without_drawing_it(drawn):
    slider = ipywidgets.IntSlider(0, 0, 9)
    explorer = Explorer(drawn.film, t=slider)
    shown = {}
    for t in (1, 2, 1, 2):
        slider.value = t
        image = explorer._image
        assert explorer.picture and explorer.picture.alt == image.tooltip == f"at {t}"
        assert shown.setdefault(t, image.value) == image.value != shown.get(3 - t)
        assert image.width == str(explorer.picture.width) == "40"
    assert drawn.states == [0, 1, 2]
    data, _ = explorer._repr_mimebundle_()
    assert data["image/png"] == drawn.film(2).png(), "it is stored as if it had been drawn"


def test_explorers_share_no_figures_and_forget_the_oldest(drawn, monkeypatch):
    monkeypatch.setattr(widgets, "REMEMBERED", 2)
    one, other = (ipywidgets.IntSlider(0, 0, 9) for _ in range(2))
    for slider in (one, other):
        Explorer(drawn.film, t=slider)
    one.value = other.value = 1
    assert drawn.states == [0, 0, 1, 1]
    for t in (2, 1, 3, 1, 2):
        one.value = t
    assert drawn.states[4:] == [2, 3, 2], "when 3 came, 1 had been used after 2"


def test_a_cell_that_was_run_may_have_changed_what_is_drawn(drawn, monkeypatch):
    shell = SimpleNamespace(execution_count=7)
    monkeypatch.setattr(widgets, "get_ipython", lambda: shell)
    slider = ipywidgets.IntSlider(0, 0, 9)
    Explorer(drawn.film, t=slider)
    slider.value = 1
    shell.execution_count = 8
    for t in (0, 1, 0):
        slider.value = t
    assert drawn.states == [0, 1, 0, 1]


def test_errors_and_values_without_a_hash_are_not_remembered():
    calls = []

    def draw(t, files):
        calls.append(t)
        if len(calls) == 2:
            raise OSError("not yet there")
        return picture(f"at {t}", t)

    files = ipywidgets.TagsInput(value=["a"])  # a list
    slider = ipywidgets.IntSlider(0, 0, 9)
    explorer = Explorer(draw, t=slider, files=files)
    for t in (1, 0, 1):
        slider.value = t
    assert calls == [0, 1, 0, 1] and explorer._message.value == ""
    assert explorer.picture and explorer.picture.alt == "at 1"


def test_a_play_button_moves_the_slider_it_is_named_for():
    slider = ipywidgets.IntSlider(3, 1, 9)
    explorer = Explorer(lambda t: picture(f"{t}"), play="t", t=slider)
    play = explorer.children[0].children[0]
    assert (play.value, play.min, play.max) == (3, 1, 9)


@pytest.mark.parametrize("record", ["", "1"])
def test_a_progress_bar_is_left_out_of_recordings(record, monkeypatch, capsys):
    monkeypatch.setenv("NOISOUT_RECORD", record)
    assert list(progress(range(3), description="steps")) == [0, 1, 2]
    assert ("steps" in capsys.readouterr().err) == (not record)
