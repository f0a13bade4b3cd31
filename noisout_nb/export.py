"""The UNet as an ONNX graph, for programs without PyTorch: the web site's page runs it.

The graph is written node by node from the network's own modules, and its outputs are compared with
PyTorch's before anything is written. Needs the packages onnx and onnxruntime: `pip install
noisout_nb[site]`.
"""

import copy
import json
import math
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoints import load_model
from .files import atomic_file
from .forward_process import GaussianDiffusion
from .profiles import Profile
from .unet import (
    AttentionBlock,
    Block,
    Downsample,
    ResBlock,
    SinusoidalPositionEmbeddings,
    UNet,
    Upsample,
)

TOLERANCE = 1e-4  # between the outputs, which lie in about [-1, 1]
LOW_BITS = 4  # a weight is stored in 8 + LOW_BITS bits


def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (out, ...) in 12 bits: its high int8 and low uint8 parts, and a scale per row.

    The weight is about (16 high + low) scale, off by at most half a scale, which is 1/2047 of the
    row's largest absolute value.
    """
    rows = weight.float().flatten(1)
    largest = 2 ** (7 + LOW_BITS) - 1
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
    levels = (rows / scale).round().int().reshape(weight.shape)
    high, low = levels >> LOW_BITS, levels & (2**LOW_BITS - 1)
    return high.to(torch.int8), low.to(torch.uint8), scale.reshape(-1, *[1] * (weight.ndim - 1))


def unpack(high: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight that `pack` stored."""
    return (high.float() * 2**LOW_BITS + low.float()) * scale


class _Graph:
    """The nodes of an ONNX graph; every method returns the name of its output."""

    def __init__(self):
        from onnx import helper, numpy_helper  # pyright: ignore[reportMissingImports]

        self.helper, self.numpy_helper = helper, numpy_helper
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}

    def op(self, kind: str, *inputs: str, **attributes) -> str:
        name = f"{kind}{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, value: Any) -> str:
        """float32, int8 and uint8 tensors stay what they are; integers become int64."""
        name = f"constant{len(self.tensors)}"
        array = value.detach().numpy() if isinstance(value, Tensor) else np.array(value)
        self.tensors[name] = self.numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def weight(self, value: Tensor) -> str:
        """A matrix or a kernel, packed in 12 bits; the runtime unpacks it once, when it loads."""
        high, low, scale = (self.constant(part) for part in pack(value.detach()))
        high, low = (self.op("Cast", part, to=1) for part in (high, low))
        sum_ = self.op("Add", self.op("Mul", high, self.constant(torch.tensor(16.0))), low)
        return self.op("Mul", sum_, scale)

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps a side."""
        return self.op("Reshape", x, self.constant(shape))

    def silu(self, x: str) -> str:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def linear(self, x: str, layer: nn.Linear) -> str:
        return self.op("Gemm", x, self.weight(layer.weight), self.constant(layer.bias), transB=1)

    def conv(self, x: str, layer: nn.Conv2d) -> str:
        weight, bias = self.weight(layer.weight), self.constant(layer.bias)
        sides = {"kernel_shape": layer.kernel_size, "strides": layer.stride}
        return self.op("Conv", x, weight, bias, pads=2 * tuple(layer.padding), **sides)

    def norm(self, x: str, layer: nn.GroupNorm, height: int, width: int) -> str:
        groups, channels = layer.num_groups, layer.num_channels
        ones, zeros = torch.ones(groups), torch.zeros(groups)
        grouped = self.reshape(x, 0, groups, -1)
        scaled = (self.constant(ones), self.constant(zeros))
        h = self.op("InstanceNormalization", grouped, *scaled, epsilon=layer.eps)
        h = self.op("Mul", self.reshape(h, 0, channels, height, width), self._channel(layer.weight))
        return self.op("Add", h, self._channel(layer.bias))

    def _channel(self, value: Tensor) -> str:
        return self.constant(value.detach()[:, None, None])

    def upsampled(self, x: str) -> str:
        scales = self.constant(torch.tensor([1.0, 1.0, 2.0, 2.0]))
        how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self.op("Resize", x, "", scales, mode="nearest", **how)


class _UNetGraph(_Graph):
    """The parts of the UNet; `sides` is the (height, width) of what flows through it now."""

    def __init__(self, model: UNet):
        super().__init__()
        self.model = model
        size = model.config["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        self.sides = (height // model.patch_size, width // model.patch_size)

    def resampled(self, x: str, module: nn.Module) -> str:
        height, width = self.sides
        if isinstance(module, nn.AvgPool2d):
            self.sides = (height // 2, width // 2)
            return self.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
        if isinstance(module, nn.Upsample):
            self.sides = (2 * height, 2 * width)
            return self.upsampled(x)
        return x

    def res_block(self, x: str, emb: str, block: ResBlock) -> str:
        before = self.sides
        h = self.silu(self.norm(x, block.norm1, *before))
        h = self.conv(self.resampled(h, block.resample), block.conv1)
        after, self.sides = self.sides, before
        x = self.resampled(x, block.resample)
        emb = self.linear(self.silu(emb), block.emb_proj)
        emb = self.op("Unsqueeze", emb, self.constant((2, 3)))
        if block.scale_shift_norm:
            split = self.constant((block.norm2.num_channels,) * 2)
            scale, shift = f"{emb}_scale", f"{emb}_shift"
            node = self.helper.make_node("Split", [emb, split], [scale, shift], axis=1)
            self.nodes.append(node)
            h = self.norm(h, block.norm2, *after)
            scale = self.op("Add", scale, self.constant(torch.tensor(1.0)))
            h = self.op("Add", self.op("Mul", h, scale), shift)
        else:
            h = self.norm(self.op("Add", h, emb), block.norm2, *after)
        h = self.conv(self.silu(h), block.conv2)
        skip = self.conv(x, block.skip) if isinstance(block.skip, nn.Conv2d) else x
        return self.residual(skip, h, block.rescale_residual)

    def residual(self, x: str, h: str, rescale: bool) -> str:
        total = self.op("Add", x, h)
        if rescale:
            total = self.op("Mul", total, self.constant(torch.tensor(math.sqrt(0.5))))
        return total

    def attention(self, x: str, block: AttentionBlock) -> str:
        height, width = self.sides
        channels = block.norm.num_channels
        qkv = self.conv(self.norm(x, block.norm, height, width), block.qkv)
        qkv = self.reshape(qkv, 0, 3, block.heads, channels // block.heads, height * width)
        q, k, v = (self.op("Gather", qkv, self.constant(i), axis=1) for i in range(3))
        scores = self.op("MatMul", self.op("Transpose", q, perm=[0, 1, 3, 2]), k)
        scale = self.constant(torch.tensor((channels // block.heads) ** -0.5))
        weights = self.op("Softmax", self.op("Mul", scores, scale), axis=-1)
        h = self.op("MatMul", v, self.op("Transpose", weights, perm=[0, 1, 3, 2]))
        h = self.conv(self.reshape(h, 0, channels, height, width), block.proj)
        return self.residual(x, h, block.rescale_residual)

    def module(self, x: str, emb: str, module: nn.Module) -> str:
        """Any of the entries of `down` and `up`."""
        height, width = self.sides
        if isinstance(module, ResBlock):
            return self.res_block(x, emb, module)
        if isinstance(module, Downsample):
            self.sides = (height // 2, width // 2)
            return self.conv(x, module)
        if isinstance(module, Upsample):
            self.sides = (2 * height, 2 * width)
            return self.conv(self.upsampled(x), module)
        assert isinstance(module, Block)
        x = self.res_block(x, emb, module.res)
        attention = module.attention
        return self.attention(x, attention) if isinstance(attention, AttentionBlock) else x

    def embedding(self) -> str:
        position, first, _, second = self.model.time_mlp
        assert isinstance(position, SinusoidalPositionEmbeddings)
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        t = self.op("Unsqueeze", self.op("Cast", "t", to=1), self.constant((1,)))
        angles = self.op("Mul", t, self.constant(position.frequencies[None]))
        waves = self.op("Concat", self.op("Sin", angles), self.op("Cos", angles), axis=1)
        emb = self.linear(self.silu(self.linear(waves, first)), second)
        if self.model.num_classes is not None:
            labels = self.weight(self.model.label_emb.weight)
            emb = self.op("Add", emb, self.op("Gather", labels, "y", axis=0))
        return emb

    def unet(self) -> str:
        model, emb = self.model, self.embedding()
        (height, width), p, c = self.sides, model.patch_size, model.in_channels
        h = self.reshape("x", 0, c, height, p, width, p)
        h = self.op("Transpose", h, perm=[0, 1, 3, 5, 2, 4])
        h = self.conv(self.reshape(h, 0, c * p * p, height, width), model.conv_in)
        skips = [h]
        for module in model.down:
            h = self.module(h, emb, module)
            skips.append(h)
        h = self.res_block(h, emb, model.middle1)
        h = self.attention(h, model.middle_attention)
        h = self.res_block(h, emb, model.middle2)
        for module in model.up:
            if isinstance(module, Block):
                h = self.op("Concat", h, skips.pop(), axis=1)
            h = self.module(h, emb, module)
        h = self.conv(self.silu(self.norm(h, model.norm_out, *self.sides)), model.conv_out)
        return self.op("DepthToSpace", h, blocksize=p, mode="CRD")


def to_onnx(model: UNet) -> bytes:
    """The network as an ONNX file: inputs x, t and y (with classes), batches of any size.

    Weights are packed in 12 bits. Raises RuntimeError where its output and PyTorch's, with the same
    weights, differ by more than 1e-4.
    """
    graph = _UNetGraph(model)
    helper = graph.helper
    output = graph.unet()
    graph.nodes.append(helper.make_node("Identity", [output], ["output"]))
    size = model.config["image_size"]
    sides = [size, size] if isinstance(size, int) else list(size)
    image = helper.make_tensor_value_info("x", 1, ["batch", model.in_channels, *sides])
    inputs = [image, helper.make_tensor_value_info("t", 7, ["batch"])]
    if model.num_classes is not None:
        inputs.append(helper.make_tensor_value_info("y", 7, ["batch"]))
    result = ["batch", model.config["out_channels"], *sides]
    outputs = [helper.make_tensor_value_info("output", 1, result)]
    tensors = list(graph.tensors.values())
    made = helper.make_graph(graph.nodes, "UNet", inputs, outputs, tensors)
    opset = [helper.make_opsetid("", 17)]
    file = helper.make_model(made, opset_imports=opset, ir_version=8).SerializeToString()
    difference = compare(file, packed_model(model))
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"ONNX's output differs from PyTorch's by {difference:.2g}, more than {TOLERANCE}"
        )
    return file


def packed_model(model: UNet) -> UNet:
    """A copy with the weights that the ONNX file has: matrices and kernels rounded to 12 bits."""
    packed = copy.deepcopy(model).eval()
    for parameter in packed.parameters():
        if parameter.ndim > 1:
            parameter.data = unpack(*pack(parameter.data))
    return packed


@torch.no_grad()
def compare(file: bytes, model: UNet, count: int = 3) -> float:
    """Largest difference of the outputs of both, over `count` noisy images at several timesteps."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    generator = torch.Generator().manual_seed(0)
    size = model.config["image_size"]
    sides = (size, size) if isinstance(size, int) else size
    given = {
        "x": torch.randn(count, model.in_channels, *sides, generator=generator),
        "t": torch.arange(count) * 400 + 20,
    }
    if model.num_classes is not None:
        given["y"] = torch.linspace(0, model.num_classes, count).long()  # the last is "no label"
    expected = model(**given)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    [output] = session.run(None, {name: value.numpy() for name, value in given.items()})
    return (torch.from_numpy(np.asarray(output)) - expected).abs().max().item()


def export(weights: str | Path, folder: str | Path, profile: Profile) -> dict[str, int]:
    """Write what the web page needs to `folder`: flowers.bin (gzipped ONNX) and flowers.json.

    The latter has the species, the process's alpha_bar and the profile's sampling settings. Returns
    the files' sizes in bytes. Raises what `load_model` and `to_onnx` raise, and ValueError
    where onnx or onnxruntime are not installed, for a network without labels or with another
    prediction than x0, and for another sampler: the page knows DPM-Solver++ alone.
    """
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"export needs {' and '.join(missing)}: pip install onnx onnxruntime")
    model, process, classes = load_model(weights)
    if model.num_classes is None or process.prediction != "x0" or process.variance == "learned":
        raise ValueError(
            f"{weights} predicts {process.prediction!r} for {len(classes)} classes: the page "
            "samples from networks with classes that predict 'x0', without a learned variance"
        )
    if (profile.sampler, profile.spacing) != ("dpm_solver", "uniform"):
        raise ValueError(
            f"the profile samples with {profile.sampler!r}, spacing {profile.spacing!r}: the page "
            "knows --sampler dpm_solver --spacing uniform"
        )
    content = {
        "flowers.bin": _gzip(to_onnx(model)),
        "flowers.json": json.dumps(_settings(model, process, classes, profile)).encode(),
    }
    for name, data in content.items():
        with atomic_file(Path(folder) / name) as file:
            file.write(data)
    return {name: len(data) for name, data in content.items()}


def _gzip(data: bytes) -> bytes:
    """Weights do not repeat, so Huffman's code alone makes them smaller than the search would."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(data) + packer.flush()


def _settings(
    model: UNet, process: GaussianDiffusion, classes: tuple[str, ...], profile: Profile
) -> dict:
    return {
        "classes": list(classes),
        "image_size": model.config["image_size"],
        "alphas_cumprod": process.exact_alphas_cumprod.tolist(),
        "guidance_scale": profile.guidance_scale,
        "guidance_interval": profile.guidance_interval,
        "steps": profile.sample_steps,
    }
