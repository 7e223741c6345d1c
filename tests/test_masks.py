"""What lies outside a mask is not learnt, and a mask goes wherever its picture goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lessons
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import SIZE

from finetune import run
from finetune.config import build
from finetune.dataset import DatasetConfig, Draw, Pictures, scan
from finetune.dataset.turning import ORIENTATION
from finetune.errors import UserError
from finetune.student import denoising_errors

DRAWN: dict[str, Any] = {"crop": "random", "flip": True}


def config(folder: Path, **settings: Any) -> DatasetConfig:
    tree = {"folder": str(folder), "resolution": SIZE, "captions": ["a {}"], "mask": "file", **settings}
    return build(DatasetConfig, tree)


def draws(folder: Path, count: int = 12, **settings: Any) -> list[Draw]:
    chosen = config(folder, **settings)
    pictures = Pictures.from_pictures(scan(chosen), chosen, "sks")
    return [pictures.draw(0, position) for position in range(count)]


def complaint(folder: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        scan(config(folder, **settings))
    return str(error.value)


def pattern(width: int = 3 * SIZE, height: int = SIZE, seed: int = 0) -> np.ndarray:
    """Random grays, (h, w)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def save_pair(folder: Path, name: str = "a", gray: np.ndarray | None = None, alpha: bool = False, **options: Any):
    """A gray picture and a mask of the same values, so that what happens to one can be seen in the other."""
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pattern() if gray is None else gray)
    if alpha:
        Image.merge("LA", (image, image)).save(folder / f"{name}.png", **options)
    else:
        image.save(folder / f"{name}.png", **options)
        image.save(folder / f"{name}.mask.png", **options)
    return folder


@pytest.mark.parametrize("turned", [1, 6])
def test_a_mask_is_cropped_and_mirrored_with_its_picture(tmp_path: Path, turned: int):
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    found = draws(save_pair(tmp_path, exif=exif), 40, **DRAWN)
    assert len({draw.crop for draw in found}) > 20
    for draw in found:
        np.testing.assert_allclose(draw.coverage(1)[0] * 2 - 1, draw.pixels()[0], atol=1e-6)


def test_transparency_is_cropped_and_mirrored_with_its_picture(tmp_path: Path):
    for draw in draws(save_pair(tmp_path, alpha=True), 40, mask="alpha", background="#000000", **DRAWN):
        gray = draw.coverage(1)[0] * 255  # the picture's own, shown on black through itself
        np.testing.assert_allclose((draw.pixels()[0] + 1) * 127.5, gray * gray / 255, atol=1)


def test_a_latent_counts_as_much_of_its_pixels_as_the_mask_covers(tmp_path: Path):
    (draw,) = draws(save_pair(tmp_path, gray=pattern(SIZE)), 1)
    cells = pattern(SIZE).reshape(SIZE // 4, 4, SIZE // 4, 4).mean((1, 3)) / 255
    np.testing.assert_allclose(draw.coverage(4)[0], cells, atol=1e-6)


def test_a_mask_is_scaled_by_area(tmp_path: Path):
    values = np.zeros((4 * SIZE, 4 * SIZE), np.uint8)
    values[::4] = 255
    (draw,) = draws(save_pair(tmp_path, gray=values), 1)
    np.testing.assert_allclose(draw.coverage(1), 0.25, atol=0.01)


@pytest.mark.parametrize("mask", ["file", "alpha"])
def test_a_picture_without_a_mask_is_learnt_whole(tmp_path: Path, mask: str):
    save_pair(tmp_path, alpha=mask == "alpha")
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "b.png")
    Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 255)).save(tmp_path / "c.png")
    found = draws(tmp_path, 30, mask=mask)
    assert {Path(draw.path).name for draw in found} == {"a.png", "b.png", "c.png"}
    assert all((draw.coverage(2).min() == 1) == (Path(draw.path).name != "a.png") for draw in found)


def test_a_mask_is_no_picture_and_the_prior_has_none(tmp_path: Path):
    chosen = config(save_pair(tmp_path))
    (picture,) = scan(chosen)
    assert (Path(picture.path).name, Path(picture.mask).name) == ("a.png", "a.mask.png")
    prior = Pictures.from_pictures([picture], chosen, "sks").as_prior("a thing")
    assert prior.draw(0, 0).coverage(2).min() == 1


def test_transparent_parts_of_a_mask_are_outside(tmp_path: Path):
    save_pair(tmp_path, gray=pattern(SIZE))
    mask = Image.new("LA", (SIZE, SIZE), (255, 0))
    mask.putpixel((0, 0), (255, 255))
    mask.save(tmp_path / "a.mask.png")
    (draw,) = draws(tmp_path, 1)
    assert draw.coverage(1).sum() == draw.coverage(1)[0, 0, 0] == 1


def resize(folder: Path) -> None:
    Image.new("L", (SIZE, SIZE), 255).save(folder / "a.mask.png")


def blacken(folder: Path) -> None:
    Image.new("L", (3 * SIZE, SIZE)).save(folder / "a.mask.png")


def double(folder: Path) -> None:
    Image.new("L", (3 * SIZE, SIZE), 255).save(folder / "a.mask.webp")


def orphan(folder: Path) -> None:
    Image.new("L", (SIZE, SIZE), 255).save(folder / "aa.mask.png")


@pytest.mark.parametrize(
    ("harm", "mentions"),
    [
        (resize, ["a.mask.png", f"is {SIZE} x {SIZE}", f"{3 * SIZE} x {SIZE}"]),
        (blacken, ["a.mask.png", "black all over"]),
        (double, ["a.png", "a.mask.png and a.mask.webp"]),
        (orphan, ["aa.mask.png", "belongs to no picture"]),
        (lambda folder: (folder / "a.mask.png").write_text("none"), ["a.mask.png", "is no picture"]),
        (lambda folder: (folder / "a.mask.png").unlink(), ["dataset.mask", "name.mask.png"]),
    ],
    ids=["size", "black", "two", "orphan", "text", "none at all"],
)
def test_a_mask_that_cannot_be_meant_is_named(tmp_path: Path, harm: Any, mentions: list[str]):
    harm(save_pair(tmp_path))
    message = complaint(tmp_path)
    assert len(message.splitlines()) == 1 and all(mention in message for mention in mentions), message


@pytest.mark.parametrize("mask", ["none", "alpha"])
def test_masks_that_nobody_asked_for_are_not_taken_for_pictures(tmp_path: Path, mask: str):
    save_pair(tmp_path)
    assert "a.mask.png: is named as a mask. Set dataset.mask: file" in complaint(tmp_path, mask=mask)


def test_a_picture_that_is_transparent_all_over_is_named(tmp_path: Path):
    save_pair(tmp_path, alpha=True)
    Image.new("RGBA", (SIZE, SIZE)).save(tmp_path / "b.png")
    assert "b.png: is transparent all over" in complaint(tmp_path, mask="alpha")


@pytest.mark.parametrize(
    ("settings", "mention"),
    [
        ({"folder": "a", "unmasked_weight": 0.1}, "unmasked_weight: has no effect"),
        ({"folder": "a", "mask": "file", "unmasked_weight": 1.5}, "unmasked_weight"),
        ({"source": "a/b", "mask": "file"}, "mask: file is for folders"),
        ({"folder": "a", "mask": "flie"}, "mask: "),
    ],
    ids=str,
)
def test_settings_of_masks_that_do_not_fit_are_refused(settings: dict[str, Any], mention: str):
    with pytest.raises(UserError, match=mention):
        build(DatasetConfig, settings)


def lesson(base_folder: Any, output: Path, method: str = "lora", way: Any = "plain", family="stable_diffusion", **more):
    folder = output / "pictures"
    if not folder.exists():
        for number in range(3):
            save_pair(folder, str(number), pattern(48, 40, number))
    dataset = {"mask": "file", "captions": ["a {} thing"], **DRAWN, **more.pop("dataset", {})}
    return lessons.recipe(base_folder(family), output, method, way, folder, dataset=dataset, **more)


def first_batch(recipe: Any) -> tuple[Any, Any]:
    trainer = run.prepare(recipe).trainer
    return trainer, trainer._drawn(0)[1][0]


@pytest.mark.parametrize("outside", [0.0, 0.25])
def test_the_loss_of_a_sample_is_the_mean_weighted_by_its_mask(base_folder: Any, tmp_path: Path, outside: float):
    trainer, batch = first_batch(lesson(base_folder, tmp_path, dataset={"unmasked_weight": outside}))
    family = trainer.student.family
    (draws,) = trainer.shares.draw(0)
    cells = np.stack([draw.coverage(2) for draw in draws])
    assert batch.mask.shape == (2, 1, SIZE // 2, SIZE // 2)
    torch.testing.assert_close(batch.mask, torch.from_numpy(outside + (1 - outside) * cells))
    with torch.no_grad():
        target = family.objective.target(batch.latents, batch.noise, batch.time)
        noised = family.objective.add_noise(batch.latents, batch.noise, batch.time)
        errors = (family.denoise(noised, batch.time, batch.prompt, batch.geometry) - target).square()
        weights = batch.mask.expand_as(errors)
        expected = (errors * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))
        torch.testing.assert_close(trainer.student(batch), expected)


def test_errors_outside_the_mask_teach_nothing(base_folder: Any, tmp_path: Path):
    trainer, batch = first_batch(lesson(base_folder, tmp_path))
    mask = torch.zeros_like(batch.mask)
    mask[..., :8] = 1
    batch = replace(batch, mask=mask)
    target = trainer.student.family.objective.target(batch.latents, batch.noise, batch.time)
    for place, is_seen in ((3, True), (12, False)):
        other = target.clone()
        other[..., place] += 5
        before, after = (denoising_errors(trainer.student.family, batch, wanted) for wanted in (target, other))
        assert torch.equal(before, after) != is_seen


def test_a_white_mask_is_none(base_folder: Any, tmp_path: Path):
    trainer, batch = first_batch(lesson(base_folder, tmp_path))
    with torch.no_grad():
        white = trainer.student(replace(batch, mask=torch.ones_like(batch.mask)))
        torch.testing.assert_close(white, trainer.student(replace(batch, mask=None)))


def test_a_crop_beside_the_mask_teaches_nothing_and_breaks_nothing(base_folder: Any, tmp_path: Path):
    trainer, batch = first_batch(lesson(base_folder, tmp_path))
    losses = trainer.student(replace(batch, mask=torch.zeros_like(batch.mask)))
    losses.sum().backward()
    assert losses.tolist() == [0, 0]
    assert all(parameter.grad.abs().max() == 0 for parameter in trainer.student.parameters())


@pytest.mark.parametrize("prior", ["images", "prediction"])
def test_the_class_is_never_masked(base_folder: Any, tmp_path: Path, prior: str):
    way = {"prior": prior, "class_prompt": "a thing", "num_class_images": 2}
    _, batch = first_batch(lesson(base_folder, tmp_path, "dreambooth", way))
    assert batch.num_prior == 2
    assert batch.mask[2:].min() == 1 and batch.mask[:2].max(dim=2).values.min() < 1
    assert torch.equal(batch.ends(0, 2).mask, batch.mask[2:])


@pytest.mark.parametrize("mask", ["file", "alpha"])
@pytest.mark.parametrize("family", tiny.BASES)
def test_every_family_learns_behind_a_mask_that_is_read_before_the_first_step(
    family: str, mask: str, base_folder: Any, tmp_path: Path
):
    folder = tmp_path / "pictures"
    for number in range(3):
        save_pair(folder, str(number), pattern(48, 40, number), alpha=mask == "alpha")
    trainer = run.prepare(lesson(base_folder, tmp_path, family=family, dataset={"mask": mask})).trainer
    steps = trainer.steps()
    next(steps)
    for file in folder.iterdir():
        file.unlink()
    assert all(np.isfinite(report.loss) for report in steps)


def test_wherever_there_is_room_for_masks_the_losses_are_the_same(
    base_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    losses = []
    for place in lessons.PLACES:
        lessons.keep_in(place, monkeypatch)
        trainer = run.prepare(lesson(base_folder, tmp_path / place)).trainer
        losses.append([report.loss for report in trainer.steps()])
        assert bool(trainer.encoder.masks.kept) == (place != "nowhere")
    assert losses[0] == losses[1] == losses[2]
