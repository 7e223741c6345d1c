"""Every task on every family, through diffusers' own pipelines: what stays of a picture, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import drawing
import lessons
import numpy as np
import pytest
import tiny
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from drawing import box_mask, distance, picture, values
from PIL import Image

from finetune import run
from finetune.canvas import Margins, cover, grow, parse_size, paste, read
from finetune.cli import app
from finetune.edges import edge_map
from finetune.errors import UserError
from finetune.families.base import Source
from finetune.generate import generate, load_base
from finetune.load import Adapter, load_adapters
from finetune.tasks import Inputs, choose, tasks

SMALL = {"steps": 2, "guidance": 2.0}
FAMILIES = list(tiny.BASES)
UNETS = [family for family in FAMILIES if family.startswith("stable_diffusion") and not family.endswith("3")]
SD = "stable_diffusion"


def inputs_for(task: str, made: Any) -> Inputs:
    return drawing.inputs_for(task, *made[1:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", tasks.names())
def test_a_task_is_inferred_drawn_and_depends_on_its_own_seed_alone_or_is_refused(task: str, family: str, made: Any):
    pipeline, inputs = made(family)[0], inputs_for(task, made(family))
    assert choose(None, inputs, steps=2).name == task
    if task == "instruct_pix2pix" and family not in UNETS:
        with pytest.raises(UserError, match="cannot serve instruct_pix2pix"):
            generate(pipeline, "a", inputs, size=32, **SMALL)
        return
    two = generate(pipeline, ["a", "b"], inputs, seed=3, size=32, **SMALL)
    (alone,) = generate(pipeline, "b", inputs, seed=4, size=32, **SMALL)
    (other,) = generate(pipeline, "b", inputs, seed=5, size=32, **SMALL)
    assert {image.size for image in two} == {{"text_to_image": (32, 32), "outpaint": (64, 40)}.get(task, (48, 32))}
    assert distance(two[1], alone) <= 3 < distance(alone, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_the_mask_the_picture_stays_pixel_for_pixel(family: str, made: Any):
    (drawn,) = generate(made(family)[0], "a", inputs_for("inpaint", made(family)), size=32, **SMALL)
    outside = np.asarray(box_mask()) == 0
    assert np.array_equal(values(drawn)[outside], values(picture())[outside])
    assert not np.array_equal(values(drawn)[~outside], values(picture())[~outside])


def test_outpainting_keeps_the_picture_but_for_a_seam_of_two_latents(made: Any):
    pipeline = made(SD)[0]
    (drawn,) = generate(pipeline, "a", inputs_for("outpaint", made(SD)), size=32, **SMALL)
    seam = 2 * pipeline.vae_scale_factor
    assert np.array_equal(values(drawn)[8 + seam :, 16 + seam :], values(picture())[seam:, seam:])
    assert not np.array_equal(values(drawn)[8:, 16:], values(picture()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_controlnet_at_scale_zero_does_nothing_and_at_one_something(family: str, made: Any):
    pipeline, control, _ = made(family)

    def draw(seed: int, scale: int) -> Image.Image:
        inputs = Inputs(control=(picture(seed=seed),), controlnet=(f"{control}={scale}",))
        return generate(pipeline, "a", inputs, size=32, **SMALL)[0]

    assert distance(draw(0, 0), draw(1, 0)) == 0 < distance(draw(0, 1), draw(1, 1))
    if family in UNETS:  # the others' pipelines draw the map's latents before the noise
        assert distance(draw(0, 0), generate(pipeline, "a", size=(48, 32), **SMALL)[0]) == 0


def test_two_controlnets_one_of_them_at_zero_are_one(made: Any):
    pipeline, control, _ = made(SD)
    (one,) = generate(pipeline, "a", Inputs(control=(picture(),), controlnet=(control,)), size=32, **SMALL)
    two = Inputs(control=(picture(),), control_from=(picture(seed=1),), controlnet=(control, f"{control}=0"))
    assert distance(generate(pipeline, "a", two, size=32, **SMALL)[0], one) <= 1


def test_a_breath_of_strength_returns_what_the_autoencoder_makes_of_the_picture(made: Any):
    pipeline = made(SD)[0]
    given, processor = picture(), pipeline.image_processor
    with torch.no_grad():
        latents = pipeline.vae.encode(processor.preprocess(given)).latent_dist.sample(torch.Generator().manual_seed(0))
        (expected,) = processor.postprocess(pipeline.vae.decode(latents).sample)
    (drawn,) = generate(pipeline, "a", Inputs(image=given, strength=0.01), steps=100, guidance=1.0, size=32)
    assert np.abs(values(drawn) - values(expected)).mean() < 12
    (free,) = generate(pipeline, "a", Inputs(image=given, strength=1.0), size=32, **SMALL)
    assert np.abs(values(free) - values(expected)).mean() > 24


@pytest.fixture(scope="module")
def trained(base_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """targets -> (base, run folder) of a LoRA."""
    kept: dict[str, Any] = {}

    def train(targets: tuple[str, ...]) -> Any:
        if targets not in kept:
            base, output = base_folder(SD), tmp_path_factory.mktemp("trained")
            lesson = {"rank": 4, "targets": list(targets)}
            run.train(lessons.recipe(base, output, "lora", lesson, validation={"prompts": []}))
            kept[targets] = str(base), output / "run"
        return kept[targets]

    return train


@pytest.mark.parametrize("task", tasks.names())
def test_an_adapter_reaches_every_task_and_at_weight_zero_is_the_base(task: str, trained: Any, made: Any):
    base, folder = trained(("attention",))
    inputs = inputs_for(task, made(SD))
    draw = lambda *adapters: generate(base, "a", inputs, adapters=adapters, size=32, **SMALL)[0]  # noqa: E731
    plain, none, full = draw(), draw(Adapter(folder, 0.0)), draw(Adapter(folder))
    assert distance(plain, none) == 0 < distance(none, full)


def test_an_adapter_of_the_first_convolution_is_refused_by_an_editor(trained: Any, made: Any):
    base, folder = trained(("conv_in",))
    with pytest.raises(UserError, match="changes the first convolution"):
        inputs = inputs_for("instruct_pix2pix", made(SD))
        generate(base, "a", inputs, adapters=[Adapter(folder)], size=32, **SMALL)


def test_an_editor_does_not_silently_take_the_place_of_a_denoiser_with_adapters(trained: Any, made: Any):
    base, folder = trained(("attention",))
    pipeline = load_adapters(load_base(Source(base)), [folder])
    with pytest.raises(UserError, match="a denoiser of its own"):
        generate(pipeline, "a", inputs_for("instruct_pix2pix", made(SD)), size=32, **SMALL)


def test_a_companion_is_rebuilt_from_its_base_and_its_difference(made: Any, tmp_path: Path):
    from safetensors.torch import save_file

    pipeline, _, editor = made(SD)
    pipeline.save_pretrained(tmp_path)
    folder = tmp_path / "companions" / "editor"
    folder.mkdir(parents=True)
    shutil.copy(Path(editor) / "config.json", folder)
    wide = UNet2DConditionModel.from_pretrained(editor)
    save_file({"conv_in.weight": wide.conv_in.weight.half()}, folder / "difference.safetensors")
    (whole,) = generate(pipeline, "a", Inputs(image=picture(), editor=editor), size=32, **SMALL)
    (small,) = generate(pipeline, "a", Inputs(image=picture(), editor=str(folder)), size=32, **SMALL)
    assert distance(whole, small) <= 2


def test_a_picture_is_turned_as_the_camera_meant_and_laid_on_white(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    picture(48, 32).save(tmp_path / "turned.jpg", exif=exif)
    assert read(tmp_path / "turned.jpg").size == (32, 48)
    clear = picture().convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    for given in (clear, _saved(clear, tmp_path / "clear.png")):
        seen = read(given)
        assert np.all(values(seen.image) == 255) and seen.hidden is not None and np.all(values(seen.hidden) == 255)


def _saved(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def test_transparency_is_the_mask_where_none_is_given(made: Any):
    pipeline, given = made(SD)[0], picture().convert("RGBA")
    given.putalpha(box_mask().point(lambda value: 255 - value))
    flat = read(given).image
    (by_alpha,) = generate(pipeline, "a", Inputs(image=given), task="inpaint", size=32, **SMALL)
    (by_mask,) = generate(pipeline, "a", Inputs(image=flat, mask=box_mask()), size=32, **SMALL)
    assert distance(by_alpha, by_mask) == 0


def test_a_picture_is_scaled_without_distortion_to_what_the_base_draws(made: Any):
    pipeline = made(SD)[0]
    drawn = [
        generate(pipeline, "a", Inputs(image=picture(*given), strength=0.5), size=size, **SMALL)[0].size
        for given, size in (((100, 67), 32), ((31, 64), None), ((48, 32), (32, 48)), ((16, 16), 40))
    ]
    assert drawn == [(48, 32), (32, 64), (32, 48), (40, 40)]


def test_the_seam_is_a_ramp_inside_the_mask():
    black, white = Image.new("RGB", (48, 32)), Image.new("RGB", (48, 32), "white")
    row = values(paste(black, white, box_mask(), 4))[16, :, 0]
    assert not row[:8].any() and not row[28:].any() and np.all(row[12:24] == 255)
    assert np.all(np.diff(row[7:13]) >= 0) and 0 < row[9] < 255
    thin = Image.new("L", (48, 32))
    thin.paste(255, (8, 8, 10, 24))
    assert values(paste(black, white, thin, 8))[16, 9, 0] == 255


def test_a_mask_covers_whole_latents_and_a_grown_canvas_repeats_its_border():
    assert values(cover(box_mask(), 16))[0:32, 0:32].all() and not values(cover(box_mask(), 16))[:, 32:].any()
    canvas, mask = grow(picture(), Margins(right=8), overlap=4)
    assert canvas.size == mask.size == (56, 32)
    assert np.array_equal(values(canvas)[:, 55], values(picture())[:, 47])
    assert values(mask)[:, 44:].all() and not values(mask)[:, :44].any()


def test_edges_are_white_lines_on_black_where_brightness_steps():
    half = Image.new("RGB", (64, 64))
    half.paste("white", (32, 0, 64, 64))
    found = values(edge_map(half))[:, :, 0]
    assert set(np.unique(found)) == {0, 255}
    assert set(np.nonzero(found)[1]) <= {30, 31, 32, 33} and found[32].any()


@pytest.mark.parametrize(
    ("options", "complaints"),
    [
        (["--mask", "mask.png"], ["--image: inpaint needs it"]),
        (["--strength", "0.5"], ["--image: image_to_image needs it"]),
        (["--image", "a.png", "--mask", "mask.png", "--extend", "left=8"], ["has no use for it"]),
        (
            ["--image", "a.png", "--image-guidance", "0.5"],
            ["--editor: instruct_pix2pix needs it", "--image-guidance: 0.5"],
        ),
        (
            ["--image", "a.png", "--strength", "1.5", "--task", "inpaint"],
            ["--strength: 1.5", "--mask: inpaint needs it"],
        ),
        (["--image", "a.png", "--strength", "0.01"], ["--strength: 0.01 of 25 steps is none"]),
        (["--image", "nowhere.png", "--mask", "words.txt"], ["--image: nowhere.png", "--mask: words.txt"]),
        (["--image", "a.png", "--mask", "small.png"], ["--mask: is 8 x 8 pixels, but the picture is 48 x 32"]),
        (["--image", "a.png", "--mask", "black.png"], ["--mask: nothing in it is white"]),
        (["--image", "bomb.png"], ["--image: bomb.png", "more than are safe to unpack"]),
        (["--image", "a.png", "--extend", "up=8"], ["--extend 'up=8'"]),
        (["--image", "a.png", "--extend", "left=0"], ["--extend: no side grows"]),
        (["--image", "a.png", "--extend", "left=9"], ["--extend: left=9 is not a multiple of 8"]),
        (
            ["--control", "a.png", "--controlnet", "x=y", "--controlnet", "z"],
            ["2 ControlNets need a map each", "'x=y'"],
        ),
        (["--control", "a.png", "--controlnet", "./nowhere"], ["--controlnet: ./nowhere cannot be loaded"]),
        (["--image", "a.png", "--editor", "./nowhere"], ["--editor: ./nowhere cannot be loaded"]),
        (["--task", "inpant"], ["Did you mean 'inpaint'?"]),
        (["--size", "huge"], ["--size 'huge'"]),
        (["--size", "36x32"], ["--size: 36 is not a multiple of 8"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_inputs_that_do_not_fit_are_refused_together_with_status_2(
    options: list[str], complaints: list[str], base_folder: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    monkeypatch.chdir(tmp_path)
    picture().save("a.png")
    box_mask().save("mask.png")
    Image.new("L", (8, 8), 255).save("small.png")
    Image.new("L", (48, 32)).save("black.png")
    Path("words.txt").write_text("no picture")
    if "bomb.png" in options:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        picture().save("bomb.png")
    with pytest.raises(UserError) as refused:
        app(["generate", "a", "--base", str(base_folder(SD)), *options], standalone_mode=False)
    message = str(refused.value)
    assert all(complaint in message for complaint in complaints), message
    assert not Path("outputs").exists()


def test_a_base_of_another_task_and_a_network_of_another_family_are_refused(made: Any, tmp_path: Path):
    pipeline, _, editor = made(SD)
    wide = tiny.stable_diffusion()
    wide.register_modules(unet=UNet2DConditionModel.from_pretrained(editor))
    with pytest.raises(UserError, match="needs a denoiser that takes 4 channels, but this one takes 8"):
        generate(wide, "a", size=32, **SMALL)
    narrow = UNet2DConditionModel.from_config(pipeline.unet.config, cross_attention_dim=16)
    other = ControlNetModel.from_unet(narrow, load_weights_from_unet=False)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="reads prompts of width 16, but this base's have 32"):
        generate(pipeline, "a", Inputs(control=(picture(),), controlnet=(str(tmp_path / "other"),)), size=32)
    with pytest.raises(UserError, match="UNet2DConditionModel, which is made for another family"):
        generate(pipeline, "a", Inputs(control=(picture(),), controlnet=(editor,)), size=32)


def test_sizes_are_read_as_one_side_or_two():
    assert parse_size("512") == 512 and parse_size("768x512") == (768, 512)
