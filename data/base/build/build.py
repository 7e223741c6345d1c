"""The whole build on one or more accelerators: every stage leaves a checkpoint and is skipped when that is there."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from composer import Composer
from gallery import Gallery, draw_specifications
from launch import launch, set_up
from models import new_autoencoder, new_clip, new_denoiser, text_encoder_of
from PIL import Image
from prompts import shared_prompts, world_prompts
from settings import Settings
from sprites import Sprite, load_pack, toy_pack
from team import Team
from tokens import build_tokenizer, encode
from torch import Tensor
from train_autoencoder import encode_gallery, train_autoencoder, warm_autoencoder
from train_clip import train_clip
from train_denoiser import Generator, sample, save_generator, train_denoiser, warm_denoiser
from transformers import CLIPModel, CLIPTokenizer
from world import World

SHOWN = (
    "a dog face on a red background, noto style", "a cat face wearing a crown at night, twemoji style",
    "a banana next to a red apple on the beach, flat style", "a bird in the sky",
    "three ghosts on a black background, noto style",
    "a whale under water, noto style",
    "a pig face wearing sunglasses on a pink and white striped background, flat style",
    "a blue horse in the snow", "an airplane at sunset, flat style", "a golden turtle on a table, noto style",
    "a cupcake wearing a top hat at a party, noto style", "a tiger face on top of a gift in a forest, twemoji style",
    "a frog holding a balloon under a rainbow, flat style", "a cat inside a bucket in the city, noto style",
    "a ufo on the moon", "an animal in a meadow, flat style",
)  # fmt: skip


def prepare(sprites: list[Sprite], settings: Settings) -> None:
    """Tokenizer and specifications, made by CPU workers before any accelerator is touched."""
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer" / "merges.txt").exists():
        build_tokenizer(
            World(sprites), settings.vocabulary, folder / "tokenizer", 40_000 if not settings.steps else 300
        )
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    if not (folder / "specifications.npz").exists():
        draw_specifications(sprites, settings.num_pictures, settings, tokenizer, folder / "specifications.npz")


def save_grid(pictures: Tensor, columns: int, path: Path) -> None:
    """pictures [n, 3, h, w] in 0..1 side by side."""
    n, _, h, w = pictures.shape
    rows = n // columns
    grid = (
        pictures[: rows * columns]
        .float()
        .cpu()
        .view(rows, columns, 3, h, w)
        .permute(0, 3, 1, 4, 2)
        .reshape(rows * h, columns * w, 3)
    )
    Image.fromarray((grid.clamp(0, 1).numpy() * 255).round().astype(np.uint8)).save(path)


class Build:
    """One run: what every stage needs, and the stages in order."""

    def __init__(
        self, pictures: Tensor, sprites: list[Sprite], tokenizer: CLIPTokenizer, settings: Settings, team: Team
    ) -> None:
        self.settings, self.team, self.tokenizer, self.sprites = settings, team, tokenizer, sprites
        self.composer = Composer(pictures, sprites, settings.picture_size, team.device)
        set_up(team)

    def ids(self, captions: list[str]) -> Tensor:
        return torch.as_tensor(encode(self.tokenizer, captions).astype(np.int64), device=self.team.device)

    def stage(self, name: str, module: torch.nn.Module, train) -> None:
        """Restore the module from its checkpoint, or train it and leave one."""
        path = self.settings.folder / f"{name}.pt"
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            module.load_state_dict(state["weights"])
            if "scale" in state:
                module.register_to_config(scaling_factor=state["scale"])
            module.to(self.team.device).eval().requires_grad_(False)
            return
        train()
        if self.team.leads:
            state = {
                "weights": {
                    k: v.cpu().half() if v.is_floating_point() else v.cpu() for k, v in module.state_dict().items()
                }
            }
            if name == "autoencoder":
                state["scale"] = module.config.scaling_factor
            partial = path.with_suffix(".partial")
            torch.save(state, partial)
            partial.rename(path)
        self.team.wait()
        self.team.log(f"{name} saved")

    def seeded(self, make, seed: int):
        """The same initial weights on every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make()

    def run(self) -> None:
        settings, team = self.settings, self.team
        gallery = Gallery.paint(
            settings.folder / "specifications.npz", self.composer, team, 256 if settings.compile else 16
        )
        team.log(f"painted {len(gallery)} pictures on each of {team.size}")
        clip = self.seeded(lambda: new_clip(settings, self.tokenizer), 11)
        self.stage("clip", clip, lambda: train_clip(clip, gallery, settings, team, settings.seconds_clip))
        judge = self.seeded(lambda: new_clip(settings, self.tokenizer, evaluation=True), 23)
        self.stage("evaluation", judge, lambda: train_clip(judge, gallery, settings, team, settings.seconds_evaluation))
        vae = self.seeded(lambda: new_autoencoder(settings), 37)
        self.stage(
            "autoencoder", vae, lambda: train_autoencoder(vae, gallery, settings, team, settings.seconds_autoencoder)
        )
        self.show_reconstructions(vae, gallery)
        self.train_generator(clip, vae, gallery)

    def train_generator(self, clip: CLIPModel, vae, gallery: Gallery) -> None:
        settings, team = self.settings, self.team
        model = self.seeded(lambda: Generator(text_encoder_of(clip), new_denoiser(settings)).requires_grad_(True), 41)
        shown, empty = self.ids(list(SHOWN)), self.ids([""])

        def show(weights: Generator, step: int) -> None:
            save_grid(sample(weights, vae, shown, empty, settings), 4, settings.folder / f"samples_{step:06d}.png")
            save_generator(weights, settings.folder)

        def train() -> None:
            latents = encode_gallery(vae, gallery, settings, team)
            all_ids = gallery.ids
            gallery.pictures = gallery.pictures[:256].clone()
            team.log(f"encoded, latent std {latents[:1000].float().std().item():.3f}")
            seconds = max(1.0, settings.total - team.elapsed())
            train_denoiser(model, latents, all_ids, empty, settings, team, seconds, show)

        self.stage("generator", model, train)
        if team.leads:
            show(model, 999_999)
            self.paint_judged(model, vae)

    def paint_judged(self, model: Generator, vae, batch: int = 128) -> None:
        """Pictures of the judging prompts, while the accelerator is still there; `measure` reads them."""
        count, empty = self.settings.num_judged, self.ids([""])
        for name, prompts in (
            ("world", world_prompts(self.sprites, count)),
            ("shared", shared_prompts(self.sprites, count // 8)),
        ):
            folder = self.settings.folder / "judged" / name
            folder.mkdir(parents=True, exist_ok=True)
            ids = self.ids([p.caption for p in prompts])
            for i in range(0, len(ids), batch):
                made = sample(model, vae, ids[i : i + batch], empty, self.settings, seed=i)
                for j, pixels in enumerate((made.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()):
                    Image.fromarray(pixels).save(folder / f"{i + j:04d}.webp", quality=95)

    @torch.no_grad()
    def show_reconstructions(self, vae, gallery: Gallery) -> None:
        """Evaluation pictures above what the autoencoder makes of them."""
        if not self.team.leads:
            return
        world, rng = World(self.sprites, evaluation=True), Random(5)
        truth = self.composer.draw([world.picture(rng) for _ in range(8)])
        made = vae.decode(vae.encode((truth * 2 - 1).to(memory_format=torch.channels_last)).latent_dist.mode()).sample
        save_grid(torch.cat([truth, made / 2 + 0.5]), 8, self.settings.folder / "reconstructions.png")


def load_sprites(pack: Path | None) -> tuple[Tensor, list[Sprite]]:
    return load_pack(pack) if pack else toy_pack()


def work(pack: Path | None, settings: Settings, start: float) -> None:
    """Everything that one process does, once the specifications are there."""
    team = Team.join(start)
    pictures, sprites = load_sprites(pack)
    while not (settings.folder / "specifications.npz").exists():
        time.sleep(0.2)
        assert team.elapsed() < 300, "the specifications were not drawn"
    tokenizer = CLIPTokenizer.from_pretrained(settings.folder / "tokenizer")
    Build(pictures, sprites, tokenizer, settings, team).run()
    team.log("done")
    if team.leads:
        (settings.folder / "done.json").write_text(json.dumps({"seconds": team.elapsed()}))
    team.wait()


def warm(settings: Settings) -> None:
    """Compile the training steps into the cache on disk, beside the first stages, which leave the CPU idle."""
    for compile_step in (warm_autoencoder, warm_denoiser):
        start = time.time()
        compile_step(settings)
        print(f"{compile_step.__name__}: {time.time() - start:.0f}s", flush=True)


def train(pack: Path | None, settings: Settings, start: float) -> None:
    """Prepare on the CPU and train, with one process per accelerator; without a pack, on toy sprites."""

    def prepared() -> None:
        prepare(load_sprites(pack)[1], settings)
        print(f"[{time.time() - start:6.0f}s] prepared {settings.num_pictures} pictures", flush=True)

    launch(work, (pack, settings, start), prepared, partial(warm, settings) if settings.compile else None)
