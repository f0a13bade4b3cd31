"""Data sets: what is refused at the door, Flowers102's download, folders of images of any kind."""

import functools
import hashlib
import http.server
import os
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from noisout_nb import decoding
from noisout_nb.data import (
    Flowers102,
    FolderImages,
    ImageDataset,
    load_data,
    resize_and_crop,
    species_labels,
    to_float,
    to_uint8,
)
from noisout_nb.folder import _held_out
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.profiles import PROFILES
from noisout_nb.sampling import sample
from noisout_nb.training import EMA, Batches, train
from noisout_nb.unet import UNet

IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
LABELS = torch.tensor([0, 1])


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """Caches go to a folder of the test's own."""
    monkeypatch.setenv("NOISOUT_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("NOISOUT_DATA", raising=False)


@pytest.mark.parametrize(
    "images, message",
    [
        (IMAGES / 255, r"float32 from 0 to 0.373: uint8 .*to_uint8\(2 \* images - 1\)"),
        (IMAGES.float() / 127.5 - 1, r"from -1 to -0.255: .*to_uint8\(images\)"),
        (IMAGES.long(), r"int64 from 0 to 95: .*images.to\(torch.uint8\)"),
        (IMAGES.numpy(), r"images is a ndarray: .*torch.as_tensor"),
        (list(IMAGES), r"images is a list: .*torch.stack"),
        (IMAGES[0], r"shape \(3, 4, 4\)"),
        (IMAGES[:0], r"shape \(0, 3, 4, 4\)"),
        (IMAGES.permute(0, 2, 3, 1), r"\(2, 4, 4, 3\).*permute\(0, 3, 1, 2\)"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), r"\(2, 4, 8, 8\)"),
    ],
)
def test_images_of_another_form_are_refused_with_the_way_out(images, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(images, LABELS, ("a", "b"))


@pytest.mark.parametrize(
    "labels, message",
    [
        (LABELS + 1, r"from 1 to 2: with 2 classes they lie in 0..1; .*labels - 1"),
        (LABELS - 1, r"from -1 to 0"),
        (8 * LABELS + 1, r"from 1 to 9: with 2 classes they lie in 0..1$"),
        (LABELS + 7, r"from 7 to 8: with 2 classes they lie in 0..1$"),
        (torch.eye(2).long(), r"\(2, 2\): one number per image, \(2,\).*argmax\(1\)"),
        (LABELS[:, None], r"\(2, 1\).*flatten"),
        (LABELS[:1], r"\(1,\): one number per image, \(2,\)"),
        (LABELS.int(), r"int32: int64 is needed"),
        (LABELS.float(), r"float32: int64 is needed"),
        ([0, 1], r"labels is a list"),
        (LABELS.numpy(), r"labels is a ndarray"),
    ],
)
def test_labels_of_another_form_are_refused_with_the_way_out(labels, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(IMAGES, labels, ("a", "b"))


@pytest.mark.parametrize("classes", ["ab", 2, (1, 2), ("a", "a")])
def test_classes_are_names_each_once(classes):
    with pytest.raises(ValueError, match="class"):
        ImageDataset(IMAGES, LABELS, classes)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 8, 20), (2, 1, 20, 8)])
def test_grey_and_non_square_images_are_taken(shape):
    data = ImageDataset(torch.full(shape, 255, dtype=torch.uint8), LABELS, ["a", "b"])
    image, label = data[1]
    assert image.shape == shape[1:] and image.dtype == torch.float32 and label == 1
    assert image.min() == image.max() == 1 and data.classes == ("a", "b")


def test_conversions_refuse_the_wrong_side():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    with pytest.raises(ValueError, match="to_float takes uint8"):
        to_float(every / 255)
    with pytest.raises(ValueError, match="to_uint8 takes floats"):
        to_uint8(every)


@pytest.mark.parametrize("dataset", ["flower102", "/my/pets", "", None])
def test_an_unknown_data_set_is_refused_by_name(dataset):
    with pytest.raises(ValueError, match=r"'procedural', 'flowers102', 'folder'.*NOISOUT_DATA"):
        load_data(replace(PROFILES["quick"], dataset=dataset))


@pytest.mark.parametrize("name", PROFILES)
def test_an_unknown_split_is_refused_by_name(name):
    with pytest.raises(ValueError, match="unknown split 'test': choose one of 'train', 'val'"):
        load_data(PROFILES[name], "test")


def test_the_embedded_flowers_of_both_splits_differ():
    profile = replace(PROFILES["quick"], image_size=16, train_images=20)
    train, held_out = load_data(profile), load_data(profile, "val")
    assert (len(train), len(held_out)) == (20, 512)
    assert not torch.equal(train.images, held_out.images[:20])


def test_species_are_found_by_name_or_the_nearest_is_suggested():
    assert species_labels("rose", ["daisy", "rose"]).tolist() == [1]
    with pytest.raises(ValueError, match="did you mean 'sunflower'"):
        species_labels(["sun flower"], ("rose", "sunflower"))
    with pytest.raises(ValueError, match="unknown species 3: did you mean 'rose'"):
        species_labels([3], ("rose",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no classes .* sample with y=None"):
        species_labels("rose", ())


class Server(http.server.ThreadingHTTPServer):
    """Remembers what was asked for; `fault` makes it answer as a proxy does."""

    fault = ""

    def __init__(self, handler):
        self.requests = []
        super().__init__(("127.0.0.1", 0), handler)


class Host(http.server.SimpleHTTPRequestHandler):
    """Serves six tiny photographs in Flowers102's layout; while `fault` is set, a proxy's page."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        if not self.server.fault:
            return super().do_GET()
        page = b"<html>Please log in</html>"
        promised = len(page) + 1000 * (self.server.fault == "interrupted")
        self.send_response(200)
        self.send_header("Content-Length", str(promised))
        self.end_headers()
        self.wfile.write(page)


@pytest.fixture
def host(tmp_path, monkeypatch):
    folder = tmp_path / "host"
    (folder / "jpg").mkdir(parents=True)
    for i in range(1, 7):
        Image.new("RGB", (40, 48), (30 * i,) * 3).save(folder / "jpg" / f"image_{i:05}.jpg")
    with tarfile.open(folder / "102flowers.tgz", "w:gz") as archive:
        archive.add(folder / "jpg", "jpg")
    savemat(folder / "imagelabels.mat", {"labels": [[1, 2, 3, 4, 5, 6]]})
    savemat(folder / "setid.mat", {"trnid": [[1, 2]], "valid": [[4, 6]], "tstid": [[3, 5]]})
    sums = {
        name: (file, hashlib.md5((folder / file).read_bytes()).hexdigest())
        for name, (file, _) in datasets.Flowers102._file_dict.items()
    }
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", sums)
    handler = functools.partial(Host, directory=folder)
    with Server(handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(datasets.Flowers102, "_download_url_prefix", url)
        yield server
        server.shutdown()


def means(data):
    return [round(float(image.mean())) for image in data.images.float()]


@pytest.mark.parametrize("fault", ["proxy page", "interrupted"])
def test_a_download_that_fails_says_so_and_the_next_one_heals(fault, host, tmp_path):
    root, host.fault = tmp_path / "data", fault
    for _ in range(2):  # what the first attempt left must not pass for the data
        with pytest.raises(RuntimeError, match="could not be downloaded"):
            Flowers102(32, "val", root)
    assert not list(root.glob("**/*.jpg"))
    host.fault = ""
    assert means(Flowers102(32, "val", root)) == [120, 180]


def test_without_a_host_the_error_says_what_to_do(host, tmp_path):
    host.shutdown()
    host.server_close()
    with pytest.raises(RuntimeError, match="could not be downloaded.*NOISOUT_PROFILE=quick"):
        Flowers102(32, "val", tmp_path / "data")


def test_an_interrupted_extraction_is_repeated(host, tmp_path, monkeypatch):
    def interrupted(archive, folder, *args):
        with tarfile.open(archive) as opened:
            opened.extract("jpg/image_00001.jpg", folder, filter="data")
        raise OSError("No space left on device")

    root = tmp_path / "data"
    with monkeypatch.context() as full_disk:
        full_disk.setattr(datasets.utils, "extract_archive", interrupted)
        with pytest.raises(RuntimeError, match="No space left"):
            Flowers102(32, "val", root)
    assert len(list(root.glob("**/*.jpg"))) == 1
    assert len(Flowers102(32, "val", root)) == 2


def test_a_damaged_or_missing_photograph_is_named_and_nothing_is_to_be_deleted(host, tmp_path):
    Flowers102(32, "val", tmp_path / "data")
    photograph = next((tmp_path / "data").glob("**/image_00004.jpg"))
    for damaged in (photograph.read_bytes()[:300], b"", None):
        photograph.unlink() if damaged is None else photograph.write_bytes(damaged)
        with pytest.raises(RuntimeError, match=r"image_00004.jpg|missing, image_00004") as caught:
            Flowers102(32, "val", tmp_path / "data")
        assert "delete" not in str(caught.value).lower() and "Move" in str(caught.value)


def test_several_processes_download_and_decode_once(host, tmp_path, monkeypatch):
    """Threads stand for torchrun's processes: each opens the lock's file for itself."""
    start, decoded, read = threading.Barrier(4), [], decoding.read_image

    def counted(file):
        decoded.append(file.name)
        return read(file)

    def one(_):
        start.wait()
        return means(Flowers102(32, "val", tmp_path / "data"))

    monkeypatch.setattr(decoding, "read_image", counted)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == 4 * [[120, 180]]
    # torchvision asks once for the final address and once for the file
    assert sorted(host.requests) == sorted(
        2 * ["/102flowers.tgz", "/imagelabels.mat", "/setid.mat"]
    )
    assert sorted(decoded) == ["image_00004.jpg", "image_00006.jpg"]


RED, WHITE = (250, 10, 10), (255, 255, 255)


def save_kinds(folder):
    """One image of each kind: name -> the colour that its centre must have."""
    folder.mkdir(parents=True, exist_ok=True)
    red = Image.new("RGB", (40, 30), RED)
    clear = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, (0, 0, 255))]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    turned = Image.new("RGB", (40, 20), WHITE)
    turned.paste(RED, (0, 0, 20, 20))
    deep = np.full((20, 20), 128 * 257, dtype=np.uint16)
    palette = red.quantize(4)
    see_through = Image.new("P", (20, 20), 0)
    see_through.putpalette([0, 0, 0])
    images = {
        "rgb.jpg": (red, RED, {"quality": 95}),
        "BIG LETTERS.JPEG": (red, RED, {"quality": 95}),
        "rgb.webp": (red, RED, {"lossless": True}),
        "rgb.bmp": (red, RED, {}),
        "rgb.tiff": (red, RED, {}),
        "rgb.ppm": (red, RED, {}),
        "palette.png": (palette, RED, {}),
        "cmyk.jpg": (red.convert("CMYK"), RED, {"quality": 95}),
        "grey.png": (Image.new("L", (30, 40), 100), (100, 100, 100), {}),
        "grey alpha.png": (Image.new("LA", (30, 40), (0, 0)), WHITE, {}),
        "one bit.png": (Image.new("1", (30, 40), 1), WHITE, {}),
        "clear.png": (clear, WHITE, {}),
        "clear palette.png": (see_through, WHITE, {"transparency": 0}),
        "half clear.png": (Image.new("RGBA", (9, 9), (0, 0, 0, 127)), (128, 128, 128), {}),
        "sixteen bits.png": (Image.fromarray(deep), (128, 128, 128), {}),
        "turned.jpg": (turned, None, {"quality": 95, "exif": exif}),
        "film.gif": (frames[0], RED, {"save_all": True, "append_images": frames[1:]}),
        "one pixel.png": (Image.new("RGB", (1, 1), RED), RED, {}),
        "wide.png": (Image.new("RGB", (3000, 20), RED), RED, {}),
        "Blüte 花.png": (red, RED, {}),
    }
    for name, (image, _, options) in images.items():
        image.save(folder / name, **options)
    return {name: colour for name, (_, colour, _) in images.items()}


def test_every_kind_of_image_is_read_upright_over_white_and_in_eight_bits(tmp_path):
    colours = save_kinds(tmp_path)
    for name, colour in colours.items():
        image = torch.from_numpy(np.array(decoding.read_image(tmp_path / name))).permute(2, 0, 1)
        small = resize_and_crop(image, 16)
        assert small.shape == (3, 16, 16) and small.dtype == torch.uint8
        if colour is not None:
            gap = (small[:, 8, 8].float() - torch.tensor(colour)).abs().max()
            assert gap <= 6, f"{name}: {small[:, 8, 8].tolist()}, not {colour}"
    turned = np.array(decoding.read_image(tmp_path / "turned.jpg"))
    assert turned.shape == (40, 20, 3), "stands upright"
    assert abs(turned[5, 10].astype(int) - RED).max() < 9 and turned[35, 10].min() > 246


@pytest.mark.parametrize("size, shape", [(16, (16, 16)), ((8, 24), (8, 24)), ((24, 8), (24, 8))])
@pytest.mark.parametrize("rows, columns", [(20, 30), (30, 20), (1, 1), (20, 3000), (7, 7)])
def test_images_are_resized_to_cover_the_size_and_cropped_in_the_centre(size, shape, rows, columns):
    image = torch.zeros(3, rows, columns, dtype=torch.uint8)
    image[:, rows // 2, columns // 2] = 255
    small = resize_and_crop(image, size)
    assert small.shape == (3, *shape)
    if rows * columns < 1000:
        assert small[0, shape[0] // 2, shape[1] // 2] > 100, "the centre stays in the centre"


def folder_of(tmp_path, *names, size=(20, 20)):
    root = tmp_path / "pets"
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i % 256, 255 - i % 256, 9)).save(root / name)
    return root


def names_of(data, count):
    """Which images of `folder_of` a split has, by their red."""
    return {int(image[0, 8, 8]) for image in data.images} & set(range(count))


def test_subfolders_are_classes_and_a_flat_folder_is_one(tmp_path):
    names = [f"{kind}/{i}.png" for kind in ("b", "a c", "é/deep") for i in range(20)]
    root = folder_of(tmp_path, *names)
    (root / "empty").mkdir()
    data, held_out = FolderImages(16, "train", root), FolderImages(16, "val", root)
    assert data.classes == held_out.classes == ("a c", "b", "é")
    for image, label in zip(data.images, data.labels, strict=True):
        assert [1, 0, 2][int(image[0, 8, 8]) // 20] == label, "the image's label is its folder"
    flat = FolderImages(16, "train", root / "b")
    assert flat.classes == ("b",) and flat.labels.unique().tolist() == [0]


def test_the_splits_are_a_partition_and_stay_when_images_are_added(tmp_path):
    names = [f"{i:03}.png" for i in range(200)]
    root = folder_of(tmp_path, *names)
    after = [names_of(FolderImages(16, split, root), 200) for split in ("train", "val")]
    for name in names[1::2]:
        (root / name).unlink()
    before = [names_of(FolderImages(16, split, root), 200) for split in ("train", "val")]
    assert before[0] | before[1] == set(range(0, 200, 2)) and not before[0] & before[1]
    assert after[0] | after[1] == set(range(200)) and not after[0] & after[1]
    assert before[0] <= after[0] and before[1] <= after[1]
    assert 12 <= len(after[1]) <= 38, "about one in eight, 25 of 200"


def test_no_split_is_ever_empty():
    for start in range(300):
        for count in (2, 3, 9):
            held_out = _held_out([f"{start + i}.png" for i in range(count)])
            assert 0 < sum(held_out) < count


def test_a_folder_of_one_image_trains_and_says_that_none_is_held_out(tmp_path):
    root = folder_of(tmp_path, "only.png")
    assert len(FolderImages(16, "train", root)) == 1
    with pytest.raises(ValueError, match="one readable image: to hold one out, two are needed"):
        FolderImages(16, "val", root)


def test_other_files_and_hidden_ones_are_ignored(tmp_path):
    root = folder_of(tmp_path, "a.png", "b.png", ".hidden.png", ".git/c.png")
    (root / "notes.txt").write_text("words")
    (root / "folder.png").mkdir()
    assert len(FolderImages(16, "train", root)) + len(FolderImages(16, "val", root)) == 2


def test_damaged_images_are_named_and_left_out(tmp_path, capsys):
    root = folder_of(tmp_path, *(f"{i}.png" for i in range(10)))
    Image.fromarray(np.zeros((9, 9), dtype=np.float32)).save(root / "floating point.tif")
    (root / "3.png").write_bytes((root / "3.png").read_bytes()[:50])
    (root / "4.png").write_bytes(b"no image")
    (root / "5.png").write_bytes(b"")
    for _ in range(2):  # the second time from the cache
        left = [names_of(FolderImages(16, split, root), 10) for split in ("train", "val")]
        assert left[0] | left[1] == {0, 1, 2, 6, 7, 8, 9}
        printed = capsys.readouterr().out
        assert all(f"left out: {i}.png in {root}" in printed for i in (3, 4, 5))
        assert "left out: floating point.tif" in printed and "8 or 16 bits" in printed
        assert "4 of 11 images" in printed and "7 remain" in printed


def test_a_folder_without_readable_images_is_refused_in_words(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="set NOISOUT_DATA=path/to/images"):
        FolderImages(16)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        FolderImages(16, root=tmp_path / "nowhere")
    root = tmp_path / "photos"
    root.mkdir()
    with pytest.raises(ValueError, match=r"holds no images: \.jpg, "):
        FolderImages(16, root=root)
    (root / "a.heic").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"holds no images \(only \.heic\)"):
        FolderImages(16, root=root)
    (root / "b.png").write_bytes(b"?")
    with pytest.raises(ValueError, match="none of the 1 images"):
        FolderImages(16, root=root)
    root = folder_of(tmp_path, "a.png", "cats/b.png")
    with pytest.raises(ValueError, match="1 images, such as 'a.png', beside subfolders"):
        FolderImages(16, root=root)


def test_the_cache_serves_until_files_change_and_survives_damage(tmp_path, monkeypatch):
    root = folder_of(tmp_path, *(f"{i}.png" for i in range(8)))
    decoded, read = [], decoding.read_image
    monkeypatch.setattr(decoding, "read_image", lambda file: decoded.append(file) or read(file))

    def decodes(size=16):
        decoded.clear()
        images = FolderImages(size, "train", root).images
        return len(decoded), images

    count, first = decodes()
    assert count == 8
    count, again = decodes()
    assert count == 0 and torch.equal(first, again)
    assert decodes(8)[0] == 8, "another size"
    assert decodes()[0] == 0, "which leaves the first one's cache alone"
    cache = next(
        path for path in decoding.cache_folder().glob("*.npz") if path.stat().st_size > 6000
    )
    good = cache.read_bytes()
    middle = len(good) // 2
    for damaged in (good[:-100], b"", b"x" * 5000, good[:middle] + b"????" + good[middle + 4 :]):
        cache.write_bytes(damaged)
        count, again = decodes()
        assert count == 8 and torch.equal(first, again)
    Image.new("RGB", (20, 20), "white").save(root / "3.png")
    os.utime(root / "3.png", ns=(1, 1))
    assert decodes()[0] == 8, "a changed file"
    (root / "7.png").rename(root / "9.png")
    assert decodes()[0] == 8, "another name"
    assert len(list(decoding.cache_folder().glob("*.npz"))) == 2, "no old caches pile up"


def test_without_a_place_for_the_cache_images_are_decoded_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NOISOUT_RUNS", str(tmp_path / "file"))
    root = folder_of(tmp_path, "a.png", "b.png")
    assert len(FolderImages(16, "train", root)) == 1


def test_flowers102_is_decoded_once_per_split(host, tmp_path, monkeypatch):
    first = [means(Flowers102(32, split, tmp_path / "data")) for split in ("train", "val")]
    monkeypatch.setattr(decoding, "read_image", lambda file: pytest.fail(f"{file} decoded again"))
    again = [means(Flowers102(32, split, tmp_path / "data")) for split in ("train", "val")]
    assert first == again == [[30, 60, 90, 150], [120, 180]]


def mixed_folder(root):
    """200 images of two classes, ten of each kind of `save_kinds`, and three damaged files."""
    for i in range(10):
        assert len(save_kinds(root / f"class {i % 2}" / f"{i}")) == 20
    cut_short = (root / "class 0/0/rgb.jpg").read_bytes()[:300]
    for i, damage in enumerate((b"", b"no image", cut_short)):
        (root / "class 1" / f"damaged {i}.jpg").write_bytes(damage)


def tiny_run(data, checkpoint, stop=6):
    """Train a tiny network for six steps, or go on from the checkpoint; leave after `stop`."""
    torch.manual_seed(0)
    model = UNet(
        image_size=16,
        channels=16,
        channel_mults=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        head_channels=16,
        num_classes=len(data.classes),
    )
    process = GaussianDiffusion.from_config(**PROFILES["folder"].process)
    losses, batches = [], Batches(data, 8)
    options = {"steps": 6, "learning_rate": 1e-3, "losses": losses, "checkpoint": checkpoint}
    for step in train(model, process, batches, EMA(model), **options):
        if step.index == stop:
            break
    return model, process, losses


def test_a_folder_of_200_mixed_images_trains_samples_and_resumes(tmp_path, monkeypatch, capsys):
    mixed_folder(tmp_path / "my images")
    monkeypatch.setenv("NOISOUT_DATA", str(tmp_path / "my images"))
    profile = replace(PROFILES["folder"], image_size=16)
    data, held_out = load_data(profile), load_data(profile, "val")
    assert "3 of 203 images" in capsys.readouterr().out
    assert len(data) + len(held_out) == 200 and 12 <= len(held_out) <= 38
    assert data.classes == ("class 0", "class 1") and data.labels.unique().tolist() == [0, 1]
    whole = tiny_run(data, None)[2]
    tiny_run(data, tmp_path / "run.pth", stop=3)
    model, process, resumed = tiny_run(load_data(profile), tmp_path / "run.pth")
    assert len(resumed) == 6 and resumed == whole, "resumed as if it had never stopped"
    y = species_labels(["class 1", "class 0"], data.classes)
    samples = sample(model, process, y, shape=(3, 16, 16), count=2, steps=3)
    assert samples.shape == (2, 3, 16, 16) and samples.abs().max() <= 1
