"""Files that are damaged, cut short, foreign or hostile, and disks that are full: refused with words, and nothing good is lost."""

import functools
import hashlib
import http.server
import os
import pickle
import random
import signal
import tarfile
import threading
from urllib.error import URLError

import pytest
import torch
from grow import grow
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from noisout_nb import evaluation, training
from noisout_nb.data import Flowers102, ProceduralFlowers, atomic_file
from noisout_nb.forward_process import GaussianDiffusion, cosine_beta_schedule
from noisout_nb.sampling import ddpm
from noisout_nb.training import EMA, Batches, load_safely, train
from noisout_nb.unet import UNet


def losses_of(checkpoint, stop=4, **options):
    """A training of four steps that saves after each, or goes on from the checkpoint."""
    torch.manual_seed(0)
    model, losses = UNet(channels=16, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(), head_channels=16), []
    process, batches = GaussianDiffusion(cosine_beta_schedule(), "v"), Batches(ProceduralFlowers(16, 8), 2)
    for step in train(model, process, batches, EMA(model), steps=4, learning_rate=1e-3, checkpoint=checkpoint, save_every=1, losses=losses, **options):
        if step.index == stop:
            break
    return losses


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a good checkpoint."""
    path = tmp_path_factory.mktemp("good") / "run.pth"
    losses_of(path, stop=2)
    return path.read_bytes()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, list) else a == b


def test_flipped_bits_and_cut_files_are_noticed(good, tmp_path):
    path, dice = tmp_path / "run.pth", random.Random(0)
    path.write_bytes(good)
    whole, refused = load_safely(path), 0
    for attempt in range(150):
        data = bytearray(good)
        if attempt % 3:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        else:
            del data[dice.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            assert same(load_safely(path), whole), "a damaged checkpoint was taken for good"
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        assert path.read_bytes() == data, "the damaged file was touched"
    assert refused > 100


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_a_file_that_wants_to_run_code_is_refused(dump, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("evil.pth", "wb") as file:
        dump(Evil(), file)
    with pytest.raises(ValueError, match="damaged or no PyTorch file"):
        load_safely(tmp_path / "evil.pth")
    assert not (tmp_path / "evil").exists()


def test_a_full_disk_leaves_the_last_checkpoint(good, tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    path = tmp_path / "run.pth"
    path.write_bytes(good)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, usual[0][1]))  # no file may grow beyond that
    try:
        with pytest.raises((OSError, RuntimeError)):
            losses_of(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual[0])
        signal.signal(signal.SIGXFSZ, usual[1])
    assert path.read_bytes() == good and [file.name for file in tmp_path.iterdir()] == ["run.pth"]
    assert losses_of(path) == losses_of(None), "and then the training goes on"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), atomic_file(tmp_path / "file" / "run.pth"):
        pass


def test_another_training_and_another_version_are_told_apart(good, tmp_path):
    path = tmp_path / "run.pth"
    for change in ({"betas": [0.1]}, {"batch_size": 4}, {"channels": 32}):
        path.write_bytes(good)
        state = load_safely(path)
        state["identity"] |= change
        torch.save(state, path)
        with pytest.raises(ValueError, match=f"another training .{next(iter(change))}"):
            losses_of(path)
    torch.save({"format": 2}, path)
    with pytest.raises(ValueError, match="not a training checkpoint"):
        losses_of(path)


def test_autocast_is_for_devices_that_have_it_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "has_bfloat16", lambda device: False)
    plain = losses_of(None, autocast=True)
    assert plain == losses_of(None)
    monkeypatch.setattr(training, "has_bfloat16", lambda device: True)
    half = losses_of(None, autocast=True)
    assert half != plain and torch.allclose(torch.tensor(half), torch.tensor(plain), rtol=0.02)
    losses_of(tmp_path / "run.pth", stop=2, autocast=True)
    assert losses_of(tmp_path / "run.pth", autocast=True) == half


def test_inception_looks_at_any_size_and_without_a_network_says_what_to_do(monkeypatch):
    build = evaluation.inception_v3
    monkeypatch.setattr(evaluation, "inception_v3", lambda weights: build(init_weights=False))  # untrained
    assert evaluation.extract_features(evaluation.InceptionFeatures(), torch.zeros(2, 3, 32, 32)).shape == (2, 2048)

    def no_network(weights):
        raise URLError("no route to host")

    monkeypatch.setattr(evaluation, "inception_v3", no_network)
    with pytest.raises(RuntimeError, match="could not be downloaded.*no route to host.*inception_v3.*checkpoints"):
        evaluation.InceptionFeatures()


class Host(http.server.SimpleHTTPRequestHandler):
    """Serves three tiny photographs in Flowers102's layout, or, while `fault` is set, a proxy's page, whole or cut short."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.server.fault is None:
            return super().do_GET()
        page = b"<html>Please log in</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(page) + 1000 * (self.server.fault == "interrupted")))
        self.end_headers()
        self.wfile.write(page)


@pytest.fixture
def host(tmp_path, monkeypatch):
    folder = tmp_path / "host"
    (folder / "jpg").mkdir(parents=True)
    for i in (1, 2, 3):
        Image.new("RGB", (40, 48), (60 * i,) * 3).save(folder / "jpg" / f"image_{i:05}.jpg")
    with tarfile.open(folder / "102flowers.tgz", "w:gz") as archive:
        archive.add(folder / "jpg", "jpg")
    savemat(folder / "imagelabels.mat", {"labels": [[1, 2, 3]]})
    savemat(folder / "setid.mat", {"trnid": [[1]], "valid": [[2, 3]], "tstid": [[1]]})
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", {
        name: (file, hashlib.md5((folder / file).read_bytes()).hexdigest())
        for name, (file, _) in datasets.Flowers102._file_dict.items()
    })  # fmt: skip
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Host, directory=folder)) as server:
        server.fault = None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.Flowers102, "_download_url_prefix", f"http://127.0.0.1:{server.server_port}/")
        yield server
        server.shutdown()


@pytest.mark.parametrize("fault", ["proxy page", "interrupted"])
def test_a_download_that_fails_says_so_and_the_next_one_heals(fault, host, tmp_path):
    root, host.fault = tmp_path / "data", fault
    for _ in range(2):  # what the first try left must not make the second one believe that all is well
        with pytest.raises(RuntimeError, match="could not be downloaded"):
            Flowers102(32, "val", root)
    assert not list(root.glob("**/*.jpg"))
    host.fault = None
    assert [round(float(x.mean())) for x in Flowers102(32, "val", root).images.float()] == [120, 180]


def test_without_a_host_the_error_says_what_to_do(host, tmp_path):
    host.shutdown()
    host.server_close()
    with pytest.raises(RuntimeError, match="could not be downloaded.*NOISOUT_PROFILE=quick"):
        Flowers102(32, "val", tmp_path / "data")


def test_an_unpacking_that_is_broken_off_is_done_again(host, tmp_path, monkeypatch):
    def broken_off(archive, folder, *args):
        with tarfile.open(archive) as opened:
            opened.extract("jpg/image_00001.jpg", folder, filter="data")
        raise OSError("No space left on device")

    root = tmp_path / "data"
    with monkeypatch.context() as full_disk:
        full_disk.setattr(datasets.utils, "extract_archive", broken_off)
        with pytest.raises(RuntimeError, match="No space left"):
            Flowers102(32, "val", root)
    assert len(list(root.glob("**/*.jpg"))) == 1
    assert len(Flowers102(32, "val", root)) == 2


def test_a_damaged_photograph_is_named(host, tmp_path):
    Flowers102(32, "val", tmp_path / "data")
    photograph = next((tmp_path / "data").glob("**/image_00002.jpg"))
    for damaged in (photograph.read_bytes()[:300], b""):
        photograph.write_bytes(damaged)
        with pytest.raises(RuntimeError, match="image_00002.jpg is not a readable JPEG"):
            Flowers102(32, "val", tmp_path / "data")


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_thousand_steps_in_bfloat16_stay_finite(prediction):
    torch.manual_seed(0)
    model = UNet(image_size=8, channels=16, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(8,), head_channels=16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # an untrained network answers with zeros
    process = GaussianDiffusion(cosine_beta_schedule(), prediction)
    x_T, seen = torch.randn(2, 3, 8, 8), []
    model.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        for state in ddpm(model, process, x_T):
            assert state.x.dtype == state.x_start.dtype == torch.float32
            assert state.x.abs().max() < 10 and state.x_start.abs().max() <= 1  # which NaN fails, too
    assert seen == 1000 * [torch.bfloat16]


def network(*mults, **options):
    return UNet(image_size=32, channels=32, channel_mults=mults, num_res_blocks=1, attention_resolutions=(), **options)


def test_a_grown_network_has_the_small_one_inside():
    small, large = network(1, 2), network(0.5, 1, 2, input_skip=True)
    fresh = grow(small, large)
    down = len(large.down) - len(small.down)
    inside = [(large.time_mlp, small.time_mlp), (large.middle2, small.middle2), (large.down[down + 1 :], small.down[1:]), (large.up[:3], small.up[:3])]
    for ours, theirs in inside:
        assert same(ours.state_dict(), theirs.state_dict())
    assert {name.split(".")[0] for name in fresh} == {"input_skip", "conv_in", "down", "up", "norm_out", "conv_out"}
    assert len(fresh) < len(small.state_dict())


def test_a_network_grows_by_one_level_or_stays_as_it_is():
    same_size = network(1, 2)
    assert grow(network(1, 2), same_size) == []
    for large in (network(1), network(0.5, 1, 1, 2), network(1, 1, 1)):
        with pytest.raises(ValueError, match=r"levels of \[32, 64\] and .* channels"):
            grow(network(1, 2), large)
