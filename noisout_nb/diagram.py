"""The UNet as a drawing: its layers in the order in which they run, from left to right."""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from .figures import Picture
from .unet import Block, ResBlock, UNet

COLORS = {
    "convolution": "#BBBBBB",
    "residual block": "#8CCBEE",
    "attention": "#DFA3C3",
    "down": "#F2C45A",
    "up": "#6CC5A8",
}
ROW = 1.7  # distance between two levels
INK = "#444444"


@dataclass
class Layer:
    """One box: its kind, the shape of its output, and what goes in and out beside the main path."""

    kind: str
    channels: int
    level: int
    attention: bool = False
    pushes: bool = False  # its output is kept as a skip connection
    pops: bool = False  # it takes one of those that were kept
    embedded: bool = False  # it takes the embedding of timestep and label

    @property
    def bottom(self) -> float:
        """Height of the box's lower edge in the drawing."""
        return -self.level * ROW - 0.4


def unet_layers(model: UNet) -> list[Layer]:
    """The network's layers in the order in which they run.

    >>> [layer.kind for layer in unet_layers(UNet())][:5]
    ['convolution', 'residual block', 'residual block', 'down', 'residual block']
    """
    level, width = 0, model.widths[0]
    layers = [Layer("convolution", width, 0, pushes=True)]
    for module in model.down:
        if isinstance(module, Block):
            width = model.widths[level]
            layers.append(_block(module, width, level, pushes=True))
        else:
            level += 1
            layers.append(_resample(module, "down", width, level, pushes=True))
    middle = Layer("residual block", width, level, embedded=True)
    layers += [middle, Layer("attention", width, level), middle]
    for module in model.up:
        if isinstance(module, Block):
            width = model.widths[level]
            layers.append(_block(module, width, level, pops=True))
        else:
            level -= 1
            layers.append(_resample(module, "up", width, level))
    return [*layers, Layer("convolution", model.conv_out.out_channels, 0)]


def _block(module: Block, width: int, level: int, **beside: bool) -> Layer:
    attention = any(True for _ in module.attention.parameters())
    return Layer("residual block", width, level, attention, embedded=True, **beside)


def _resample(module: nn.Module, kind: str, width: int, level: int, pushes=False) -> Layer:
    return Layer(kind, width, level, pushes=pushes, embedded=isinstance(module, ResBlock))


def draw_unet(model: UNet, output: str = "predicted $x_0$", alt: str = "") -> Picture:
    """The network as a U: a box per layer with its number of channels, one row per resolution.

    Arrows show the main path, dashed lines the skip connections, the line at the bottom the
    embedding of timestep and label that enters every residual block. `output`: what the network
    predicts.
    """
    layers = unet_layers(model)
    width = 0.33 * (len(layers) + 6)
    figure = Figure(figsize=(width, 0.62 * ROW * len(model.sides) + 1.2))
    axes = figure.add_axes((0.005, 0.01, 0.99, 0.98))
    bus = -(len(model.sides) - 1) * ROW - 1.3
    _draw_embedding(axes, layers, bus, labels=model.num_classes is not None)
    _draw_skips(axes, layers)
    _draw_path(axes, layers, output)
    size = model.config["image_size"]
    for x, align, channels in (
        (-1, "right", model.in_channels),
        (len(layers), "left", layers[-1].channels // model.patch_size**2),
    ):
        shape = f"{channels} x {size} x {size}"
        axes.text(x, -0.62, shape, ha=align, va="center", fontsize=7.5, color=INK)
    for level, side in enumerate(model.sides):
        axes.text(-4.9, -level * ROW, f"{side} x {side}", ha="left", va="center", fontsize=9)
    for kind, color in COLORS.items():
        axes.bar(0, 0, color=color, edgecolor=INK, linewidth=0.6, label=kind)
    axes.legend(loc="lower right", ncols=len(COLORS), frameon=False, fontsize=8.5)
    axes.set(xlim=(-5, len(layers) + 3.4), ylim=(bus - 1.9, 1.1))
    axes.axis("off")
    return Picture.from_figure(figure, alt or _describe(model, output), colors=256)


def _draw_path(axes: Axes, layers: list[Layer], output: str) -> None:
    arrow = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
    ends = [(-0.9, 0.0), *((i + 0.36, -layer.level * ROW) for i, layer in enumerate(layers))]
    for i, layer in enumerate(layers):
        y = -layer.level * ROW
        axes.annotate("", (i - 0.36, y), ends[i], arrowprops=arrow)
        box = {"edgecolor": INK, "linewidth": 0.6}
        axes.bar(i, 0.8, 0.72, layer.bottom, color=COLORS[layer.kind], zorder=2, **box)
        if layer.attention:
            axes.bar(i, 0.22, 0.72, layer.bottom, color=COLORS["attention"], zorder=2, **box)
        axes.text(i, y, str(layer.channels), ha="center", va="center", fontsize=7.5, zorder=3)
    axes.text(-1, 0, "$x_t$", ha="right", va="center", fontsize=12)
    last = len(layers) - 1
    axes.annotate("", (last + 0.9, 0), ends[-1], arrowprops=arrow)
    axes.text(last + 1, 0, output.replace(" ", "\n", 1), ha="left", va="center", fontsize=9.5)


def _draw_skips(axes: Axes, layers: list[Layer]) -> None:
    kept, lanes = [], [0] * (1 + max(layer.level for layer in layers))
    line = {"color": INK, "linewidth": 0.9, "linestyle": (0, (3, 2))}
    for i, layer in enumerate(layers):
        if layer.pushes:
            kept.append(i)
        if layer.pops:
            lanes[layer.level] += 1
            source, top = kept.pop(), layer.bottom + 0.8
            lane = top + 0.17 * lanes[layer.level]
            axes.plot([source, source, i], [top, lane, lane], **line)
            head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}
            axes.annotate("", (i, top), (i, lane), arrowprops=head | {"color": INK})


def _draw_embedding(axes: Axes, layers: list[Layer], bus: float, labels: bool) -> None:
    color = "#9A6324"
    arrow = {"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}
    blocks = [i for i, layer in enumerate(layers) if layer.embedded]
    axes.plot([-1, blocks[-1]], [bus, bus], color=color, linewidth=1.4)
    for i in blocks:
        axes.annotate("", (i, layers[i].bottom), (i, bus), arrowprops=arrow | {"linewidth": 0.8})
    words = ["timestep $t$: sines, cosines, MLP", *["label $y$: embedding"] * labels]
    for x, text in zip((-1, 5.5), words, strict=False):
        axes.annotate("", (x, bus), (x, bus - 0.6), arrowprops=arrow)
        style = {"boxstyle": "round,pad=0.3", "facecolor": "#F6E7D2", "edgecolor": color}
        axes.text(x, bus - 0.8, text, ha="center", va="center", fontsize=8.5, bbox=style)
    axes.text(blocks[-1] + 0.3, bus, "embedding", va="center", fontsize=8.5, color=color)


def _describe(model: UNet, output: str) -> str:
    sides = ", ".join(f"{side} x {side}" for side in model.sides)
    return (
        f"The UNet as a U: from x_t down on the left over {sides} with ever more channels, through "
        f"the middle, and up on the right to the {output.replace('$', '')}; skip connections lead "
        "across, and the "
        "embedding of timestep and label enters every residual block from below"
    )
