"""Stage 3, the network: a UNet that sees a noisy picture and the time t, and answers with what was asked of it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SinusoidalPositionEmbeddings(nn.Module):
    """t as a vector of sines and cosines: int or float (B,) -> float32 (B, dim).

    emb(t) = [sin(w_0 t), ..., sin(w_k t), cos(w_0 t), ..., cos(w_k t)] with w_i = max_period^(-i / (dim/2 - 1)), so
    that the first pair turns fast and the last one hardly at all (Vaswani et al. 2017; Ho et al. 2020, app. B).
    """

    def __init__(self, dim: int, max_period: float = 10_000):
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"dim is {dim}: it must be an even number of at least 4, one sine and one cosine a frequency")
        half = dim // 2
        exponents = torch.arange(half, dtype=torch.float64) / (half - 1)
        self.register_buffer("frequencies", (max_period**-exponents).float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with up to 32 groups of at least four channels, as far as these divide evenly.

    A group of one channel would lose that channel's mean, and with it how bright a picture is.
    """
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 4), 32), channels)


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: the branch that ends in this module starts as "add nothing"."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """Two convolutions around a residual sum: x (B, in_channels, H, W), emb (B, emb_channels) -> (B, out_channels, H, W).

    The time enters by scale and shift of the second norm, h (1 + scale) + shift: the "adaptive group
    normalisation" of Dhariwal & Nichol 2021, sec. 3.1.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb_proj = nn.Linear(emb_channels, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb_proj(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, with a residual sum: (B, channels, H, W) -> the same shape."""

    def __init__(self, channels: int, head_channels: int = 32):
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"{channels} channels cannot be shared out among heads of {head_channels}: it must divide them")
        self.heads = channels // head_channels
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each (B, heads, positions, channels of a head)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(-1, -2).reshape(b, c, height, width))


class Block(nn.Module):
    """A residual block, followed by attention where `attention` says so."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, dropout: float, attention: int | None):
        super().__init__()
        self.res = ResBlock(in_channels, out_channels, emb_channels, dropout)
        self.attention = nn.Identity() if attention is None else AttentionBlock(out_channels, attention)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.res(x, emb))


class Downsample(nn.Conv2d):
    """A convolution of stride 2: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Each pixel doubled both ways, then a convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    """The denoiser of Ho et al. 2020 with the residual block of Dhariwal & Nichol 2021.

    `model(x, t, y=None)`: x (B, in_channels, H, W) float, t (B,) int64, y (B,) int64 labels in 0..num_classes-1 or
    None -> (B, out_channels, H, W) float32. With `num_classes`, one more embedding stands for "no label": y None and
    the label `null_label` (= num_classes) mean it.

    - `image_size`: the side it is trained at; it only says at which level an attention resolution lies.
      Any H and W divisible by `size_multiple` will do.
    - `patch_size`: p x p pixels are folded into channels at the door and unfolded at the exit; p = 2 makes the
      network about four times cheaper.
    - `channels`, `channel_mults`: width of the first level, and of each level in units of it. Every level after
      the first has half the resolution.
    - `num_res_blocks`: residual blocks a level (one more on the way up).
    - `attention_resolutions`: sides, in network pixels (image_size / patch_size / 2^level), that get attention;
      the bottom level's middle always has it.

    The arguments are kept in `config`, so that `UNet(**model.config)` builds the same network again.
    Raises ValueError for sizes, labels or arguments that do not fit.
    """

    def __init__(self, image_size: int = 32, in_channels: int = 3, out_channels: int = 3, channels: int = 64,
                 channel_mults: tuple[int, ...] = (1, 2, 2), num_res_blocks: int = 2,
                 attention_resolutions: tuple[int, ...] = (8,), head_channels: int = 32, dropout: float = 0.0,
                 num_classes: int | None = None, patch_size: int = 1):  # fmt: skip
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.num_classes, self.patch_size = num_classes, patch_size
        self.size_multiple = patch_size * 2 ** (len(channel_mults) - 1)
        self.in_channels, self.null_label = in_channels, num_classes
        self._check_size(image_size, image_size)
        sides = [image_size // patch_size // 2**level for level in range(len(channel_mults))]
        if not set(attention_resolutions) <= set(sides):
            raise ValueError(f"attention_resolutions {attention_resolutions}: this network's levels have the sides {sides}")

        emb_channels = 4 * channels
        self.time_mlp = nn.Sequential(
            SinusoidalPositionEmbeddings(channels),
            nn.Linear(channels, emb_channels),
            nn.SiLU(),
            nn.Linear(emb_channels, emb_channels),
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes + 1, emb_channels)

        def block(in_channels: int, out_channels: int, side: int) -> Block:
            attention = head_channels if side in attention_resolutions else None
            return Block(in_channels, out_channels, emb_channels, dropout, attention)

        widths = [channels * mult for mult in channel_mults]
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, channels, 3, padding=1)
        skips, width = [channels], channels  # widths of what the way down leaves for the way up
        self.down = nn.ModuleList()
        for level, (level_width, side) in enumerate(zip(widths, sides)):
            for _ in range(num_res_blocks):
                self.down.append(block(width, level_width, side))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(Downsample(width))
                skips.append(width)

        self.middle1 = ResBlock(width, width, emb_channels, dropout)
        self.middle_attention = AttentionBlock(width, head_channels)
        self.middle2 = ResBlock(width, width, emb_channels, dropout)

        self.up = nn.ModuleList()
        for level, (level_width, side) in reversed(list(enumerate(zip(widths, sides)))):
            for _ in range(num_res_blocks + 1):
                self.up.append(block(width + skips.pop(), level_width, side))
                width = level_width
            if level > 0:
                self.up.append(Upsample(width))

        self.norm_out = group_norm(width)
        self.conv_out = zero_init(nn.Conv2d(width, out_channels * patch_size**2, 3, padding=1))

    def _check_size(self, height: int, width: int) -> None:
        if height < 1 or width < 1 or height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"pictures of {height} x {width}: this UNet halves the side {int(math.log2(self.size_multiple / self.patch_size))} "
                f"times and folds patches of {self.patch_size}, so both sides must be multiples of {self.size_multiple}"
            )

    def _check_input(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x has the shape {tuple(x.shape)}: this UNet takes (B, {self.in_channels}, H, W)")
        self._check_size(*x.shape[2:])
        if t.shape != x.shape[:1]:
            raise ValueError(f"t has the shape {tuple(t.shape)}: one time a picture, ({len(x)},), is needed")
        if y is None:
            return
        if self.num_classes is None:
            raise ValueError("labels were given, but this UNet has none: build it with num_classes or leave y out")
        if y.shape != x.shape[:1] or y.dtype != torch.int64:
            raise ValueError(f"y is {y.dtype} of shape {tuple(y.shape)}: it must be int64 of shape ({len(x)},)")
        if len(y) and not (0 <= y.min() and y.max() <= self.num_classes):
            raise ValueError(
                f"labels run from {int(y.min())} to {int(y.max())}, outside 0..{self.num_classes - 1} "
                f"({self.num_classes} stands for 'no label')"
            )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self._check_input(x, t, y)
        emb = self.time_mlp(t)
        if self.num_classes is not None:
            emb = emb + self.label_emb(torch.full_like(t, self.null_label) if y is None else y)

        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        skips = [h]
        for module in self.down:
            h = module(h, emb) if isinstance(module, Block) else module(h)
            skips.append(h)
        h = self.middle2(self.middle_attention(self.middle1(h, emb)), emb)
        for module in self.up:
            h = module(torch.cat([h, skips.pop()], dim=1), emb) if isinstance(module, Block) else module(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch_size).float()
