"""Figures: what they draw, refuse and save, how long a large grid takes, and what they import."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from noisout_nb.figures import (
    RATIO,
    bars,
    filmstrip,
    image_grid,
    plot_histograms,
    plot_lines,
    plot_loss,
    plot_tradeoff,
    save_film,
    save_images,
    stack,
)


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("labels", [{}, {"row_labels": ["a", "b"], "arrow": "time"}])
def test_each_pixel_of_a_grid_is_a_square_of_its_colour(labels):
    images = torch.zeros(5, 3, 4, 6, dtype=torch.uint8)
    for i in range(5):
        images[i, :, 1, 2] = torch.tensor([200 + i, 10, 90])
    picture = image_grid(images, columns=3, scale=2, **labels)
    pixels = np.asarray(picture.image)
    squares = [np.argwhere((pixels == (200 + i, 10, 90)).all(2)) for i in range(5)]
    assert all(len(square) == (2 * RATIO) ** 2 for square in squares)
    corners = np.array([square.min(0) for square in squares])
    right, below = 6 * 2 * RATIO + 4 * RATIO, 4 * 2 * RATIO + 4 * RATIO
    expected = [(i // 3 * below, i % 3 * right) for i in range(5)]
    assert (corners - corners[0] == expected).all()


def test_a_thousand_images_take_seconds_not_most_of_a_minute():
    images = noise(1000, 3, 32, 32)
    start = time.process_time()
    picture = image_grid(images)
    assert len(picture.png()) > 1000
    assert time.process_time() - start < 10  # 49 before, 1.6 now, on one core
    assert "32" in picture.alt and 0.8 < picture.image.width / picture.image.height < 1.25


def test_up_to_64_images_stand_in_rows_of_8():
    assert image_grid(noise(64, 1, 4, 4)).alt == "64 images in rows of 8"
    assert image_grid(noise(3, 1, 4, 4)).alt == "3 images in rows of 3"
    assert image_grid(noise(65, 1, 4, 4)).alt == "65 images in rows of 9"


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(3, 8, 8), r"not \(3, 8, 8\); one is image\[None\]"),
        (torch.zeros(0, 3, 8, 8), r"not \(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "got torch.int64"),
        (torch.full((2, 3, 8, 8), torch.nan), r"images\[0\] holds NaN .*2 of 2"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], "one shape"),
        ([], "one shape"),
    ],
)
def test_what_is_no_image_is_refused(images, message):
    for draw in (image_grid, lambda images: save_images(images, "nowhere")):
        with pytest.raises(ValueError, match=message):
            draw(images)


def test_labels_must_fit_and_a_film_be_rectangular():
    with pytest.raises(ValueError, match="3 labels for 2 rows"):
        image_grid(noise(4, 3, 8, 8), columns=2, row_labels=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"equally many frames, got \[2, 3\]"):
        filmstrip([list(noise(2, 3, 8, 8)), list(noise(3, 3, 8, 8))])
    with pytest.raises(ValueError, match="nothing to stack"):
        stack()


def test_a_sample_is_saved_at_its_own_size(tmp_path):
    samples = noise(2, 3, 64, 48)
    paths = save_images(samples, tmp_path / "new folder", "rose")
    assert [path.name for path in paths] == ["rose_000.png", "rose_001.png"]
    for path, sample in zip(paths, samples, strict=True):
        saved = np.asarray(Image.open(path))
        assert saved.shape == (64, 48, 3)
        assert abs(saved / 127.5 - 1 - sample.permute(1, 2, 0).numpy()).max() <= 0.51 / 127.5


def test_a_picture_is_saved_as_png_in_any_case_and_nothing_else(tmp_path):
    picture = plot_lines({"a": [1, 2, 3]})
    for name in ("a.png", "b.PNG", "new/c.Png"):
        assert picture.save(tmp_path / name) is picture
        assert Image.open(tmp_path / name).format == "PNG"
    for name in ("a.jpg", "a.gif", "png"):
        with pytest.raises(ValueError, match=r"\.png \(save_film writes a \.gif\)"):
            picture.save(tmp_path / name)
    assert picture.png() == plot_lines({"a": [1, 2, 3]}).png(), "same input, same bytes"


def test_a_film_is_an_animated_gif(tmp_path):
    frames = [image_grid(torch.full((1, 3, 8, 8), level)) for level in (-1.0, 0.0, 1.0)]
    assert save_film(frames, tmp_path / "film.GIF", seconds=0.2, last=1.0) is frames[-1]
    with Image.open(tmp_path / "film.GIF") as film:
        assert film.format == "GIF" and film.size == frames[0].image.size
        shown = []
        for i in range(3):
            film.seek(i)
            middle = film.width // 2, film.height // 2
            shown.append((film.convert("L").getpixel(middle), film.info["duration"]))
        with pytest.raises(EOFError):
            film.seek(3)
    assert shown == [(0, 200), (128, 200), (255, 1000)]
    for wrong, message in ((frames[:0], "no frames"), ([frames[0], stack(*frames)], "one size")):
        with pytest.raises(ValueError, match=message):
            save_film(wrong, tmp_path / "film.gif")
    with pytest.raises(ValueError, match="must end in .gif"):
        save_film(frames, tmp_path / "film.png")


def test_only_a_plot_can_be_marked():
    plot = plot_lines({"a": [0, 1, 2]}, size=(300, 200))
    marked = plot.marked(1, 1)
    changed = np.argwhere((np.asarray(plot.image.convert("RGB")) != marked.image).any(2))
    column = plot.axes.transData.transform((1, 1))[0]
    assert abs(changed[:, 1].mean() - column) < 2, "at x = 1"
    for picture in (image_grid(noise(1, 3, 8, 8)), stack(plot), marked):
        with pytest.raises(ValueError, match="only a plot can be marked"):
            picture.marked(1)


def test_the_moving_average_runs_through_the_points_not_above_them():
    def curves(losses):
        lines = plot_loss(losses.tolist()).axes.get_lines()
        return {line.get_label(): line.get_xydata().T for line in lines}

    falling = 2.0 * np.exp(-np.arange(3000) / 300) + 1e-3
    x, average = curves(falling)["moving average"]
    assert x[0] == 31 and x[-1] == 2970, "no ends, where fewer points would be averaged"
    assert abs(average / falling[30:-30] - 1).max() < 2e-3, "no lag where the loss falls"
    noisy = falling * np.random.default_rng(0).lognormal(0, 1, 3000)
    drawn = curves(noisy)
    average = drawn["moving average"][1]
    assert 0.45 < (noisy[30:-30] > average).mean() < 0.55, "half of the points lie on each side"
    for step in (31, 1500, 2970):
        around = np.log(noisy[step - 31 : step + 30])
        assert np.isclose(average[step - 31], np.exp(around.mean())), "as many on each side"
    assert np.allclose(drawn["each step"], [np.arange(1, 3001), noisy])


def test_losses_below_zero_and_a_single_one_are_drawn_too():
    assert plot_loss([0.5]).alt == "loss over 1 training steps"
    assert plot_loss([0.5, -0.5, 0.1]).axes.get_yscale() == "linear"
    assert plot_loss([0.5, 0.2]).axes.get_yscale() == "log"


def test_bars_have_their_values_and_errors():
    picture = bars({"one": 1.5, "two": 0.25}, errors={"two": 0.1}, x_label="s", title="Time")
    axes = picture.axes
    assert [bar.get_width() for bar in axes.patches] == [1.5, 0.25]
    assert {text.get_text() for text in axes.texts} == {"1.5", "0.25"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    assert axes.get_title() == "Time" and axes.get_xlabel() == "s"
    ends = [segment[:, 0] for segment in axes.collections[0].get_segments()]
    assert np.allclose(ends, [[1.5, 1.5], [0.15, 0.35]])
    assert picture.alt == "s: one 1.5, two 0.25"
    assert bars({"a": 1.0, "b": 1e5}, log_x=True).axes.get_xscale() == "log"
    wrong = [({}, {}), ({"a": 1}, {"b": 1}), ({"a": float("nan")}, {})]
    for values, errors in wrong:
        with pytest.raises(ValueError, match="no bars|no bar 'b'|finite"):
            bars(values, errors=errors)


def test_bands_and_titles_are_where_they_belong():
    axes = plot_lines({"a": [1, 2]}, bands={"a": [0.5, 1]}, title="U").axes
    band = axes.collections[0].get_paths()[0].vertices
    assert {(0, 0.5), (0, 1.5), (1, 1), (1, 3)} <= {tuple(point) for point in band.tolist()}
    assert axes.get_title() == "U"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"curves": {"a": [[1]]}}, "one axis"),
        ({"curves": {"a": ([1], [1, 2])}}, "1 x and 2 y"),
        ({"curves": {"a": [1, 2]}, "bands": {"a": [1]}}, "1 values for 2 points"),
        ({"curves": {"a": [1]}, "markers": ["b"]}, "no curve 'b'"),
        ({"curves": {"a": [1]}, "faint": ["b"]}, "no curve 'b'"),
        ({"curves": {"a": [1]}, "bands": {"b": [1]}}, "no curve 'b'"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plot_lines(**options)


def test_histograms_have_area_one():
    line = plot_histograms({"x": noise(500)}, bins=10).axes.get_lines()[0]
    x, y = line.get_xdata(), line.get_ydata()
    assert abs(np.trapezoid(y, x) - 1) < 1e-9


def imported(module):
    """The package's modules, and matplotlib, that importing `module` brings."""
    code = f"import sys, {module}; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_figures_import_nothing_that_trains_or_samples_and_metrics_no_matplotlib():
    own = {name for name in imported("noisout_nb.figures") if name.startswith("noisout_nb.")}
    leaves = {"figures", "picture", "grids", "plots", "charts", "dataset", "files"}
    assert own == {f"noisout_nb.{name}" for name in leaves}
    assert "matplotlib" not in imported("noisout_nb.evaluation, noisout_nb.data")


def test_a_tradeoff_has_means_standard_errors_and_the_setting_at_each_point():
    picture = plot_tradeoff({"a": [("1", [0.0, 2.0], [4.0, 8.0]), ("2.5", [3.0], [5.0])]})
    [(points, _, bars)] = picture.axes.containers
    assert points.get_xydata().tolist() == [[1, 6], [3, 5]]
    across, up = (bar.get_segments() for bar in bars)
    assert across[0][:, 0].tolist() == [0, 2] and up[0][:, 1].tolist() == [4, 8]
    assert [text.get_text() for text in picture.axes.texts] == ["1", "2.5"]
    with pytest.raises(ValueError, match="'a' has no points"):
        plot_tradeoff({"a": []})
