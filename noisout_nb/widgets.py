"""What moves in a notebook: a figure behind controls, and a figure that follows a loop."""

import html
import io
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import ipywidgets as widgets
import traitlets
from IPython import get_ipython  # pyright: ignore[reportPrivateImportUsage]
from IPython.display import display
from PIL import Image

from .picture import Picture
from .progress import recording

REMEMBERED = 100  # figures of an explorer, each some 50 kB


class _Image(widgets.Image):
    # without a description, the page fails to show the tooltip
    description = traitlets.Unicode().tag(sync=True)


class Slot(widgets.VBox):
    """A place on the page whose figure can be replaced, below some widgets.

    `picture` is the `Picture` shown last; GitHub and paper show that one.
    """

    def __init__(self, above: Sequence[widgets.Widget] = ()):
        self.picture: Picture | None = None
        layout = {"align_self": "flex-start", "max_width": "100%", "height": "auto"}
        self._image: Any = _Image(layout=layout)
        super().__init__([*above, self._image])
        self.add_class("noisout-slot")

    def show(self, picture: Picture, png: bytes | None = None) -> None:
        """Replace the figure. `png`: the picture's PNG, where it is known."""
        self.picture = picture
        with self._image.hold_sync():  # one message instead of three
            self._image.width, self._image.tooltip = str(picture.width), picture.alt
            self._image.value = png or picture.png(fast=True)

    def _repr_mimebundle_(self, **kwargs) -> Any:
        if self.picture is None:
            return super()._repr_mimebundle_(**kwargs)
        data, metadata = self.picture._repr_mimebundle_()
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        return {"application/vnd.jupyter.widget-view+json": view, **data}, metadata

    # else ipywidgets 7, which Colab has, would show the widget without its figure
    _ipython_display_ = None


class Explorer(Slot):
    """Controls and the figure that they change: `draw(**values)` runs whenever one of them moves.

        Explorer(lambda t: image_grid(noisy(t)), t=widgets.IntSlider(500, 0, 999))

    `draw` returns a `Picture`, or is a generator that yields how much is done, 0 to 1, shown as a
    bar, and at last the `Picture`. `controls`: any widgets with a `value`, labelled with their
    names where they have no description; `Again` is a button for them. `play`: the name of a slider
    that a play button moves. The first figure is drawn at once, and its errors are raised; later
    errors are shown above the figure. Until another cell is run, the same values show the same
    figure without calling `draw` again.

    Raises ValueError where `draw` gives no `Picture`.
    """

    def __init__(self, draw: Callable, play: str = "", **controls: Any):
        self._draw, self._controls = draw, controls
        self._remembered = lru_cache(REMEMBERED, typed=True)(self._frame)
        hidden = {"visibility": "hidden", "height": "12px"}
        self._bar: Any = widgets.FloatProgress(max=1, layout=hidden)
        self._message: Any = widgets.HTML()
        for name, control in controls.items():
            control.description = control.description or name
            control.observe(self._moved, "value")
        row = [*controls.values()]
        if play:
            row.insert(0, _play_button(controls[play]))
        row = widgets.Box(row, layout={"flex_flow": "row wrap", "align_items": "center"})
        super().__init__([row, self._bar, self._message])
        self.show(self._drawn(**self._values()))

    def _values(self) -> dict[str, Any]:
        return {name: control.value for name, control in self._controls.items()}

    def _drawn(self, **values) -> Picture:
        drawn = self._draw(**values)
        if isinstance(drawn, Iterator):
            steps, drawn = drawn, None
            try:
                for drawn in steps:
                    if isinstance(drawn, float):
                        self._bar.layout.visibility, self._bar.value = "visible", drawn
            finally:
                self._bar.layout.visibility = "hidden"
        if not isinstance(drawn, Picture):
            raise ValueError(
                f"there is nothing to show: the function that draws gave {drawn!r}, not a Picture"
            )
        return drawn

    def _frame(self, cells_run: int, **values) -> tuple[bytes, str, int | None]:
        """What to remember of a figure: its pixels would take fifty times as much memory."""
        picture = self._drawn(**values)
        return picture.png(fast=True), picture.alt, picture.colors

    def _moved(self, change) -> None:
        values = self._values()
        frame = self._remembered if _hashable(values) else self._frame
        try:
            self._message.value = ""
            png, alt, colors = frame(getattr(get_ipython(), "execution_count", 0), **values)
            self.show(Picture(Image.open(io.BytesIO(png)), alt, colors), png)
        except Exception as error:  # in a callback it would end in a log that nobody reads
            text = html.escape(f"{type(error).__name__}: {error}")
            self._message.value = f'<p role="alert" style="color: #b3261e">{text}</p>'


def _hashable(values: dict[str, Any]) -> bool:
    try:
        hash(tuple(values.values()))
    except TypeError:  # of a file upload, for instance
        return False
    return True


def _play_button(slider: Any) -> widgets.Play:
    play = widgets.Play(slider.value, slider.min, slider.max, slider.step, interval=150)
    widgets.jslink((play, "value"), (slider, "value"))
    return play


class Again(widgets.Button):
    """A button whose `value`, a seed, is the number of clicks so far."""

    value = traitlets.Int(0)

    def __init__(self, description: str):
        super().__init__(description=description)
        self.on_click(lambda button: button.set_trait("value", button.value + 1))


class Live(Slot):
    """A place in the notebook whose figure changes while a loop runs.

        steps = train(...)
        with Live("the training loss, falling") as live:
            for step in steps:
                losses.append(step.loss)
                live.update(lambda: plot_loss(losses))
                if live.stopped:
                    steps.close()

    `update` takes a function that draws a `Picture`, and calls it at most every `interval` seconds,
    and less often where it is slow, so that drawing stays below 5 % of the time. The end of the
    `with` block draws the last state. The description is `alt` throughout.

    `stopped` becomes true when you press the stop button above the figure or interrupt the cell
    once; a second interrupt raises KeyboardInterrupt. So does the first one wherever nobody sits in
    front of the notebook: in recordings and tests (NOISOUT_RECORD), where an interrupt is a time
    limit, and in scripts. In a thread only the button stops. Outside a notebook nothing is drawn.
    """

    def __init__(self, alt: str, interval: float = 1.0):
        tooltip = "end the loop after this step"
        self._button: Any = widgets.Button(description="stop", icon="stop", tooltip=tooltip)
        self._button.on_click(lambda button: setattr(self, "stopped", True))
        # else ipykernel 7.4 lets a click wait until the cell has ended
        vars(self._button.comm).pop("_reply_subshell_id", None)
        super().__init__([self._button])
        self.alt, self.interval, self.stopped = alt, interval, False
        self._waiting: Callable[[], Picture] | None = None
        self._handle: Any = None
        self._next = 0.0
        self._usual: Any = None  # what SIGINT did before

    def update(self, draw: Callable[[], Picture]) -> None:
        """Show what `draw` draws, if it is time to; else remember it for the end."""
        self._waiting = draw
        if time.monotonic() >= self._next:
            self._show_waiting()

    def _show_waiting(self) -> None:
        draw, self._waiting, start = self._waiting, None, time.monotonic()
        if draw is None or not _in_notebook():
            return
        self.show(Picture(draw().image, self.alt))
        self._handle = self._handle or display(self, display_id=True)
        now = time.monotonic()
        self._next = now + max(self.interval, 20 * (now - start))
        if recording():  # it keeps the last figure alone: draw none between the first and the last
            self._next = float("inf")

    def _interrupted(self, *args) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def __enter__(self) -> "Live":
        main_thread = threading.current_thread() is threading.main_thread()
        if main_thread and _in_notebook() and not recording():
            self._usual = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *error) -> None:
        if self._usual is not None:
            signal.signal(signal.SIGINT, self._usual)
            self._usual = None
        self._show_waiting()
        if self._handle is not None:
            self._button.layout.display = "none"
            self._handle.update(self)  # so that the page keeps the last figure, not the first


def _in_notebook() -> bool:
    return hasattr(get_ipython(), "kernel")
