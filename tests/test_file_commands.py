"""convert, merge, resize, extract and inspect: what they write, what they say, and what they refuse."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from finetune import cli
from finetune.adapter import AdapterWeights, Update, WordVectors
from finetune.errors import UserError
from finetune.extract import extract
from finetune.formats import read, write
from finetune.inspection import inspect
from finetune.load import Adapter, load_adapters
from finetune.merge import merge, merge_into_base
from finetune.resize import shrink, truncate

LAYERS = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A command line to its status, output and errors."""

    def command(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return command


def lora(rank: int = 4, scale: float = 0.5, seed: int = 0, **settings: Any) -> AdapterWeights:
    """Of a linear layer and a convolution of the tiny base's UNet."""
    torch.manual_seed(seed)
    linear = Update(torch.randn(rank, 16), torch.randn(16, rank), scale)
    convolution = Update(torch.randn(rank, 16, 3, 3), torch.randn(16, rank, 1, 1), scale)
    parts = {"unet": dict(zip(LAYERS, (linear, convolution), strict=True))}
    return AdapterWeights(parts, "sd1", {"trigger": "sks", "base": "toy", **settings})


def matrices(content: Any) -> list[torch.Tensor]:
    assert isinstance(content, AdapterWeights)
    factors = [update.factors() for *_, update in content.updates()]
    return [up @ down for up, down in factors]


def test_convert_there_and_back_is_bit_identical(run: Any, tmp_path: Path):
    file = write(lora(), tmp_path / "fox.safetensors", "kohya")
    assert run("convert", file, "--to", "diffusers", "--output", tmp_path / "d.safetensors")[0] == 0
    status, out, _ = run("convert", tmp_path / "d.safetensors", "--to", "kohya")
    assert status == 0 and out.strip() == str(tmp_path / "d.kohya.safetensors")
    for first, second in zip(matrices(read(file)), matrices(read(tmp_path / "d.kohya.safetensors")), strict=True):
        assert torch.equal(first, second)


def test_convert_names_an_embedding_after_its_word_where_the_name_is_the_word(run: Any, tmp_path: Path):
    save_file({"<my-fox>": torch.ones(2, 768)}, tmp_path / "learned_embeds.safetensors")
    status, out, _ = run("convert", tmp_path / "learned_embeds.safetensors", "--to", "embedding_a1111")
    assert status == 0 and "my-fox" in out
    assert load_file(tmp_path / "my-fox.safetensors").keys() == {"emb_params"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--to", "koya"], "Did you mean 'kohya'"),
        (["--to", "embedding"], "not a format of LoRAs"),
        (["--to", "kohya", "--architecture", "sdlx"], "Did you mean 'sdxl'"),
        (["--to", "diffusers"], "the file itself"),
        (["--to", "kohya", "--output", "taken.safetensors"], "--overwrite"),
        (["--to", "kohya", "--output", "lora.pt"], "written as .safetensors"),
    ],
)
def test_convert_refuses_with_words(arguments: list[str], problem: str, run: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    for name in ("fox", "taken"):
        write(lora(), Path(f"{name}.safetensors"), "diffusers")
    before = Path("taken.safetensors").read_bytes()
    status, _, err = run("convert", "fox.safetensors", *arguments)
    assert status == 2 and problem in err and "Traceback" not in err
    assert Path("taken.safetensors").read_bytes() == before


def test_merge_is_the_weighted_sum_exactly(run: Any, tmp_path: Path):
    write(lora(4, 0.5, seed=1), tmp_path / "a.safetensors", "kohya")
    write(lora(3, 2.0, seed=2, trigger="zwx"), tmp_path / "b.safetensors", "diffusers")
    given = [f"{tmp_path}/a.safetensors=0.7", f"{tmp_path}/b.safetensors=-0.2"]
    status, out, _ = run("merge", *given, "--output", tmp_path / "m.safetensors")
    assert status == 0 and "exact" in out
    merged = read(tmp_path / "m.safetensors")
    sums = [
        0.7 * a - 0.2 * b for a, b in zip(matrices(lora(4, 0.5, seed=1)), matrices(lora(3, 2.0, seed=2)), strict=True)
    ]
    for found, expected in zip(matrices(merged), sums, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert merged.header["trigger"] == "sks, zwx" and merged.header["merged_from"].startswith("a.safetensors=0.7")


def test_merge_at_a_rank_keeps_the_best_and_says_how_much(run: Any, tmp_path: Path):
    for name, seed in (("a", 1), ("b", 2)):
        write(lora(seed=seed), tmp_path / f"{name}.safetensors", "diffusers")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    status, out, _ = run("merge", *files, "--rank", 4, "--to", "kohya", "--output", tmp_path / "m.safetensors")
    assert status == 0 and "rank 4" in out and "% of the squared update" in out
    exact = [a + b for a, b in zip(matrices(lora(seed=1)), matrices(lora(seed=2)), strict=True)]
    for found, full in zip(matrices(read(tmp_path / "m.safetensors")), exact, strict=True):
        u, s, vh = torch.linalg.svd(full, full_matrices=False)
        torch.testing.assert_close(found, u[:, :4] * s[:4] @ vh[:4], atol=1e-3, rtol=1e-3)


def test_merge_refuses_what_is_no_sum(tmp_path: Path):
    good = Adapter(write(lora(), tmp_path / "good.safetensors", "diffusers"))
    (name, update), *_ = lora().parts["unet"].items()
    dora = AdapterWeights({"unet": {name: replace(update, magnitude=torch.ones(16))}}, "sd1")
    narrow = AdapterWeights({"unet": {name: Update(torch.ones(1, 8), torch.ones(16, 1))}}, "sd1")
    for other, problem in (
        (dora, "a DoRA depends on"),
        (narrow, "different shapes"),
        (replace(lora(), architecture="sdxl"), "different models"),
        (WordVectors("it", {"clip_l": torch.ones(1, 768)}, "sd1"), "an embedding is not merged"),
    ):
        to = "embedding" if isinstance(other, WordVectors) else "diffusers"
        file = write(other, tmp_path / "other.safetensors", to, overwrite=True)
        with pytest.raises(UserError, match=problem):
            merge([good, Adapter(file)], tmp_path / "merged.safetensors")
    assert not (tmp_path / "merged.safetensors").exists()


def predict(pipeline: Any) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return pipeline.unet(torch.randn(1, 4, 16, 16), torch.tensor(500), torch.randn(1, 5, 32)).sample


def tiny_pipeline(folder: Path) -> Any:
    return tiny.StableDiffusionPipeline.from_pretrained(folder)


def test_a_base_with_adapters_merged_in_predicts_what_they_do_together(base_folder: Any, tmp_path: Path):
    base = base_folder("stable_diffusion")
    adapters = [
        Adapter(write(lora(seed=seed), tmp_path / f"{seed}.safetensors", "diffusers"), weight)
        for seed, weight in ((1, 0.7), (2, -0.3))
    ]
    expected = predict(load_adapters(tiny_pipeline(base), adapters))
    merge_into_base(adapters, str(base), tmp_path / "merged")
    found = predict(tiny_pipeline(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, predict(tiny_pipeline(base)), atol=1e-2)
    with pytest.raises(UserError, match="--overwrite"):
        merge_into_base(adapters, str(base), tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"1.safetensors", "2.safetensors", "merged"}
    with pytest.raises(UserError, match="cannot be loaded"):
        merge_into_base(adapters, str(tmp_path / "nowhere"), tmp_path / "other")


def test_resize_is_the_best_approximation_and_never_makes_the_product():
    update = Update(torch.randn(12, 40), torch.randn(30, 12), 0.25)
    full = update.factors()[0] @ update.factors()[1]
    u, s, vh = torch.linalg.svd(full, full_matrices=False)
    smaller, kept, total = truncate(update, rank=5, energy=None)
    up, down = smaller.factors()
    torch.testing.assert_close(up @ down, u[:, :5] * s[:5] @ vh[:5], atol=1e-4, rtol=1e-4)
    assert kept / total == pytest.approx(float(s[:5].square().sum() / s.square().sum()))
    assert total == pytest.approx(update.energy())
    wide = Update(torch.randn(50, 8), torch.randn(9, 50))  # of more ranks than the layer has
    assert truncate(wide, rank=None, energy=1.0)[0].rank <= 8


def test_resize_by_energy_keeps_at_least_that_in_every_layer():
    resized = shrink(lora(16), rank=None, energy=0.8)
    assert 0.8 <= resized.worst <= resized.kept < 1
    assert all(update.scale == 1 for *_, update in resized.weights.updates())


def test_resize_writes_the_same_format_and_says_what_is_kept(run: Any, tmp_path: Path):
    file = write(lora(8), tmp_path / "fox.safetensors", "kohya")
    status, out, _ = run("resize", file, "--rank", 2)
    assert status == 0 and "keeps" in out and "in unet." in out
    found = inspect(tmp_path / "fox-rank-2.safetensors")
    assert (found["format"], found["rank"]) == ("kohya", "2")
    assert found["metadata"]["ss_network_dim"] == "2" and 0 < float(found["metadata"]["energy_kept"]) < 1
    for wrong in ([], ["--rank", 2, "--energy", 0.5], ["--energy", 1.5], ["--rank", 2]):
        status, _, err = run("resize", file, *wrong)
        assert status == 2 and err.startswith("error: ")


def test_extract_finds_what_was_merged_in(base_folder: Any, run: Any, tmp_path: Path):
    base = base_folder("stable_diffusion")
    content = lora(4)
    text = {"text_model.encoder.layers.0.self_attn.q_proj": Update(torch.randn(2, 32), torch.randn(32, 2))}
    content = replace(content, parts={**content.parts, "text_encoder": text})
    adapter = Adapter(write(content, tmp_path / "lora.safetensors", "diffusers"))
    merge_into_base([adapter], str(base), tmp_path / "tuned")
    status, out, _ = run("extract", tmp_path / "tuned", base, "--rank", 4, "--output", tmp_path / "small.safetensors")
    assert status == 0 and "unet: 2 layers keep 100.00%" in out and "text_encoder: 1 layers keep 100.00%" in out
    small = read(tmp_path / "small.safetensors")
    assert isinstance(small, AdapterWeights)
    for part, name, expected in content.updates():
        (found, exact) = (up @ down for up, down in (small.parts[part][name].factors(), expected.factors()))
        assert float((found - exact).norm() / exact.norm()) < 1e-2
    energy = ["--energy", 0.5, "--to", "kohya", "--output", tmp_path / "smaller.safetensors"]
    assert run("extract", tmp_path / "tuned", base, *energy)[0] == 0
    assert float(read(tmp_path / "smaller.safetensors").header["energy_kept.unet"]) < 1


def test_extract_counts_what_no_lora_can_hold_as_lost(base_folder: Any, tmp_path: Path):
    base = base_folder("stable_diffusion")
    shutil.copytree(base, tmp_path / "tuned")
    (file,) = (tmp_path / "tuned" / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_norm_out.bias"] += 1.0
    weights["conv_in.weight"] += 0.01
    save_file(weights, file, metadata={"format": "pt"})
    lines = extract(tmp_path / "tuned", base, tmp_path / "small.safetensors", rank=100, energy=None)
    kept = 0.01**2 * weights["conv_in.weight"].numel()
    assert f"{kept / (kept + weights['conv_norm_out.bias'].numel()):.2%}" in lines[1]


def test_extract_refuses_with_words(base_folder: Any, tmp_path: Path):
    base = base_folder("stable_diffusion")
    other = shutil.copytree(base, tmp_path / "other")
    target = tmp_path / "small.safetensors"
    (file,) = (other / "unet").glob("*.safetensors")
    weights = load_file(file)

    def refuses(tuned: Path, problem: str, **sizes: Any) -> None:
        with pytest.raises(UserError, match=problem):
            extract(tuned, base, target, **({"rank": 2, "energy": None} | sizes))

    refuses(other, "do not differ")
    refuses(other, "one of --rank", rank=None)
    refuses(file, "no full checkpoint")
    refuses(tmp_path, "no model_index.json")
    save_file({**weights, "conv_in.weight": torch.full_like(weights["conv_in.weight"], float("nan"))}, file)
    refuses(other, "NaN")
    save_file({**weights, "conv_in.weight": torch.ones(3)}, file)
    refuses(other, "shape")
    save_file({name: value for name, value in weights.items() if name != "conv_in.weight"}, file)
    refuses(other, "conv_in.weight")
    file.write_bytes(file.read_bytes()[:1000])
    refuses(other, "cut short")
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    refuses(other, "not of the same model")
    assert not target.exists()


def test_inspect_tells_what_a_lora_is_and_how_it_is_used(run: Any, tmp_path: Path):
    file = write(lora(4, 0.5), tmp_path / "fox.safetensors", "kohya", dtype=torch.float16)
    status, out, _ = run("inspect", file, "--json")
    (found,) = json.loads(out)
    assert status == 0
    assert {key: found[key] for key in ("format", "architecture", "method", "rank", "alpha", "trigger", "base")} == {
        "format": "kohya",
        "architecture": "Stable Diffusion 1",
        "method": "LoRA",
        "rank": "4",
        "alpha": "2",
        "trigger": "sks",
        "base": "toy",
    }
    assert found["parts"] == {"unet": "2 layers"} and found["precision"] == "float16"
    norms = [float(matrix.norm()) for matrix in matrices(read(file))]
    assert found["norm"]["largest layer"] == pytest.approx(max(norms), rel=1e-3)
    status, out, _ = run("inspect", file, file)
    assert status == 0 and out.count("finetune generate") == 2 and "modelspec.architecture" in out


def test_inspect_tells_of_nan_and_of_broken_pairs_without_failing(tmp_path: Path):
    (name, update), *_ = lora().parts["unet"].items()
    broken = AdapterWeights({"unet": {name: replace(update, up=update.up / 0)}}, "sd1")
    found = inspect(write(broken, tmp_path / "nan.safetensors", "diffusers"))
    assert found["not finite"].startswith("1 layers, such as unet.mid_block")
    save_file({"unet.x.lora_A.weight": torch.ones(2, 8)}, tmp_path / "half.safetensors")
    assert "up is missing" in inspect(tmp_path / "half.safetensors")["problems"][0]


def test_inspect_knows_checkpoints_pickles_embeddings_folders_and_what_it_does_not_know(
    base_folder: Any, tmp_path: Path, run: Any
):
    base = base_folder("stable_diffusion")
    assert inspect(base)["pipeline"] == "StableDiffusionPipeline"
    for part, words in (("unet", "a UNet"), ("vae", "a VAE"), ("text_encoder", "a CLIP text encoder")):
        (file,) = (base / part).glob("*.safetensors")
        assert inspect(file)["format"].startswith(words)
    save_file({"conditioner.embedders.0.weight": torch.ones(1)}, tmp_path / "xl.safetensors")
    assert inspect(tmp_path / "xl.safetensors")["architecture"] == "Stable Diffusion XL"
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "what.safetensors")
    assert inspect(tmp_path / "what.safetensors")["format"] == "unknown"
    (tmp_path / "bad.pt").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert "not opened" in inspect(tmp_path / "bad.pt")["format"]
    write(WordVectors("it", {"clip_l": torch.ones(2, 768), "t5": torch.ones(2, 4096)}, "flux"),
          tmp_path / "it.safetensors", "embedding_comfyui")  # fmt: skip
    found = inspect(tmp_path / "it.safetensors")
    assert (found["word"], found["architecture"], found["vectors"]["t5"]) == ("it", "FLUX.1", "2 x 4096")
    for wrong in ("nowhere.safetensors", ""):
        status, _, err = run("inspect", tmp_path / wrong)
        assert status == 2 and err.startswith("error: ")
