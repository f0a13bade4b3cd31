"""Stage 3, the network: a UNet that sees a noisy image x_t and the timestep t, and predicts.

What it predicts (the noise, v or the clean image) is decided by the process that it is trained
with; the network is the same.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class SinusoidalPositionEmbeddings(nn.Module):
    """t as a vector of sines and cosines: int or float (B,) -> float32 (B, dim).

    emb(t) = [sin(w_0 t), ..., sin(w_k t), cos(w_0 t), ..., cos(w_k t)] with frequencies
    w_i = max_period^(-i / (dim/2 - 1)) from 1 down to 1 / max_period (Vaswani et al. 2017; Ho et
    al. 2020, app. B). Raises ValueError unless dim is even and at least 4.
    """

    frequencies: Tensor

    def __init__(self, dim: int, max_period: float = 10_000):
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(
                f"dim is {dim}: it must be even and at least 4, a sine and a cosine per frequency"
            )
        half = dim // 2
        exponents = torch.arange(half, dtype=torch.float64) / (half - 1)
        self.register_buffer("frequencies", (max_period**-exponents).float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """The embedding of t (B,), float32 (B, dim)."""
        angles = t.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with gcd(channels, channels // 4, 32) groups.

    So at most 32 groups, as many as a power of two allows, of at least four channels each. A group
    of one channel would lose that channel's mean, and with it the brightness of the image.

    >>> [group_norm(channels).num_groups for channels in (4, 32, 128, 192, 256)]
    [1, 8, 32, 16, 32]
    """
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 4), 32), channels)


def zero_init(module: AnyModule) -> AnyModule:
    """Set all parameters to zero, so that the branch that ends in `module` starts by adding 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, around a residual sum.

    x (B, in_channels, H, W), emb (B, emb_channels) -> (B, out_channels, H, W).

    - The embedding enters as scale and shift of the second norm, h (1 + scale) + shift, the
      "adaptive group normalisation" of Dhariwal & Nichol 2021, sec. 3. Without `scale_shift_norm`
      it is added before that norm, as in Ho et al. 2020.
    - `resample`, "down" or "up", halves or doubles the sides of both branches (BigGAN's block).
    - `rescale_residual` divides the sum by sqrt(2), so that its variance does not grow with depth.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        *,
        scale_shift_norm: bool = True,
        resample: str | None = None,
        rescale_residual: bool = False,
    ):
        super().__init__()
        self.scale_shift_norm = scale_shift_norm
        self.rescale_residual = rescale_residual
        if resample is None:
            self.resample = nn.Identity()
        else:
            self.resample = nn.AvgPool2d(2) if resample == "down" else nn.Upsample(scale_factor=2)
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb_proj = nn.Linear(emb_channels, (1 + scale_shift_norm) * out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """The residual sum, (B, out_channels, H, W)."""
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        emb = self.emb_proj(F.silu(emb))[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.conv2(self.dropout(F.silu(h)))
        h = self.skip(self.resample(x)) + h
        return h / math.sqrt(2) if self.rescale_residual else h


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, with a residual sum.

    (B, channels, H, W) -> the same shape. Raises ValueError unless `head_channels` divides
    `channels`.
    """

    def __init__(self, channels: int, head_channels: int = 32, rescale_residual: bool = False):
        super().__init__()
        if channels % head_channels:
            raise ValueError(
                f"{channels} channels do not split into heads of {head_channels}: head_channels "
                "must divide the width of every level with attention, and that of the middle"
            )
        self.heads = channels // head_channels
        self.rescale_residual = rescale_residual
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The residual sum, shaped like x."""
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each (B, heads, positions, head_channels)
        h = F.scaled_dot_product_attention(q, k, v)
        h = x + self.proj(h.transpose(-1, -2).reshape(b, c, height, width))
        return h / math.sqrt(2) if self.rescale_residual else h


class Block(nn.Module):
    """A residual block, followed by attention or by nothing (an Identity)."""

    def __init__(self, res: ResBlock, attention: nn.Module):
        super().__init__()
        self.res = res
        self.attention = attention

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, H, W) with the embedding (B, emb_channels) -> (B, out_channels, H, W)."""
        return self.attention(self.res(x, emb))


class Downsample(nn.Conv2d):
    """A convolution of stride 2: (B, C, H, W) -> (B, C, H/2, W/2). Ignores the embedding."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2, padding=1)

    def forward(self, input: Tensor, emb: Tensor | None = None) -> Tensor:
        """Half the sides; `emb` is there so that it can be called as a block is."""
        return super().forward(input)


class Upsample(nn.Conv2d):
    """Each pixel doubled both ways, then a convolution: (B, C, H, W) -> (B, C, 2H, 2W).

    Ignores the embedding.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, input: Tensor, emb: Tensor | None = None) -> Tensor:
        """Twice the sides; `emb` is there so that it can be called as a block is."""
        return super().forward(F.interpolate(input, scale_factor=2, mode="nearest"))


class Encoder(nn.Module):
    """The UNet's way down and its middle.

    - `image_size`: the side of the training images, or (height, width). It only says at which level
      an attention resolution lies: any H and W divisible by `size_multiple` will do.
    - `patch_size`: p x p pixels become channels of one position on entry (space-to-depth), and
      pixels again on exit; p = 2 makes the network about four times cheaper.
    - `channels`, `channel_mults`: the unit of width, and each level's width in this unit. Every
      level after the first has half the resolution. The embedding of t has 4 units.
    - `num_res_blocks`: residual blocks per level (one more on the way up).
    - `attention_resolutions`: the heights, in positions (image_size / patch_size / 2^level), of the
      levels with attention, in heads of `head_channels`; the middle always has it.
    - `num_classes`: the number of labels; None for a network without labels.
    - `scale_shift_norm`, `resblock_updown`, `rescale_residual`: choices of Dhariwal & Nichol 2021,
      sec. 3: how the embedding enters a residual block, whether BigGAN's residual blocks change the
      resolution instead of single convolutions, and whether residual sums are divided by sqrt(2).

    `config` keeps the arguments, so `type(model)(**model.config)` builds the same network, also
    after a way through JSON. Raises ValueError for arguments that do not fit.
    """

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 32,
        in_channels: int = 3,
        channels: int = 64,
        channel_mults: Sequence[float] = (1, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (8,),
        head_channels: int = 32,
        dropout: float = 0.0,
        num_classes: int | None = None,
        patch_size: int = 1,
        scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        rescale_residual: bool = False,
    ):
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config: dict[str, Any] = {name: _plain(v) for name, v in arguments.items()}
        for name in ("in_channels", "channels", "num_res_blocks", "head_channels", "patch_size"):
            _check_count(name, self.config[name])
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.null_label = num_classes  # one label more, which stands for "no label"
        self.size_multiple = patch_size * 2 ** (len(channel_mults) - 1)
        self.widths = [round(channels * mult) for mult in channel_mults]
        self.sides = self._sides()

        self.time_mlp = nn.Sequential(
            SinusoidalPositionEmbeddings(channels),
            nn.Linear(channels, 4 * channels),
            nn.SiLU(),
            nn.Linear(4 * channels, 4 * channels),
        )
        if num_classes is not None:
            _check_count("num_classes", self.config["num_classes"])
            self.label_emb = nn.Embedding(num_classes + 1, 4 * channels)

        width = self.widths[0]
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, width, 3, padding=1)
        self.skip_widths = [width]  # of the outputs that the way up will use
        self.down = nn.ModuleList()
        for level, level_width in enumerate(self.widths):
            for _ in range(num_res_blocks):
                self.down.append(self._block(width, level_width, level))
                width = level_width
                self.skip_widths.append(width)
            if level < len(self.widths) - 1:
                self.down.append(self._resample(width, "down"))
                self.skip_widths.append(width)

        self.middle1 = self._res_block(width, width)
        self.middle_attention = AttentionBlock(width, head_channels, rescale_residual)
        self.middle2 = self._res_block(width, width)

    def encode(
        self, x: Tensor, t: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """The middle's output (B, widths[-1], h, w), the skip connections, and the embedding.

        Raises ValueError for x, t or y that do not fit.
        """
        self._check_input(x, t, y)
        emb = self.time_mlp(t)
        if self.num_classes is not None:
            if y is None:
                y = torch.full_like(t, self.num_classes, dtype=torch.int64)
            emb = emb + self.label_emb(y)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        skips = [h]
        for module in self.down:
            h = module(h, emb)
            skips.append(h)
        h = self.middle1(h, emb)
        h = self.middle_attention(h)
        h = self.middle2(h, emb)
        return h, skips, emb

    # The parts of the constructor

    def _sides(self) -> list[int]:
        """The height of every level, in positions."""
        size = self.config["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        self._check_size(height, width)
        sides = [height // self.patch_size // 2**level for level in range(len(self.widths))]
        resolutions = self.config["attention_resolutions"]
        if not set(resolutions) <= set(sides):
            raise ValueError(
                f"attention_resolutions is {resolutions}, but the levels have the heights {sides}"
            )
        return sides

    def _res_block(self, width: int, out_width: int, resample: str | None = None) -> ResBlock:
        return ResBlock(
            width,
            out_width,
            4 * self.config["channels"],
            self.config["dropout"],
            scale_shift_norm=self.config["scale_shift_norm"],
            resample=resample,
            rescale_residual=self.config["rescale_residual"],
        )

    def _block(self, width: int, out_width: int, level: int) -> Block:
        res = self._res_block(width, out_width)
        if self.sides[level] not in self.config["attention_resolutions"]:
            return Block(res, nn.Identity())
        heads, rescale = self.config["head_channels"], self.config["rescale_residual"]
        return Block(res, AttentionBlock(out_width, heads, rescale))

    def _resample(self, width: int, direction: str) -> nn.Module:
        if self.config["resblock_updown"]:
            return self._res_block(width, width, direction)
        return Downsample(width) if direction == "down" else Upsample(width)

    # Checks

    def _check_size(self, height: int, width: int) -> None:
        multiple = self.size_multiple
        if height < 1 or width < 1 or height % multiple or width % multiple:
            halvings = int(math.log2(multiple // self.patch_size))
            raise ValueError(
                f"images of {height} x {width}: this network takes patches of {self.patch_size} "
                f"pixels and halves the sides {halvings} times, so both must be multiples of "
                f"{multiple}"
            )

    def _check_input(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise ValueError(
                f"x is {x.dtype} of shape {tuple(x.shape)}: this network takes float images "
                f"(B, {self.in_channels}, H, W) in [-1, 1]"
            )
        self._check_size(*x.shape[2:])
        if self.conv_in.weight.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"the network's weights are {self.conv_in.weight.dtype}, too coarse for t: call "
                "model.float(), and for speed run it under torch.autocast"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"t has the shape {tuple(t.shape)}: it must be ({len(x)},), one timestep per image"
            )
        if y is None:
            return
        if self.num_classes is None:
            raise ValueError(
                "labels were given, but this network has none: build it with num_classes, or leave "
                "y out"
            )
        check_labels(y, len(x), self.num_classes, self.null_label)


class UNet(Encoder):
    """The denoiser of Ho et al. 2020 with the residual block of Dhariwal & Nichol 2021.

    `model(x, t, y=None)`: x (B, in_channels, H, W) float, t (B,) int64, y (B,) int64 labels in
    0..num_classes-1 or None -> (B, out_channels, H, W) float32. With `num_classes`, one more
    embedding stands for "no label": y None and the label `null_label` (= num_classes) mean it.

    `out_channels` is `in_channels` unless given; a learned variance needs twice as many. The other
    arguments are `Encoder`'s. Raises ValueError for sizes, labels or arguments that do not fit.
    """

    def __init__(self, *, out_channels: int | None = None, **encoder):
        super().__init__(**encoder)
        if out_channels is None:
            out_channels = self.in_channels
        self.config["out_channels"] = _plain(out_channels)
        _check_count("out_channels", self.config["out_channels"])

        skip_widths = list(self.skip_widths)
        width = self.widths[-1]
        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(self.widths))):
            for _ in range(self.config["num_res_blocks"] + 1):
                self.up.append(self._block(width + skip_widths.pop(), level_width, level))
                width = level_width
            if level > 0:
                self.up.append(self._resample(width, "up"))
        self.norm_out = group_norm(width)
        self.conv_out = zero_init(nn.Conv2d(width, out_channels * self.patch_size**2, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The prediction, float32 (B, out_channels, H, W)."""
        h, skips, emb = self.encode(x, t, y)
        for module in self.up:
            if isinstance(module, Block):
                h = torch.cat([h, skips.pop()], dim=1)
            h = module(h, emb)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch_size).float()


def check_labels(
    y: Tensor, count: int, num_classes: int | None, null_label: int | None = None
) -> None:
    """Raises ValueError unless y is int64 (count,) with values in 0..num_classes-1.

    `null_label` is allowed, too. `num_classes` None leaves the values alone, and so does a y on a
    GPU, where reading it would make the processor wait in every step: the embedding itself stops a
    label out of range there.
    """
    if y.shape != (count,) or y.dtype != torch.int64:
        raise ValueError(
            f"y is {y.dtype} of shape {tuple(y.shape)}: labels are int64 of shape ({count},), one "
            "class per image (from one-hot rows: y.argmax(1); from a column: y.flatten())"
        )
    if num_classes is None or y.device.type != "cpu" or torch.compiler.is_compiling():
        return
    in_range = (y >= 0) & (y < num_classes)
    if null_label is not None:
        in_range |= y == null_label
    if not in_range.all():
        null = "" if null_label is None else f" ({null_label} stands for 'no label')"
        raise ValueError(
            f"labels run from {int(y.min())} to {int(y.max())}, outside 0..{num_classes - 1}{null}"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside the `with`; afterwards every module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def _plain(value: Any) -> Any:
    """An argument without numpy or lists, so that equal networks have equal configurations."""
    if isinstance(value, Sequence):
        return tuple(_plain(entry) for entry in value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return value


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}: it must be an integer of at least 1")
