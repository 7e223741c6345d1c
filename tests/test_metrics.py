"""The evaluation's measures: equal to their formulas and to others' code, and calibrated on pictures of known truth."""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from finetune.errors import UserError
from finetune.evaluation import metrics
from finetune.evaluation.copying import CopyLine
from finetune.evaluation.encoders import EMBEDDED, Encoder, Preprocessing
from finetune.evaluation.intervals import Score

CONCEPTS = EMBEDDED.parent.parent / "concepts"
SUBJECTS = ("fox", "octopus", "robot", "teapot", "teddy_bear")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """The embedded base's own."""
    return Encoder.load(str(EMBEDDED))


def photos(concept: str) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted((CONCEPTS / concept).glob("*.png"))]


def units(count: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def cosine(first: Tensor, second: Tensor) -> float:
    return float(first @ second / first.norm() / second.norm())


def test_identity_is_the_mean_cosine_with_every_photo():
    pictures, real = units(3), units(4, seed=1)
    by_hand = [sum(cosine(picture, photo) for photo in real) / 4 for picture in pictures]
    assert metrics.identity(pictures, real).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_the_ceiling_is_the_identity_of_real_photos_that_are_not_compared_with_themselves():
    real, others = units(3), units(2, seed=1)
    pairs = [cosine(a, b) for a, b in combinations(real, 2)] * 2 + [cosine(a, b) for a in real for b in others]
    assert metrics.ceiling(real, others) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert metrics.ceiling(real[:1], others[:0]) is None


def test_the_floor_is_the_identity_of_the_nearest_quarter():
    pictures, real = units(8), units(3, seed=1)
    best = sorted(metrics.identity(pictures, real).tolist())[-2:]
    assert metrics.floor(pictures, real) == pytest.approx(sum(best) / 2, abs=1e-6)
    mean = float(metrics.identity(pictures, real).mean())
    assert metrics.floor(pictures, real, is_style=True) == pytest.approx(mean, abs=1e-6)


def test_spread_is_the_mean_distance_of_all_pairs():
    pictures = units(5)
    pairs = [1 - cosine(a, b) for a, b in combinations(pictures, 2)]
    assert float(metrics.spread(pictures).mean()) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_contrast_is_what_a_picture_has_with_its_own_prompt_alone():
    pictures, prompts = units(3), units(3, seed=1)
    own = torch.tensor([2, 0, 1])
    by_hand = [
        cosine(picture, prompts[i]) - sum(cosine(picture, prompts[j]) for j in range(3) if j != i) / 2
        for picture, i in zip(pictures, own.tolist(), strict=True)
    ]
    assert metrics.contrast(pictures, prompts, own).tolist() == pytest.approx(by_hand, abs=1e-6)
    assert metrics.contrast(pictures, prompts[:1], torch.zeros(3, dtype=torch.long)).tolist() == pytest.approx(
        metrics.following(pictures, prompts[:1].expand(3, -1)).tolist()
    )


def test_clip_t_is_what_clip_itself_computes(encoder: Encoder):
    pictures, prompts = photos("fox")[:3], ["an animal at night", "a car", "a toy on a teal background"]
    clip = CLIPModel.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(EMBEDDED.parent / "tokenizer")(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        seen = clip(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            pixel_values=encoder.info.preprocessing.apply(pictures),
        )
    cosines = (seen.logits_per_image / clip.logit_scale.exp()).diagonal()
    ours = metrics.following(encoder.see(pictures), encoder.read(prompts))
    assert torch.allclose(ours, cosines, atol=1e-5)


def test_the_measures_are_those_of_torchmetrics(encoder: Encoder):
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional import pairwise_cosine_similarity
    from torchmetrics.functional.multimodal import clip_score

    class Model:
        """With features as they were before transformers 5, which torchmetrics 1.9 expects."""

        config = encoder.model.config

        def to(self, device):
            return self

        def get_image_features(self, pixels):
            return encoder.model.get_image_features(pixels).pooler_output

        def get_text_features(self, ids, mask):
            return encoder.model.get_text_features(ids, mask).pooler_output

    class Processor:
        """Pixels and words as this package prepares them; the arithmetic is torchmetrics'."""

        tokenizer = encoder.tokenizer

        def __call__(self, text=None, images=None, **_):
            if images is not None:
                shown = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
                return {"pixel_values": encoder.info.preprocessing.apply(shown)}
            return encoder.tokenizer(text, padding=True, return_tensors="pt")

    shown, prompts = (
        photos("robot")[:4],
        ["a toy on the beach", "a toy at night", "a car", "a toy on a teal background"],
    )
    pictures = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in shown]
    theirs = clip_score(pictures, prompts, model_name_or_path=lambda: (Model(), Processor()))
    embeddings, real = encoder.see(shown), encoder.see(photos("fox"))
    assert float(metrics.following(embeddings, encoder.read(prompts)).mean()) == pytest.approx(
        float(theirs) / 100, abs=1e-5
    )
    assert torch.allclose(
        metrics.identity(embeddings, real), pairwise_cosine_similarity(embeddings, real, reduction="mean"), atol=1e-5
    )
    alike = pairwise_cosine_similarity(embeddings, zero_diagonal=True)
    assert torch.allclose(metrics.spread(embeddings), 1 - alike.sum(1) / 3, atol=1e-5)


def test_pixels_are_prepared_as_the_encoders_own_processor_does_it():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    settings = {"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}}
    settings |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    wide = photos("fox")[0].resize((90, 60))
    theirs = CLIPImageProcessorPil(**settings)(wide, return_tensors="pt").pixel_values
    assert torch.allclose(Preprocessing.read(settings, 16).apply([wide]), theirs, atol=1e-5)


def test_what_an_encoders_file_lacks_is_taken_from_its_config():
    assert Preprocessing.read({}, 128) == Preprocessing(128, 128, (0.5,) * 3, (0.5,) * 3)
    assert Preprocessing.read({"size": 256, "crop_size": 224}, 32).resize == 256


@pytest.mark.parametrize("name", ["nowhere/at-all", str(EMBEDDED.parent / "text_encoder")])
def test_what_is_no_encoder_of_pictures_is_refused(name: str):
    with pytest.raises(UserError, match="--encoder"):
        Encoder.load(name)


def test_weights_are_told_apart_by_their_fingerprint(encoder: Encoder):
    assert Encoder.load(str(EMBEDDED)).info == encoder.info and len(encoder.info.fingerprint) == 16


def test_intervals_hold_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        score = Score.of(random.gamma(4.0, 0.25, 40).tolist(), "prompts", seed=seed)  # its mean is 1
        assert score.low is not None and score.high is not None
        held += score.low <= 1 <= score.high
    assert 0.90 <= held / 300 <= 0.98


def test_intervals_over_prompts_do_not_take_their_pictures_for_independent():
    random = np.random.default_rng(0)
    held = {"by prompts": 0, "by pictures": 0}
    for seed in range(200):
        level = random.normal(0, 1, 30)
        values = (level[:, None] + random.normal(0, 0.1, (30, 8))).ravel().tolist()
        groups = np.repeat(np.arange(30), 8).tolist()
        for name, given in {"by prompts": groups, "by pictures": None}.items():
            score = Score.of(values, "prompts", given, seed)
            assert score.low is not None and score.high is not None
            held[name] += score.low <= 0 <= score.high
    assert held["by prompts"] / 200 >= 0.90 and held["by pictures"] / 200 < 0.70


def test_a_single_unit_has_no_interval():
    assert Score.of([1.0, 3.0], "prompts", [7, 7]) == Score(2.0, None, None, 1, "prompts")


def changed(photo: Image.Image) -> list[Image.Image]:
    """Copies that are changed otherwise than those that the line was drawn by."""
    left, top = (round(0.04 * side) for side in photo.size)
    with io.BytesIO() as buffer:
        photo.save(buffer, "WEBP", quality=70)
        again = Image.open(buffer).convert("RGB")
    return [photo, photo.crop((left, 0, photo.width, photo.height - top)), again, photo.resize((200, 200))]


@pytest.mark.parametrize("concept", [*SUBJECTS, "fluent_3d", "openmoji"])
def test_pasted_training_photos_are_flagged(concept: str, encoder: Encoder):
    taught = photos(concept)
    line, real = CopyLine.calibrate(taught, encoder), encoder.see(taught)
    pasted = encoder.see([copy for photo in taught for copy in changed(photo)])
    assert line.crossed(metrics.nearest(pasted, real)[0]).all()


@pytest.mark.parametrize("concept", SUBJECTS)
def test_another_real_photo_of_the_subject_is_not_flagged(concept: str, encoder: Encoder):
    for left_out in range(7):
        taught = photos(concept)
        honest = taught.pop(left_out)
        nearest, _ = metrics.nearest(encoder.see([honest]), encoder.see(taught))
        assert not CopyLine.calibrate(taught, encoder).crossed(nearest).any()


def test_pictures_of_the_base_are_not_flagged(encoder: Encoder):
    sheet = Image.open(EMBEDDED.parent / "samples.webp").convert("RGB")
    side = sheet.width // 6
    drawn = [
        sheet.crop((x, y, x + side, y + side))
        for y in range(0, sheet.height - side + 1, side)
        for x in range(0, sheet.width - side + 1, side)
    ]
    for concept in SUBJECTS:
        taught = photos(concept)
        nearest, _ = metrics.nearest(encoder.see(drawn), encoder.see(taught))
        assert not CopyLine.calibrate(taught, encoder).crossed(nearest).any()


def test_photos_that_are_as_alike_as_copies_flag_nothing(encoder: Encoder):
    photo = photos("fox")[0]
    line = CopyLine.calibrate([photo, photo.resize((250, 250))], encoder)
    assert not line.crossed(torch.ones(1)).any() and line.line > 1
