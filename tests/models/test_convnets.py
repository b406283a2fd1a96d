"""ResNet and MobileNet from torchvision- and timm-named files against a slow numpy network that reads the same names."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxvl.interop import load
from jaxvl.interop.keys import ConfigError
from jaxvl.mesh import MeshOptions, make_mesh, shardings
from jaxvl.models import kinds
from jaxvl.models.flops import mobilenet_flops, resnet_flops
from jaxvl.models.mobilenet import BLOCKS, MobilenetOptions
from jaxvl.models.resnet import ResnetOptions, resolve
from jaxvl.models.rules import RULES

STAGES, WIDTH = (1, 2), 4
CHANNELS = [int(c * 0.125) for c, _ in BLOCKS]
PLACES = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), *((3, i) for i in range(6)), (4, 0), (4, 1)]


def files(units):
    """Random tensors of (convolution, its norm, shape), with the buffers and the head that published files have."""
    rng = np.random.default_rng(0)
    out = {"fc.weight": np.zeros((3, 4), np.float32), "fc.bias": np.zeros(3, np.float32)}
    for conv, norm, shape in units:
        out[f"{conv}.weight"] = rng.normal(size=shape).astype(np.float32) * (2 / np.prod(shape[1:])) ** 0.5
        for name, value in (("weight", rng.uniform(0.5, 1.5, shape[0])), ("bias", rng.normal(size=shape[0]) * 0.3), ("running_mean", rng.normal(size=shape[0]) * 0.3),
                            ("running_var", rng.uniform(0.5, 1.5, shape[0]))):  # fmt: skip
            out[f"{norm}.{name}"] = value.astype(np.float32)
        out[f"{norm}.num_batches_tracked"] = np.array(7)
    return out


def resnet_files():
    units, into = [("conv1", "bn1", (WIDTH, 3, 7, 7))], WIDTH
    for stage, count in enumerate(STAGES, 1):
        width = WIDTH * 2 ** (stage - 1)
        for b in range(count):
            layer = f"layer{stage}.{b}"
            units += [
                (f"{layer}.conv{i}", f"{layer}.bn{i}", shape)
                for i, shape in ((1, (width, into, 1, 1)), (2, (width, width, 3, 3)), (3, (4 * width, width, 1, 1)))
            ]
            if not b:
                units.append((f"{layer}.downsample.0", f"{layer}.downsample.1", (4 * width, into, 1, 1)))
            into = 4 * width
    return files(units)


def mobilenet_files():
    units, into = [("conv_stem", "bn1", (4, 3, 3, 3))], 4
    for (stage, i), out in zip(PLACES, CHANNELS, strict=True):
        block = f"blocks.{stage}.{i}"
        units += [(f"{block}.conv_dw", f"{block}.bn1", (into, 1, 3, 3)), (f"{block}.conv_pw", f"{block}.bn2", (out, into, 1, 1))]
        into = out
    return files(units)


def conv(x, w, stride):
    """x [image, channel, height, width], w [out, in / groups, k, k], padded by half the kernel; groups by the shapes."""
    k, pad = w.shape[-1], w.shape[-1] // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    high, wide = ((n - k) // stride + 1 for n in x.shape[2:])
    patches = np.stack(
        [x[:, :, i : i + stride * (high - 1) + 1 : stride, j : j + stride * (wide - 1) + 1 : stride] for i in range(k) for j in range(k)], 2
    )
    w = w.reshape(*w.shape[:2], -1)
    return np.einsum("nckhw,ck->nchw", patches, w[:, 0]) if w.shape[1] == 1 and x.shape[1] > 1 else np.einsum("nckhw,ock->nohw", patches, w)


def apply(f, conv_name, norm_name, x, stride, batch=False):
    y = conv(x, f[f"{conv_name}.weight"].astype(np.float64), stride)
    g, b, m, v = (f[f"{norm_name}.{k}"].astype(np.float64)[:, None, None] for k in ("weight", "bias", "running_mean", "running_var"))
    if batch:
        m, v = y.mean((0, 2, 3), keepdims=True)[0], y.var((0, 2, 3), keepdims=True)[0]
    return (y - m) / np.sqrt(v + 1e-5) * g + b


def slow_resnet(f, x, batch=False):
    x = np.maximum(apply(f, "conv1", "bn1", x, 2, batch), 0)
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    high, wide = ((n - 3) // 2 + 1 for n in x.shape[2:])
    x = np.max([x[:, :, i : i + 2 * high - 1 : 2, j : j + 2 * wide - 1 : 2] for i in range(3) for j in range(3)], 0)
    for stage, count in enumerate(STAGES, 1):
        for b in range(count):
            layer, stride = f"layer{stage}.{b}", 2 if stage > 1 and not b else 1
            y = np.maximum(apply(f, f"{layer}.conv1", f"{layer}.bn1", x, 1, batch), 0)
            y = np.maximum(apply(f, f"{layer}.conv2", f"{layer}.bn2", y, stride, batch), 0)
            y = apply(f, f"{layer}.conv3", f"{layer}.bn3", y, 1, batch)
            x = np.maximum(y + (apply(f, f"{layer}.downsample.0", f"{layer}.downsample.1", x, stride, batch) if not b else x), 0)
    return x


def slow_mobilenet(f, x):
    relu6 = lambda x: np.clip(x, 0, 6)
    x = relu6(apply(f, "conv_stem", "bn1", x, 2))
    for (stage, i), (_, stride) in zip(PLACES, BLOCKS, strict=True):
        block = f"blocks.{stage}.{i}"
        x = relu6(apply(f, f"{block}.conv_dw", f"{block}.bn1", x, stride))
        x = relu6(apply(f, f"{block}.conv_pw", f"{block}.bn2", x, 1))
    return x


@pytest.mark.parametrize("make, slow", [(resnet_files, slow_resnet), (mobilenet_files, slow_mobilenet)])
def test_published_files_give_the_numbers_of_the_slow_network(make, slow, tmp_path):
    tensors = make()
    save_file(tensors, tmp_path / "model.safetensors")
    found = load.load(tmp_path / "model.safetensors")
    assert set(found.dropped) == {n for n in tensors if n.startswith("fc.") or n.endswith("tracked")}
    options = found.model.image._replace(dtype="float32", pool="avg+max")
    kind = kinds.of(options)
    module = kind.module(kind.resolve(options, "image"))
    images = np.random.default_rng(1).normal(size=(2, 37, 32, 3)).astype(np.float32)
    run = jax.jit(lambda p, x: module.apply({"params": p}, x, maps=True))
    tower = run(found.params["image"], images)
    want = slow(tensors, images.astype(np.float64).transpose(0, 3, 1, 2))
    np.testing.assert_allclose(tower.maps[-1].transpose(0, 3, 1, 2), want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(tower.pooled, want.mean((2, 3)) + want.max((2, 3)), rtol=1e-3, atol=1e-4)
    assert tower.pooled.shape[1] == kind.features(options) and tower.tokens.shape[1] == want.shape[2] * want.shape[3]
    shardings(found.params, RULES, make_mesh(MeshOptions(2, 4, 1)))
    grads = jax.grad(lambda p: run(p, images).pooled.sum())(found.params["image"])
    moving = [p[-1].key for p, g in jax.tree_util.tree_leaves_with_path(grads) if np.asarray(g).any()]
    assert set(moving) == {"kernel"}, "frozen statistics and their affine maps have no gradient"


def test_statistics_of_the_batch(tmp_path):
    tensors = resnet_files()
    save_file(tensors, tmp_path / "model.safetensors")
    frozen = load.load(tmp_path / "model.safetensors")
    module = kinds.IMAGE["resnet"].module(frozen.model.image._replace(dtype="float32", statistics="batch"))
    images = np.random.default_rng(1).normal(size=(3, 32, 32, 3)).astype(np.float32)
    variables = module.init(jax.random.key(0), images)
    params = jax.tree_util.tree_map_with_path(lambda path, _: _at(frozen.params["image"], path), variables["params"])
    stats = jax.tree_util.tree_map_with_path(lambda path, _: _at(frozen.params["image"], path), variables["batch_stats"])
    run = jax.jit(
        lambda x, train: module.apply({"params": params, "batch_stats": stats}, x, train=train, maps=True, mutable=["batch_stats"]),
        static_argnums=1,
    )
    tower, after = run(images, True)
    x = images.astype(np.float64).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(tower.maps[-1].transpose(0, 3, 1, 2), slow_resnet(tensors, x, batch=True), rtol=1e-3, atol=1e-3)
    stem = conv(x, tensors["conv1.weight"].astype(np.float64), 2)
    np.testing.assert_allclose(
        after["batch_stats"]["stem_norm"]["var"], 0.9 * tensors["bn1.running_var"] + 0.1 * stem.var((0, 2, 3), ddof=1), rtol=1e-4
    )
    np.testing.assert_allclose(run(images, False)[0].maps[-1].transpose(0, 3, 1, 2), slow_resnet(tensors, x), rtol=1e-3, atol=1e-4)


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_against_torch():
    torch = pytest.importorskip("torch")
    f = {k: torch.from_numpy(np.asarray(v, np.float64)) for k, v in resnet_files().items()}
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 3, 32, 32)))
    norm = lambda name, y: torch.nn.functional.batch_norm(
        y, f[f"{name}.running_mean"], f[f"{name}.running_var"], f[f"{name}.weight"], f[f"{name}.bias"]
    )
    stem = torch.relu(norm("bn1", torch.nn.functional.conv2d(x, f["conv1.weight"], stride=2, padding=3)))
    np.testing.assert_allclose(
        np.maximum(apply({k: v.numpy() for k, v in f.items()}, "conv1", "bn1", x.numpy(), 2), 0), stem.numpy(), rtol=1e-9, atol=1e-9
    )


def test_sizes_and_options():
    assert resolve(ResnetOptions()).stages == (3, 4, 6, 3) and kinds.IMAGE["resnet"].features(ResnetOptions()) == 2048
    assert 4.0e9 < resnet_flops(ResnetOptions(), 224, 224) / 2 < 4.2e9, "4.1 G multiply-adds"
    assert 5.6e8 < mobilenet_flops(MobilenetOptions(), 224, 224) / 2 < 5.8e8, "569 M multiply-adds in the paper's table 4"
    for options, message in (
        (ResnetOptions(depth=18), "image.depth=18 is none of 50, 101, 152"), (ResnetOptions(stages=(1,)), "are not those of depth 50"),
        (ResnetOptions(pool="mean"), "image.pool='mean'"), (MobilenetOptions(multiplier=0.01), "leaves no channel"), (MobilenetOptions(statistics="x"), "none of frozen, batch"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            kinds.of(options).resolve(options, "image")
    with pytest.raises(ConfigError, match="basic blocks"):
        load.convnets.describe({"conv1.weight": None, "layer1.0.conv1.weight": None})
