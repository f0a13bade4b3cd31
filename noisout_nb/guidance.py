"""Stage 6, guidance: wrappers with the model's own call signature, so that every sampler serves them unchanged."""

from torch import Tensor, cat, nn


class ClassifierFreeGuidance(nn.Module):
    """Push the answer away from the unconditional one (Ho & Salimans 2022): out(x) + scale (out(x, y) - out(x)).

    `guidance_scale` 0 is unconditional, 1 conditional and unguided, above 1 guided. The formula is linear in the
    network's answer, so it serves eps- and v-prediction alike. Raises ValueError for a model without classes.
    """

    def __init__(self, model: nn.Module, guidance_scale: float):
        super().__init__()
        if model.num_classes is None:
            raise ValueError("guidance needs a network with labels: build the UNet with num_classes and train it with label_dropout")
        self.model, self.guidance_scale = model, guidance_scale

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None or self.guidance_scale == 1:
            return self.model(x, t, y)
        unconditional = y.new_full(y.shape, self.model.null_label)
        conditional, unconditional = self.model(x.repeat(2, 1, 1, 1), t.repeat(2), cat([y, unconditional])).chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)
