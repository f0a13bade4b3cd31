"""The three libraries that tools/peers.py compares, behind one interface: load, step, sample.

Each is trained as its own training program does it: its optimiser, clipping at 1, its average of
the weights. Each network is class-conditional, and a tenth of the labels is hidden in training.
Only the chosen library is imported.
"""

import os
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, LABEL_DROPOUT, GUIDANCE = 16, 0.1, 3.0
CLASSES = {32: 6, 64: 102}


def autocast(enabled: bool):
    return torch.autocast(DEVICE.type, torch.bfloat16) if enabled else nullcontext()


class NoisOut:
    """The profile `quick` at 32 x 32, `flowers64` at 64 x 64; images are kept in memory."""

    imports = "noisout_nb.training, noisout_nb.sampling"
    settings = {
        32: (("dpm_solver", 5), ("dpm_solver", 10), ("dpm_solver", 20)),
        64: (("dpm_solver", 5), ("dpm_solver", 10)),
    }

    def __init__(self, size, steps=1_000_000, rate=2e-3, bfloat16=False):
        from noisout_nb.data import load_data
        from noisout_nb.forward_process import GaussianDiffusion
        from noisout_nb.parallel import memory_format
        from noisout_nb.profiles import PROFILES
        from noisout_nb.training import EMA, Batches, train
        from noisout_nb.unet import UNet

        profile = PROFILES["quick" if size == 32 else "flowers64"]
        self.profile = replace(profile, learning_rate=rate, train_steps=steps, autocast=bfloat16)
        self.shape, self.bfloat16 = (3, size, size), bfloat16
        self.model = UNet(**profile.network, num_classes=CLASSES[size]).to(
            DEVICE, memory_format=memory_format(DEVICE, bfloat16)
        )
        self.process = GaussianDiffusion.from_config(**profile.process).to(DEVICE)
        self.ema = EMA(self.model, profile.ema_decay)
        batches = Batches(load_data(profile), BATCH, profile.flip, device=DEVICE)
        settings = self.profile.training
        self.steps = train(self.model, self.process, batches, self.ema, **settings)
        self.load = map(batches.__getitem__, count()).__next__

    def step(self):
        next(self.steps)

    def held_out_loss(self, data):
        from noisout_nb.training import held_out_loss

        return held_out_loss(self.model, self.process, data)

    def average(self):
        return self.ema.shadow

    def sample(self, labels, sampler, steps, seed, guidance=1.0):
        from noisout_nb.guidance import ClassifierFreeGuidance
        from noisout_nb.sampling import sample

        model = self.model.eval()
        if guidance != 1:
            interval = self.profile.guidance_interval
            model = ClassifierFreeGuidance(model, guidance, process=self.process, interval=interval)
        options = {"shape": self.shape, "sampler": sampler, "steps": steps, "seed": seed}
        with autocast(self.bfloat16):
            return sample(model, self.process, labels, **options, batch_size=len(labels)).float()


class Peer:
    """What both other libraries share: images decoded by a DataLoader, as their programs do."""

    def __init__(self, size, bfloat16):
        self.size, self.bfloat16 = size, bfloat16
        self.batches = self._epochs(torch.utils.data.DataLoader(images(size), BATCH, shuffle=True))

    @staticmethod
    def _epochs(loader):
        while True:
            for batch in loader:
                if len(batch[0]) == BATCH:
                    yield batch

    def load(self):
        x, y = next(self.batches)
        return x.to(DEVICE), y.to(DEVICE)

    def step(self):
        x, y = self.load()
        self.model.train()
        with autocast(self.bfloat16):
            loss = self.loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.after_backward()
        self.optimizer.zero_grad()
        loss.item()

    @torch.no_grad()
    def held_out_loss(self, data):
        from noisout_nb.data import to_float

        self.model.eval()
        torch.manual_seed(0)
        parts = zip(data.images.split(64), data.labels.split(64), strict=True)
        losses = [self.loss(to_float(x).to(DEVICE), y.to(DEVICE)).item() for x, y in parts]
        return sum(losses) / len(losses)


def images(size):
    """(float image in [-1, 1], label): embedded flowers, or photographs read from their files."""
    if size == 32:
        from noisout_nb.data import ProceduralFlowers

        return ProceduralFlowers(size)
    from torchvision import datasets
    from torchvision import transforms as T

    augment = T.Compose(
        [
            T.Resize(size),
            T.CenterCrop(size),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize([0.5], [0.5]),
        ]
    )
    root = Path(os.environ.get("NOISOUT_DATA") or "data")
    parts = [datasets.Flowers102(root, split, transform=augment) for split in ("train", "test")]
    return torch.utils.data.ConcatDataset(parts)


@torch.no_grad()
def put(model, parameters):
    for target, source in zip(model.parameters(), parameters, strict=True):
        target.copy_(source)


class Diffusers(Peer):
    """As examples/unconditional_image_generation/train_unconditional.py, with labels.

    With its options --use_ema and --lr_scheduler cosine, but v is predicted with the cosine
    schedule: after minutes of training, noise prediction with the linear schedule (the defaults)
    gets the mean colours wrong.
    """

    imports = "diffusers.optimization, diffusers.training_utils, diffusers.models.unets.unet_2d"
    settings = {
        32: (("DPMSolverMultistep", 5), ("DPMSolverMultistep", 10), ("DPMSolverMultistep", 20)),
        64: (("DPMSolverMultistep", 5), ("DPMSolverMultistep", 10)),
    }
    networks = {
        32: {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 1},
        64: {"block_out_channels": (16, 32, 64, 128, 192), "layers_per_block": 1},
    }

    def __init__(self, size, steps=1_000_000, rate=1e-4, bfloat16=False):
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        super().__init__(size, bfloat16)
        levels = len(self.networks[size]["block_out_channels"])
        kinds = ["Attn" if size == 64 and level >= 3 else "" for level in range(levels)]
        self.model = UNet2DModel(
            sample_size=size,
            norm_num_groups=8,
            attention_head_dim=32,
            down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
            num_class_embeds=CLASSES[size] + 1,  # the last one stands for a hidden label
            **self.networks[size],
        ).to(DEVICE)
        self.scheduler = DDPMScheduler(
            1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=rate, betas=(0.95, 0.999), weight_decay=1e-6
        )
        warmup = min(500, steps // 10)
        self.rate = get_scheduler(
            "cosine", self.optimizer, num_warmup_steps=warmup, num_training_steps=steps
        )
        self.ema = EMAModel(self.model.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)

    def loss(self, x, y):
        noise = torch.randn_like(x)
        t = torch.randint(1000, (len(x),), device=x.device)
        hidden = torch.rand(len(x), device=x.device) < LABEL_DROPOUT
        y = y.masked_fill(hidden, CLASSES[self.size])
        output = self.model(self.scheduler.add_noise(x, noise, t), t, y).sample
        return F.mse_loss(output.float(), self.scheduler.get_velocity(x, noise, t))

    def after_backward(self):
        self.optimizer.step()
        self.rate.step()
        self.ema.step(self.model.parameters())

    def average(self):
        return self.ema.shadow_params

    @torch.no_grad()
    def sample(self, labels, sampler, steps, seed, guidance=1.0):
        import diffusers

        scheduler = getattr(diffusers, f"{sampler}Scheduler").from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        self.model.eval()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(len(labels), 3, self.size, self.size, generator=generator).to(DEVICE)
        both = torch.cat([labels, torch.full_like(labels, CLASSES[self.size])])
        with autocast(self.bfloat16):
            for t in scheduler.timesteps:
                if guidance == 1:
                    v = self.model(x, t, labels).sample
                else:
                    given, none = self.model(torch.cat([x, x]), t, both).sample.chunk(2)
                    v = none + guidance * (given - none)
                x = scheduler.step(v.float(), t, x).prev_sample
        return x.clamp(-1, 1)


class DenoisingDiffusionPytorch(Peer):
    """As the library's `Trainer`, with the network of its classifier_free_guidance module.

    v is predicted, with the cosine schedule, and DDIM has eta = 0, as in the library's main class.
    """

    imports = "denoising_diffusion_pytorch.classifier_free_guidance"
    settings = {32: (("DDIM", 10), ("DDIM", 20)), 64: (("DDIM", 10),)}
    networks = {32: (1, 2, 2, 4), 64: (1, 2, 4, 8, 12)}

    def __init__(self, size, steps=1_000_000, rate=1e-4, bfloat16=False):
        from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        super().__init__(size, bfloat16)
        network = Unet(
            16, CLASSES[size], cond_drop_prob=LABEL_DROPOUT, dim_mults=self.networks[size]
        )
        self.diffusion = GaussianDiffusion(
            network, image_size=size, objective="pred_v", ddim_sampling_eta=0.0
        ).to(DEVICE)
        self.model = network
        self.optimizer = torch.optim.Adam(network.parameters(), lr=rate, betas=(0.9, 0.99))
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10).to(DEVICE)

    def loss(self, x, y):
        return self.diffusion((x + 1) / 2, classes=y)

    def after_backward(self):
        self.optimizer.step()
        self.ema.update()

    def average(self):
        return self.ema.ema_model.model.parameters()

    @torch.no_grad()
    def sample(self, labels, sampler, steps, seed, guidance=1.0):
        assert sampler == "DDIM"
        torch.manual_seed(seed)
        network, diffusion = self.model.eval(), self.diffusion
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = steps, True
        if guidance == 1:  # version 2.3.4 fails here: it unpacks the network's output into two

            def unguided(x, t, classes, **_):
                output = network(x, t, classes, cond_drop_prob=0.0)
                return output, output

            network.forward_with_cond_scale = unguided
        with autocast(self.bfloat16):
            x = diffusion.sample(labels, cond_scale=guidance)
        vars(network).pop("forward_with_cond_scale", None)
        return x.float().clamp(0, 1) * 2 - 1


CONTENDERS = {
    "noisOut": NoisOut,
    "diffusers": Diffusers,
    "denoising-diffusion-pytorch": DenoisingDiffusionPytorch,
}
