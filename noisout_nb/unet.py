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
    normalisation" of Dhariwal & Nichol 2021, sec. 3; without `scale_shift_norm` it is added before that norm, as in Ho
    et al. 2020. `resample`, "down" or "up", halves or doubles the sides of both branches on the way (BigGAN's block).
    `rescale_residual` divides the sum by sqrt(2), so that its variance does not grow with depth.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, dropout: float = 0.0, *,
                 scale_shift_norm: bool = True, resample: str | None = None, rescale_residual: bool = False):  # fmt: skip
        super().__init__()
        self.scale_shift_norm, self.rescale_residual = scale_shift_norm, rescale_residual
        self.resample = {None: nn.Identity(), "down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2)}[resample]
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb_proj = nn.Linear(emb_channels, (1 + scale_shift_norm) * out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        emb = self.emb_proj(F.silu(emb))[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.skip(self.resample(x)) + self.conv2(self.dropout(F.silu(h)))
        return h / math.sqrt(2) if self.rescale_residual else h


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, with a residual sum: (B, channels, H, W) -> the same shape."""

    def __init__(self, channels: int, head_channels: int = 32, rescale_residual: bool = False):
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"{channels} channels cannot be shared out among heads of {head_channels}: it must divide them")
        self.heads, self.rescale_residual = channels // head_channels, rescale_residual
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each (B, heads, positions, channels of a head)
        h = F.scaled_dot_product_attention(q, k, v)
        h = x + self.proj(h.transpose(-1, -2).reshape(b, c, height, width))
        return h / math.sqrt(2) if self.rescale_residual else h


class Block(nn.Module):
    """A residual block, followed by attention or by nothing (an Identity)."""

    def __init__(self, res: ResBlock, attention: nn.Module):
        super().__init__()
        self.res, self.attention = res, attention

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.res(x, emb))


class Downsample(nn.Conv2d):
    """A convolution of stride 2: (B, C, H, W) -> (B, C, H/2, W/2). Takes the embedding, as a block does, and ignores it."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Upsample(nn.Conv2d):
    """Each pixel doubled both ways, then a convolution: (B, C, H, W) -> (B, C, 2H, 2W). Ignores the embedding."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


class Encoder(nn.Module):
    """The half of the UNet that goes down, and its middle: what it sees in a noisy picture.

    - `image_size`: the side it is trained at; it only says at which level an attention resolution lies.
      Any H and W divisible by `size_multiple` will do.
    - `patch_size`: p x p pixels are folded into channels at the door and unfolded at the exit; p = 2 makes the
      network about four times cheaper.
    - `channels`, `channel_mults`: the unit of width, and the width of each level in these units. Every level after
      the first has half the resolution. The time is embedded in 4 units.
    - `num_res_blocks`: residual blocks a level (one more on the way up).
    - `attention_resolutions`: sides, in network pixels (image_size / patch_size / 2^level), that get attention, in
      heads of `head_channels`; the bottom level's middle always has it.
    - `scale_shift_norm`, `resblock_updown`, `rescale_residual`: choices of Dhariwal & Nichol 2021, sec. 3: how the time
      enters a residual block, whether BigGAN's residual blocks change the resolution instead of single
      convolutions, and whether every residual sum is divided by sqrt(2).

    The arguments are kept in `config`. Raises ValueError for arguments that do not fit.
    """

    def __init__(self, image_size: int = 32, in_channels: int = 3, channels: int = 64, channel_mults: tuple[float, ...] = (1, 2, 2),
                 num_res_blocks: int = 2, attention_resolutions: tuple[int, ...] = (8,), head_channels: int = 32, dropout: float = 0.0, num_classes: int | None = None,
                 patch_size: int = 1, scale_shift_norm: bool = True, resblock_updown: bool = False, rescale_residual: bool = False):  # fmt: skip
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.in_channels, self.patch_size, self.num_classes, self.null_label = in_channels, patch_size, num_classes, num_classes
        self.size_multiple = patch_size * 2 ** (len(channel_mults) - 1)
        self._check_size(image_size, image_size)
        sides = [image_size // patch_size // 2**level for level in range(len(channel_mults))]
        if not set(attention_resolutions) <= set(sides):
            raise ValueError(f"attention_resolutions {attention_resolutions}: this network's levels have the sides {sides}")

        emb_channels = 4 * channels
        clocks = SinusoidalPositionEmbeddings(channels)
        self.time_mlp = nn.Sequential(clocks, nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes + 1, emb_channels)

        self.widths, self.sides = [round(channels * mult) for mult in channel_mults], sides
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, self.widths[0], 3, padding=1)
        self.skip_widths, width = [self.widths[0]], self.widths[0]  # of what the way down leaves for the way up
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

    def _res_block(self, in_channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
        options = {name: self.config[name] for name in ("dropout", "scale_shift_norm", "rescale_residual")}
        return ResBlock(in_channels, out_channels, 4 * self.config["channels"], resample=resample, **options)

    def _block(self, in_channels: int, out_channels: int, level: int) -> Block:
        attention = nn.Identity()
        res = self._res_block(in_channels, out_channels)
        if self.sides[level] in self.config["attention_resolutions"]:
            attention = AttentionBlock(out_channels, self.config["head_channels"], self.config["rescale_residual"])
        return Block(res, attention)

    def _resample(self, width: int, direction: str) -> nn.Module:
        if self.config["resblock_updown"]:
            return self._res_block(width, width, direction)
        return Downsample(width) if direction == "down" else Upsample(width)

    def _check_size(self, height: int, width: int) -> None:
        if height < 1 or width < 1 or height % self.size_multiple or width % self.size_multiple:
            why = f"halves the side {int(math.log2(self.size_multiple / self.patch_size))} times and folds patches of {self.patch_size}"
            raise ValueError(f"pictures of {height} x {width}: this network {why}, so both sides must be multiples of {self.size_multiple}")

    def _check_input(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x has the shape {tuple(x.shape)}: this network takes (B, {self.in_channels}, H, W)")
        self._check_size(*x.shape[2:])
        if t.shape != x.shape[:1]:
            raise ValueError(f"t has the shape {tuple(t.shape)}: one time a picture, ({len(x)},), is needed")
        if y is None:
            return
        if self.num_classes is None:
            raise ValueError("labels were given, but this network has none: build it with num_classes or leave y out")
        check_labels(y, len(x), self.num_classes, self.null_label)

    def encode(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        """What comes out of the middle (B, widths[-1], h, w), the skip connections, and the embedding of t and y."""
        self._check_input(x, t, y)
        emb = self.time_mlp(t)
        if self.num_classes is not None:
            emb = emb + self.label_emb(torch.full_like(t, self.null_label, dtype=torch.int64) if y is None else y)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        skips = [h]
        for module in self.down:
            h = module(h, emb)
            skips.append(h)
        return self.middle2(self.middle_attention(self.middle1(h, emb)), emb), skips, emb


def check_labels(y: Tensor, count: int, num_classes: int, null_label: int | None = None) -> None:
    """Raises ValueError unless y is int64 (count,) and each in 0..num_classes-1 or the `null_label`."""
    if y.shape != (count,) or y.dtype != torch.int64:
        raise ValueError(f"y is {y.dtype} of shape {tuple(y.shape)}: it must be int64 of shape ({count},)")
    highest = num_classes - 1 if null_label is None else null_label
    if count and not (0 <= y.min() and y.max() <= highest):
        null = "" if null_label is None else f" ({null_label} stands for 'no label')"
        raise ValueError(f"labels run from {int(y.min())} to {int(y.max())}, outside 0..{num_classes - 1}{null}")


class UNet(Encoder):
    """The denoiser of Ho et al. 2020 with the residual block of Dhariwal & Nichol 2021, and their other choices as options.

    `model(x, t, y=None)`: x (B, in_channels, H, W) float, t (B,) int64, y (B,) int64 labels in 0..num_classes-1 or
    None -> (B, out_channels, H, W) float32. With `num_classes`, one more embedding stands for "no label": y None and
    the label `null_label` (= num_classes) mean it. For a learned variance `out_channels` is twice `in_channels`.
    `input_skip` adds x itself to the answer, its channels mixed by a matrix that depends on t and y: the noise in fine detail, which v
    asks for, need not squeeze through the layers where pixels are folded (compare c_skip of Karras et al. 2022).
    The other arguments are `Encoder`'s; `UNet(**model.config)` builds the same network again.
    Raises ValueError for sizes, labels or arguments that do not fit.
    """

    def __init__(self, out_channels: int = 3, input_skip: bool = False, **encoder):
        super().__init__(**encoder)
        self.config |= {"out_channels": out_channels, "input_skip": input_skip}
        skip_widths, width = [*self.skip_widths], self.widths[-1]
        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(self.widths))):
            for _ in range(self.config["num_res_blocks"] + 1):
                self.up.append(self._block(width + skip_widths.pop(), level_width, level))
                width = level_width
            if level > 0:
                self.up.append(self._resample(width, "up"))
        self.norm_out = group_norm(width)
        self.conv_out = zero_init(nn.Conv2d(width, out_channels * self.patch_size**2, 3, padding=1))
        self.input_skip = zero_init(nn.Linear(4 * self.config["channels"], out_channels * self.in_channels)) if input_skip else None

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        h, skips, emb = self.encode(x, t, y)
        for module in self.up:
            h = module(torch.cat([h, skips.pop()], dim=1) if isinstance(module, Block) else h, emb)
        h = self.conv_out(F.silu(self.norm_out(h)))
        answer = F.pixel_shuffle(h, self.patch_size).float()
        if self.input_skip is not None:
            matrix = self.input_skip(F.silu(emb)).unflatten(1, (-1, self.in_channels))
            answer = answer + torch.einsum("boi,bihw->bohw", matrix, x)
        return answer
