"""The measures, each for every single picture, so that means, intervals and the worst case come from the same numbers.

Shapes: N pictures, M photos, D width of an embedding. Embeddings are unit vectors, so a product is a cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor


def identity(pictures: Tensor, photos: Tensor) -> Tensor:
    """How much pictures (N, D) show the subject of the photos (M, D): (N,).

    The mean cosine with every photo: CLIP-I with CLIP's embeddings, DINO with DINO's (2208.12242, section 4.2).
    """
    return (pictures @ photos.T).mean(1)


def ceiling(photos: Tensor, others: Tensor) -> float | None:
    """How alike photos of the subject are to each other: what `identity` finds in pictures of the subject itself.

    Args:
        photos: (M, D), those that pictures are compared with.
        others: (K, D), further real photos.

    Returns:
        The mean cosine of each of `photos` with every other real photo; None of a single one.
    """
    real = torch.cat([photos, others])
    if len(real) < 2:
        return None
    alike = photos @ real.T
    alike[torch.arange(len(photos)), torch.arange(len(photos))] = 0
    return float(alike.sum() / (len(photos) * (len(real) - 1)))


def floor(pictures: Tensor, photos: Tensor, *, is_style: bool = False) -> float:
    """How alike to the photos (M, D) the base's pictures of the class (N, D) are that are nearest to them.

    The mean `identity` of the nearest quarter: others of the class that happen to look like the subject. An adapter
    that is not above it has at best taught which kind of its class the subject is. A style has no class: what is
    nearest to its photos shows the same things, so there the mean is that of all, which show what the style's do.
    """
    found = identity(pictures, photos)
    return float((found if is_style else found.topk(max(1, len(found) // 4)).values).mean())


def following(pictures: Tensor, prompts: Tensor) -> Tensor:
    """How much each picture (N, D) shows its prompt (N, D), in which the class stands for the subject: (N,).

    CLIP-T, the cosine of CLIP's embeddings (2208.12242, section 4.2); a hundredth of CLIPScore (2104.08718) as
    torchmetrics has it.
    """
    return (pictures * prompts).sum(1)


def contrast(pictures: Tensor, prompts: Tensor, own: Tensor) -> Tensor:
    """How much more each picture (N, D) shows its own prompt than the others of the list (P, D): (N,).

    CLIP-T less the mean cosine with the other prompts. What a picture has with all of them falls out: an encoder's
    constant offset, and how far the subject is from what the encoder takes for its class. A fox that no encoder has
    seen lowers CLIP-T in every place; that it stands in the right one shows here.

    Args:
        own: (N,), the number of each picture's prompt.
    """
    alike = pictures @ prompts.T
    mine = alike.gather(1, own[:, None])[:, 0]
    return mine - (alike.sum(1) - mine) / max(1, len(prompts) - 1)


def spread(pictures: Tensor) -> Tensor:
    """How different each of at least two pictures (N, D) is from the others: (N,), the mean of 1 - cosine.

    Its mean is diversity; of pictures of the class, DIV (2208.12242, section 4.4). The paper takes LPIPS for the
    distance, whose network is not at hand everywhere; this takes the encoder's own.
    """
    alike = pictures @ pictures.T
    return 1 - (alike.sum(1) - alike.diagonal()) / (len(pictures) - 1)


def nearest(pictures: Tensor, photos: Tensor) -> tuple[Tensor, Tensor]:
    """The highest cosine of each picture (N, D) with a photo (M, D), and which photo that is: (N,) twice."""
    found = (pictures @ photos.T).max(1)
    return found.values, found.indices


def balance(*shares: float | None) -> float:
    """The harmonic mean of shares, each cut to 0..1, with 0 for none: low as soon as one of them is."""
    cut = [min(max(share or 0.0, 0.0), 1.0) for share in shares]
    return len(cut) / sum(1 / share for share in cut) if all(cut) else 0.0
