"""The sheet pipelines.webp: the sample fox in every task. `python data/gallery/pipelines.py`, after `make demo`.

Each row begins with what is given; the rest are seeds 0, 1 and 2, none picked. The given scenes come from the base
itself. Rows of companions that are not there are left out.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from finetune.canvas import Margins
from finetune.edges import edge_map
from finetune.generate import generate
from finetune.grid import make_grid
from finetune.load import Adapter
from finetune.quiet import quiet
from finetune.tasks import Inputs

ROOT = Path(__file__).parent.parent.parent
BASE, FOX = ROOT / "data/base", ROOT / "outputs/demo"
CONTROLNET, EDITOR = (BASE / "companions" / name for name in ("controlnet", "instruct_pix2pix"))
GUIDANCE, SIZE, COUNT = 5.0, 256, 3


def draw(prompt: str, inputs: Inputs | None = None, *, fox: bool = True, seed: int = 0, count: int = COUNT):
    adapters = [Adapter(FOX)] if fox else []
    return generate(BASE, [prompt] * count, inputs, adapters=adapters, guidance=GUIDANCE, seed=seed)


def scene(prompt: str, seed: int, *, fox: bool = False) -> Image.Image:
    return draw(prompt, fox=fox, seed=seed, count=1)[0]


def mask() -> Image.Image:
    """Everything but the top and the left of the picture."""
    mask = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(mask).rounded_rectangle((48, 72, 232, 255), 24, fill=255)
    return mask


def rows() -> dict[str, list[Image.Image]]:
    beach, cat = scene("the beach", 12), scene("a cat in the snow", 0)
    fox = scene("a sks animal in the forest", 0, fox=True)
    shown = Image.composite(Image.new("RGB", beach.size, "white"), beach, mask().point(lambda value: value * 0.7))
    found = {
        '--image --mask "a sks animal on the beach"': [
            shown,
            *draw("a sks animal on the beach", Inputs(image=beach, mask=mask())),
        ],
        '--image --extend right=192 "a cat in the forest"': [
            fox,
            *draw("a cat in the forest", Inputs(image=fox, extend=Margins(right=192)), fox=False),
        ],
        '--image --strength 0.7 "a sks animal in the snow"': [
            cat,
            *draw("a sks animal in the snow", Inputs(image=cat, strength=0.7)),
        ],
    }
    if CONTROLNET.is_dir():
        guide = ROOT / "data/concepts/fox/06.png"
        edges = edge_map(ImageOps.fit(Image.open(guide).convert("RGB"), (SIZE, SIZE)))
        inputs = Inputs(control_from=(guide,), controlnet=(str(CONTROLNET),))
        found['--control-from --controlnet "a sks animal at night"'] = [edges, *draw("a sks animal at night", inputs)]
    if EDITOR.is_dir():
        inputs = Inputs(image=fox, editor=str(EDITOR))
        found['--image --editor "make it night"'] = [fox, *draw("make it night", inputs)]
    return found


if __name__ == "__main__":
    quiet()
    sheet = make_grid(rows(), [], SIZE)
    sheet.resize((sheet.width * 3 // 4, sheet.height * 3 // 4), Image.Resampling.LANCZOS).save(
        Path(__file__).with_suffix(".webp"), quality=80, method=6
    )
