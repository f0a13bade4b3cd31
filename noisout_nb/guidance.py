"""Stage 6, guidance: wrappers with the model's own call signature, so any sampler takes them.

`guidance_scale` has one meaning in all of them: what the condition adds to the unguided score is
multiplied by it. 0 leaves the condition out, 1 is the conditional model itself, and above 1 the
condition counts for more than it should. It is a number, or a tensor (B,) with one per image. With
a learned variance only the prediction, the first half of the output's channels, is guided.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .forward_process import GaussianDiffusion
from .unet import Encoder, UNet, check_labels, group_norm


class ClassifierFreeGuidance(nn.Module):
    """Ho & Salimans 2022: out(x) + guidance_scale (out(x, y) - out(x)).

    Both outputs come from one call with 2 B images. (Their w is our scale minus 1.) The formula is
    linear in the output, so it holds for eps, v and x0 alike.

    - `interval`: (low, high), the noise levels sigma = sqrt((1 - alpha_bar) / alpha_bar) with low <
      sigma <= high that are guided (Kynkaanniemi et al. 2024). Outside, the output is out(x, y),
      from one call with B images. It needs `process`, the one that the model was trained with, not
      a respaced one.
    - `rescale`: from 0 to 1, how far the standard deviation of each guided output is moved back to
      that of out(x, y), against oversaturation (Lin et al. 2024, who take 0.7).

    Raises ValueError for a model without classes, for an interval that is empty or reversed, and,
    when called, for a scale that does not fit.
    """

    def __init__(
        self,
        model: UNet,
        guidance_scale: float | Tensor,
        *,
        process: GaussianDiffusion | None = None,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
    ):
        super().__init__()
        if getattr(model, "num_classes", None) is None:
            raise ValueError(
                "guidance needs a network with labels: build the UNet with num_classes and train "
                "it with label_dropout"
            )
        if interval is not None:
            _check_interval(interval, process)
        if not 0 <= rescale <= 1:
            raise ValueError(
                f"rescale is {rescale}: it must lie in 0..1; 0 leaves the output as it is"
            )
        self.model = model
        self.num_classes: Any = model.num_classes
        self.null_label: Any = model.null_label
        self.guidance_scale = guidance_scale
        self.process = process
        self.interval = interval
        self.rescale = rescale

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The guided output, shaped like the model's."""
        scale = self._scale(x, t)
        if y is None or (scale == 1).all():
            return self.model(x, t, y)
        no_label = torch.full_like(y, self.null_label)
        both = self.model(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, no_label]))
        conditional, unconditional = both.chunk(2)
        channels = x.shape[1]
        plain = conditional[:, :channels]
        guided = plain + (scale - 1) * (plain - unconditional[:, :channels])
        if self.rescale:
            guided = _rescaled(guided, plain, self.rescale)
        return torch.cat([guided, conditional[:, channels:]], dim=1)

    def _scale(self, x: Tensor, t: Tensor) -> Tensor:
        """The scale of each image, (B, 1, 1, 1) or one for all: 1 outside the interval."""
        scale = _per_image(self.guidance_scale, x)
        if self.interval is None or self.process is None:
            return scale
        low, high = self.interval
        sigma = self.process.extract(self.process.sigmas, t, x.ndim)
        return torch.where((low < sigma) & (sigma <= high), scale, 1.0)


class AutoGuidance(nn.Module):
    """Karras et al. 2024: a weaker model's output, and from there on through the model's own.

    weak(x, y) + guidance_scale (model(x, y) - weak(x, y)): where the two disagree, the weak model,
    less trained or smaller, errs in the same direction as the model, but farther. Both get y, so
    the model may also have no classes. Raises ValueError for a scale that does not fit.
    """

    def __init__(self, model: nn.Module, weak: nn.Module, guidance_scale: float | Tensor):
        super().__init__()
        self.model = model
        self.weak = weak
        self.num_classes: int | None = getattr(model, "num_classes", None)
        self.null_label = self.num_classes
        self.guidance_scale = guidance_scale

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The guided output, shaped like the model's."""
        scale = _per_image(self.guidance_scale, x)
        output = self.model(x, t, y)
        channels = x.shape[1]
        plain = output[:, :channels]
        guided = plain + (scale - 1) * (plain - self.weak(x, t, y)[:, :channels])
        return torch.cat([guided, output[:, channels:]], dim=1)


class ClassifierGuidance(nn.Module):
    """Dhariwal & Nichol 2021, Algorithm 2: eps moves against the gradient of a noisy classifier.

    eps(x_t) - guidance_scale sqrt(1 - alpha_bar_t) g with g = grad log p(y | x_t). The same in the
    other predictions: x_0 moves by guidance_scale (1 - alpha_bar_t) / sqrt(alpha_bar_t) g, and v by
    -guidance_scale sqrt(1 - alpha_bar_t) / sqrt(alpha_bar_t) g.

    `classifier(x_t, t)` returns logits (B, classes) for noisy images. `process` is the one that the
    model was trained with, not a respaced one. The model gets no label: the classifier alone
    steers.
    With DDPM this is the paper's Algorithm 1, whose mean moves by guidance_scale Sigma times the
    gradient, with Sigma = beta_t / sqrt(alpha_t).

    Raises ValueError, when called, without labels, and for labels or a scale that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        process: GaussianDiffusion,
        classifier: nn.Module,
        guidance_scale: float | Tensor,
    ):
        super().__init__()
        self.model = model
        self.process = process
        self.classifier = classifier
        self.guidance_scale = guidance_scale

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The guided output, shaped like the model's; y (B,) is the class to steer to."""
        if y is None:
            raise ValueError(
                "classifier guidance needs labels y to steer to: give one per image, or sample "
                "from the model itself"
            )
        scale = _per_image(self.guidance_scale, x)
        a = self.process.extract(self.process.sqrt_alphas_cumprod, t, x.ndim)
        b = self.process.extract(self.process.sqrt_one_minus_alphas_cumprod, t, x.ndim)
        factor = {"eps": -b, "v": -b / a, "x0": b**2 / a}[self.process.prediction]
        output = self.model(x, t)
        channels = x.shape[1]
        guided = output[:, :channels] + scale * factor * self.gradient(x, t, y)
        return torch.cat([guided, output[:, channels:]], dim=1)

    def gradient(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """grad log p(y | x_t) with respect to x_t, shaped like x."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = self.classifier(x, t)
            check_labels(y, len(x), logits.shape[1])
            log_probability = logits.log_softmax(1).gather(1, y[:, None]).sum()
            return torch.autograd.grad(log_probability, x)[0]


class NoisyClassifier(Encoder):
    """p(y | x_t): the UNet's encoder with attention pooling on top. (x, t) -> logits (B, classes).

    The pooling's query is the average over all positions; keys and values are the positions. The
    logits are multiplied by sqrt(alpha_bar_t): as the image fades, so does the evidence in it, and
    with it the gradient. Otherwise the gradient would stay finite where sqrt(alpha_bar_t) goes to
    0, and move the predicted x_0, by (1 - alpha_bar_t) / sqrt(alpha_bar_t) times itself, far out of
    range. Takes `Encoder`'s arguments.
    """

    def __init__(self, process: GaussianDiffusion, classes: int, **encoder):
        super().__init__(**encoder)
        self.process = process
        width = self.widths[-1]
        heads = width // self.config["head_channels"]
        self.norm = group_norm(width)
        self.pool = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits (B, classes) for x (B, C, H, W) at t (B,)."""
        h, _, _ = self.encode(x, t)
        positions = self.norm(h).flatten(2).transpose(1, 2)
        query = positions.mean(1, keepdim=True)
        pooled, _ = self.pool(query, positions, positions, need_weights=False)
        signal = self.process.extract(self.process.sqrt_alphas_cumprod, t, 2)
        return signal * self.head(pooled[:, 0])


def _rescaled(guided: Tensor, plain: Tensor, amount: float) -> Tensor:
    """`guided` with its standard deviation per image moved by `amount` towards that of `plain`."""
    std = plain.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return guided * (amount * std + 1 - amount)


def _check_interval(interval: tuple[float, float], process: GaussianDiffusion | None) -> None:
    if process is None:
        raise ValueError("an interval of noise levels needs the process: pass process=process")
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(
            f"interval is {interval}: it must be (low, high), noise levels with 0 <= low < high"
        )


def _per_image(scale: float | Tensor, x: Tensor) -> Tensor:
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    if scale.shape not in ((), (len(x),)) or not scale.isfinite().all():
        raise ValueError(
            f"guidance_scale must be one finite number, or one for each of the {len(x)} images, "
            f"not {scale}"
        )
    return scale.reshape(-1, 1, 1, 1)
