"""Stage 6, guidance: wrappers with the model's own call signature, so that every sampler serves them unchanged.

The convention of `guidance_scale` in both: what the condition y adds to the unconditional score grad log p(x_t) is
multiplied by it. 0 is unconditional, 1 conditional and unguided, above 1 the condition counts for more than it should.
It is a number, or a tensor (B,) with one for each picture. With a learned variance only the answer's half of the
output is guided.
"""

import torch
from torch import Tensor, nn

from .forward_process import GaussianDiffusion
from .unet import Encoder, check_labels, group_norm


class ClassifierFreeGuidance(nn.Module):
    """Ho & Salimans 2022: out(x) + guidance_scale (out(x, y) - out(x)), in one call of the network with 2 B pictures.

    (Their w is our scale minus 1.) The formula is linear in the network's answer, so it serves eps- and v-prediction
    alike. Raises ValueError for a model without classes and for a scale that does not fit.
    """

    def __init__(self, model: nn.Module, guidance_scale: float | Tensor):
        super().__init__()
        if model.num_classes is None:
            raise ValueError("guidance needs a network with labels: build the UNet with num_classes and train it with label_dropout")
        self.model, self.guidance_scale = model, guidance_scale

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        scale = _per_picture(self.guidance_scale, x)
        if y is None or (scale == 1).all():
            return self.model(x, t, y)
        no_label = torch.full_like(y, self.model.null_label)
        conditional, unconditional = self.model(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, no_label])).chunk(2)
        return _shifted(conditional, (scale - 1) * (conditional - unconditional)[:, : x.shape[1]])


class ClassifierGuidance(nn.Module):
    """Dhariwal & Nichol 2021, Algorithm 2: eps(x_t) - guidance_scale sqrt(1 - alpha_bar_t) grad log p(y | x_t).

    `classifier(x_t, t)` answers with logits (B, classes) for noisy pictures. `process` is the one that the model was trained
    with, not a respaced one. The model is asked without label: the classifier alone steers. v = (eps - sqrt(1 - alpha_bar_t) x_t) /
    sqrt(alpha_bar_t) moves by 1 / sqrt(alpha_bar_t) as much as eps. With DDPM this is the paper's Algorithm 1, whose mean
    moves by guidance_scale Sigma grad log p(y | x_t), with Sigma = beta_t / sqrt(alpha_t).

    Raises ValueError without labels, and for labels or a scale that do not fit.
    """

    def __init__(self, model: nn.Module, process: GaussianDiffusion, classifier: nn.Module, guidance_scale: float | Tensor):
        super().__init__()
        self.model, self.process, self.classifier, self.guidance_scale = model, process, classifier, guidance_scale

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            raise ValueError("classifier guidance needs labels y to steer to: give one a picture, or sample from the model itself")
        scale = _per_picture(self.guidance_scale, x)
        shift = -scale * self.process.extract(self.process.sqrt_one_minus_alphas_cumprod, t, x.ndim) * self.gradient(x, t, y)
        if self.process.prediction == "v":
            shift = shift / self.process.extract(self.process.sqrt_alphas_cumprod, t, x.ndim)
        return _shifted(self.model(x, t), shift)

    def gradient(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """grad log p(y | x_t) with respect to x_t, shaped like x."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = self.classifier(x, t)
            check_labels(y, len(x), logits.shape[1])
            return torch.autograd.grad(logits.log_softmax(1).gather(1, y[:, None]).sum(), x)[0]


class NoisyClassifier(Encoder):
    """p(y | x_t): the encoder half of the UNet with attention pooling on top. (x, t) -> logits (B, classes).

    The pooling asks with the average over all positions, and attends to each of them. The logits are multiplied by
    sqrt(alpha_bar_t): as the picture fades, so does what it can tell, and the gradient with it. Without that the gradient
    would stay finite where sqrt(alpha_bar_t) goes to 0, and throw the predicted x_0, which it moves by
    (1 - alpha_bar_t) / sqrt(alpha_bar_t) times itself, far out of the picture. Takes `Encoder`'s arguments.
    """

    def __init__(self, process: GaussianDiffusion, classes: int, **encoder):
        super().__init__(**encoder)
        self.process = process
        width = self.widths[-1]
        self.norm = group_norm(width)
        self.pool = nn.MultiheadAttention(width, width // self.config["head_channels"], batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, _, _ = self.encode(x, t)
        positions = self.norm(h).flatten(2).transpose(1, 2)
        pooled, _ = self.pool(positions.mean(1, keepdim=True), positions, positions, need_weights=False)
        return self.process.extract(self.process.sqrt_alphas_cumprod, t, 2) * self.head(pooled[:, 0])


def _shifted(output: Tensor, shift: Tensor) -> Tensor:
    channels = shift.shape[1]
    return torch.cat([output[:, :channels] + shift, output[:, channels:]], dim=1)


def _per_picture(scale: float | Tensor, x: Tensor) -> Tensor:
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    if scale.shape not in ((), (len(x),)) or not scale.isfinite().all():
        raise ValueError(f"guidance_scale must be one finite number, or one for each of the {len(x)} pictures, not {scale}")
    return scale.reshape(-1, 1, 1, 1)
