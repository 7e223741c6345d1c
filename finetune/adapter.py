"""What an adapter file means, whichever format it came in.

Shapes: m outputs and n inputs of a layer, r the rank of its update, K vectors of a word, D their width.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from finetune import lycoris
from finetune.errors import UserError, brief
from finetune.files import Header, Tensors


@dataclass(frozen=True)
class Update:
    """What is added to one layer's weight: `scale * up @ down`.

    The scale is kept apart, as the file had it: folding it in is exact in float32 but
    rounds in half precision, and a file that is only translated should not change.
    """

    down: Tensor  # (r, n), or (r, n, k, k) of a convolution
    up: Tensor  # (m, r), or (m, r, 1, 1)
    scale: float = 1.0  # alpha / r
    magnitude: Tensor | None = None  # (m,), the length of each row of the sum of weight and update: DoRA (2402.09353)
    kind: str = "LoRA"

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def alpha(self) -> float:
        return self.scale * self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """`up` (m, r) and `down` (r, n * k * k) with the scale folded in, float32."""
        folded = self.folded()
        return folded.up.float().flatten(1), folded.down.float().flatten(1)

    def folded(self) -> Update:
        """The same with a scale of 1, in float32.

        A power of two goes into `down`, where it is exact: half of the scale in each
        factor keeps both within half precision's range.
        """
        if self.scale == 1:
            return self
        half = 2.0 ** round(math.log2(abs(self.scale)) / 2) if self.scale else 1.0
        return replace(self, down=self.down.float() * half, up=self.up.float() * (self.scale / half), scale=1.0)

    def energy(self) -> float:
        """The squared norm of the update, from the factors alone."""
        up, down = (factor.double() for factor in self.factors())
        return float(((up.T @ up) * (down @ down.T)).sum())

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.down, self.up, self.magnitude) if tensor is not None]


@dataclass(frozen=True)
class AdapterWeights:
    """Low-rank updates by part of the pipeline and by the layer's name in diffusers.

    CLIP's layers have the names that transformers had before 5.6 (`text_model.…`), as files do.
    """

    parts: dict[str, dict[str, Update]]
    architecture: str | None  # sd1, sd2, sdxl, sd3, flux, z_image; None where the file does not tell
    header: Header = field(default_factory=dict)

    def updates(self) -> Iterator[tuple[str, str, Update]]:
        """(part, layer, update)."""
        for part, layers in self.parts.items():
            for name, update in layers.items():
                yield part, name, update

    @property
    def kind(self) -> str:
        """LoRA, DoRA, LoHa, LoKr, or several."""
        return " + ".join(sorted({update.kind for *_, update in self.updates()}))

    @property
    def dtype(self) -> torch.dtype:
        return Counter(update.down.dtype for *_, update in self.updates()).most_common(1)[0][0]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for part, name, update in self.updates():
            for tensor in update.tensors():
                yield f"{part}.{name}", tensor


@dataclass(frozen=True)
class WordVectors:
    """The vectors of one word for each text encoder that it was learnt for."""

    word: str
    vectors: dict[str, Tensor]  # clip_l, clip_g, t5, qwen3 -> (K, D)
    architecture: str | None
    header: Header = field(default_factory=dict)

    kind = "embedding"

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.vectors.values())).dtype

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.vectors.items()


Content = AdapterWeights | WordVectors

ROLES = {
    **{
        f"{joint}{end}": role
        for role, names in {
            "down": (".lora_down", ".lora_A", ".lora_A.default", ".lora.down", ".lora_linear_layer.down", "_lora.down"),
            "up": (".lora_up", ".lora_B", ".lora_B.default", ".lora.up", ".lora_linear_layer.up", "_lora.up"),
            "mid": (".lora_mid",),
        }.items()
        for joint in names
        for end in (".weight",)
    },
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    **{f".lora_magnitude_vector{end}": "magnitude" for end in ("", ".weight", ".default.weight")},
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "t1", "w2", "w2_a", "w2_b", "t2")},
}
ENDING = re.compile("(" + "|".join(re.escape(ending) for ending in sorted(ROLES, key=len, reverse=True)) + ")$")
# Changes of biases and norms, and those of them that are differences, so that zeros change nothing.
NO_FACTOR = re.compile(r"\.(diff|diff_b|bias|scale)$")
DIFFERENCE = re.compile(r"\.(diff|diff_b|lora_B\.bias)$")
Roles = dict[str, Tensor]


def is_adapter(names: Mapping[str, object]) -> bool:
    """Whether some names end as the factors of an adapter do."""
    return any((found := ENDING.search(name)) is not None and ROLES[found[0]] != "alpha" for name in names)


def by_layer(tensors: Tensors) -> dict[str, Roles]:
    """Each layer's tensors by what they are.

    Raises:
        UserError: a tensor is no part of a low-rank adapter.
    """
    layers: dict[str, Roles] = {}
    strange = []
    for name, tensor in tensors.items():
        found = ENDING.search(name)
        if found is not None:
            layers.setdefault(name[: found.start()], {})[ROLES[found[0]]] = tensor
        elif DIFFERENCE.search(name) is None or tensor.any():
            strange.append(name)
    if strange:
        example = repr(strange[0])
        if all(NO_FACTOR.search(name) for name in strange):
            example += ": it changes biases or norms, too"
        raise UserError(
            f"{len(strange)} of {len(tensors)} tensors are no part of a low-rank adapter, such as {example}"
        )
    return layers


def to_update(name: str, roles: Roles, kernel: int = 0) -> Update:
    """One layer's tensors as an update; `kernel` is the side of its convolution where names alone tell.

    Raises:
        UserError: factors are missing, or do not fit each other.
    """
    for role, tensor in roles.items():
        if role != "alpha" and not tensor.is_floating_point():
            raise UserError(f"{name}: {role} holds {str(tensor.dtype).removeprefix('torch.')}, and not real numbers")
    try:
        (up, down), rank, kind = _factors(roles)
        if kernel and kind in ("LoHa", "LoKr"):
            up, down = lycoris.as_convolution((up, down), kernel)
    except KeyError as error:
        raise UserError(f"{name}: {error.args[0]} is missing beside {', '.join(sorted(roles))}") from None
    except UserError as error:
        raise UserError(f"{name}: {problem}" for problem in error.problems) from None
    except (RuntimeError, LookupError, TypeError, ArithmeticError):
        shapes = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in sorted(roles.items()))
        raise UserError(f"{name}: factors that do not fit each other: {shapes}") from None
    fits = up.ndim == down.ndim and up.ndim in (2, 4) and 0 not in up.shape + down.shape
    if not fits or up.shape[1] != len(down) or up[0, 0].numel() != 1:
        raise UserError(f"{name}: factors that do not fit each other: {tuple(up.shape)} times {tuple(down.shape)}")
    alpha = roles.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex() or not bool(alpha.float().isfinite())):
        raise UserError(f"{name}: alpha is not one number but {brief(alpha.flatten()[:9].tolist())}")
    scale = 1.0 if alpha is None or rank is None else float(alpha) / rank
    magnitude = None if "magnitude" not in roles else _magnitude(name, roles["magnitude"], len(up))
    kind = kind if magnitude is None else "DoRA" if kind == "LoRA" else f"{kind} with DoRA"
    return Update(down, up, scale, magnitude, kind)


def _factors(roles: Roles) -> tuple[lycoris.Factors, int | None, str]:
    """(up, down), the rank that alpha is divided by, and what it is called."""
    if any(role.startswith("hada_") for role in roles):
        return *lycoris.from_hadamard(roles), "LoHa"
    if any(role.startswith("lokr_") for role in roles):
        return *lycoris.from_kronecker(roles), "LoKr"
    up, down = roles["up"], roles["down"]
    return (up, lycoris.from_tucker(roles["mid"], down) if "mid" in roles else down), len(down), "LoRA"


def _magnitude(name: str, magnitude: Tensor, num_outputs: int) -> Tensor:
    """(m,). peft keeps it flat or as (1, m, 1, 1), kohya as (m, 1, ...); LyCORIS has one of the inputs, too."""
    outputs = (
        magnitude.numel() == num_outputs
        and magnitude.ndim in (1, 2, 4)
        and (
            magnitude.ndim == 1
            or num_outputs in (magnitude.shape[0], magnitude[0].numel() if magnitude.ndim == 4 else -1)
        )
    )
    if not outputs:
        raise UserError(
            f"{name}: a DoRA magnitude of shape {tuple(magnitude.shape)} for {num_outputs} outputs; "
            "only magnitudes of the outputs are known to peft and diffusers"
        )
    return magnitude.flatten()


def in_precision(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """All tensors in one precision, but single numbers, and the lengths of a DoRA.

    A length is one of the whole weight: rounded, it is off by a share of that and not of its update.
    """
    exact = {name for name in tensors if (found := ENDING.search(name)) and ROLES[found[0]] == "magnitude"}
    return {
        name: value if value.ndim == 0 else value.to(torch.float32 if name in exact else dtype)
        for name, value in tensors.items()
    }


def not_finite(content: Content) -> list[str]:
    """The layers, or an embedding's encoders, that hold NaN or infinity."""
    return sorted({name for name, tensor in content.tensors() if not bool(tensor.isfinite().all())})


def check_finite(content: Content) -> None:
    """Raises: UserError when a tensor holds NaN or infinity."""
    if broken := not_finite(content):
        raise UserError(f"{len(broken)} layers hold NaN or infinity, such as {broken[0]}: the training diverged")
