"""Side by side with diffusers and denoising-diffusion-pytorch: one task, data, batch and machine.

    pip install diffusers denoising-diffusion-pytorch
    NOISOUT_DATA=folder python tools/peers.py            some ten minutes on two cores

Each trains an unconditional UNet of about the same architecture (64, 128, 128 channels, two
residual blocks per level, attention at 16 x 16 and in the middle) on Flowers102 at 32 x 32 in
batches of 32, as its own training program does: images loaded with its own loader and augmentation,
its optimiser, clipping at 1, and its EMA. Steps are taken in turns in one process; memory and
import time are those of a process each. The peers compute in float32, as their programs do unless
told otherwise; noisOut in bfloat16 where the device has it, as its profiles for photographs do, and
once in float32 for comparison. Samples: each library's default (diffusers and
denoising-diffusion-pytorch: 1,000 steps of DDPM), noisOut's 20 steps of DPM-Solver++, as in the
notebooks. This is no test, and the peers are no requirements.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIZE, BATCH = 32, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def photographs():
    return Path(os.environ.get("NOISOUT_DATA", "data")) / "flowers-102" / "jpg"


class NoisOut:
    imports = "import noisout_nb.training, noisout_nb.sampling"
    options, autocast = {}, True

    def __init__(self):
        from noisout_nb.data import Flowers102
        from noisout_nb.forward_process import GaussianDiffusion, cosine_beta_schedule
        from noisout_nb.parallel import get_device, memory_format
        from noisout_nb.training import EMA, Batches, train
        from noisout_nb.unet import UNet

        network = {
            "image_size": SIZE,
            "channels": 64,
            "channel_mults": (1, 2, 2),
            "attention_resolutions": (16,),
        } | self.options
        self.model = UNet(**network).to(
            DEVICE, memory_format=memory_format(get_device(), self.autocast)
        )
        self.process = GaussianDiffusion(cosine_beta_schedule(), "v").to(DEVICE)
        batches = Batches(Flowers102(SIZE), BATCH, device=DEVICE)
        self.steps = train(
            self.model,
            self.process,
            batches,
            EMA(self.model),
            steps=1_000_000,
            learning_rate=1e-4,
            autocast=self.autocast,
        )

    def step(self):
        next(self.steps)

    def sample(self, count):
        from noisout_nb.sampling import sample

        return sample(self.model, self.process, shape=(3, SIZE, SIZE), count=count)


class NoisOutFloat32(NoisOut):
    autocast = False


class NoisOutFolded(NoisOut):
    options = {"patch_size": 2, "attention_resolutions": (8,)}  # a network for 32 x 32 photographs


class Diffusers:
    """As its examples/unconditional_image_generation/train_unconditional.py, with --use_ema."""

    imports = "from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel"

    def __init__(self):
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel
        from PIL import Image
        from torchvision import transforms as T

        self.model = UNet2DModel(
            sample_size=SIZE,
            block_out_channels=(64, 128, 128),
            layers_per_block=2,
            norm_num_groups=16,
            attention_head_dim=32,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        ).to(DEVICE)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6
        )
        self.ema = EMAModel(self.model.parameters(), decay=0.9999, use_ema_warmup=True)
        augment = T.Compose(
            [
                T.Resize(SIZE),
                T.CenterCrop(SIZE),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize([0.5], [0.5]),
            ]
        )

        class Photographs(torch.utils.data.Dataset):
            paths = sorted(photographs().glob("*.jpg"))

            def __len__(self):
                return len(self.paths)

            def __getitem__(self, index):
                return augment(Image.open(self.paths[index]).convert("RGB"))

        self.batches = iter(
            torch.utils.data.DataLoader(Photographs(), BATCH, shuffle=True, num_workers=0)
        )

    def step(self):
        x_0 = next(self.batches).to(DEVICE)
        noise = torch.randn_like(x_0)
        t = torch.randint(1000, (len(x_0),), device=DEVICE)
        loss = torch.nn.functional.mse_loss(
            self.model(self.scheduler.add_noise(x_0, noise, t), t).sample, noise
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        loss.item()

    def sample(self, count):
        from diffusers import DDPMPipeline

        pipeline = DDPMPipeline(self.model, self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(batch_size=count, output_type="np").images


class Lucidrains:
    """As the library's `Trainer`, without its FID."""

    imports = "import denoising_diffusion_pytorch"

    def __init__(self):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from denoising_diffusion_pytorch.denoising_diffusion_pytorch import EMA, Dataset, cycle

        network = Unet(
            64, dim_mults=(1, 2, 2), full_attn=(False, True, True), attn_dim_head=32, attn_heads=4
        )
        self.model = GaussianDiffusion(network, image_size=SIZE, timesteps=1000).to(DEVICE)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, betas=(0.9, 0.99))
        self.ema = EMA(self.model, beta=0.995, update_every=10).to(DEVICE)
        photos = Dataset(photographs(), SIZE, augment_horizontal_flip=True, convert_image_to="RGB")
        self.batches = cycle(
            torch.utils.data.DataLoader(photos, BATCH, shuffle=True, num_workers=os.cpu_count())
        )

    def step(self):
        loss = self.model(next(self.batches).to(DEVICE))
        loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()

    def sample(self, count):
        return self.model.sample(count)


CONTENDERS = {
    "noisOut": NoisOut,
    "noisOut, float32": NoisOutFloat32,
    "noisOut, folded": NoisOutFolded,
    "diffusers": Diffusers,
    "denoising-diffusion-pytorch": Lucidrains,
}


def timed(work) -> float:
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def own_process(code: str) -> float:
    paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(told.stdout)


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--steps", type=int, default=20, help="training steps that are timed")
    arguments.add_argument("--samples", type=int, default=16)
    options = arguments.parse_args()
    rows = {name: {} for name in CONTENDERS}
    for name, contender in CONTENDERS.items():
        code = (
            "import torch, torchvision, time; start = time.perf_counter(); "
            f"{contender.imports}; print(time.perf_counter() - start)"
        )
        rows[name]["import, after torch (s)"] = statistics.median(
            own_process(code) for _ in range(3)
        )
        code = (
            f"import peers; c = peers.{contender.__name__}(); [c.step() for _ in range(4)]; "
            "print(peers.peak())"
        )
        rows[name]["peak memory (GB)"] = own_process(code)
    ready = {name: contender() for name, contender in CONTENDERS.items()}
    taken = {name: [] for name in ready}
    for _ in range(options.steps + 2):
        for name, contender in ready.items():
            taken[name].append(timed(contender.step))
    for name, contender in ready.items():
        rows[name]["million weights"] = sum(p.numel() for p in contender.model.parameters()) / 1e6
        rows[name]["pictures trained a second"] = BATCH * options.steps / sum(taken[name][2:])
        with torch.no_grad():
            rows[name]["seconds a sample"] = (
                timed(partial(contender.sample, options.samples)) / options.samples
            )
    print("| |", " | ".join(rows), "|\n|---|" + "---|" * len(rows))
    for what in rows["noisOut"]:
        print(f"| {what} |", " | ".join(f"{row[what]:.3g}" for row in rows.values()), "|")


def peak() -> float:
    """The most memory that this process has had, in GB: of the device with CUDA, else resident."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
