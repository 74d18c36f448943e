"""A vision transformer that learns to imagine what it does not see, then what pictures show.

A picture is a sequence of patches. The encoder gets a random quarter of them, a small decoder gets
what it made of them and blanks for the rest, and the loss is how far the blanks are from the pixels
(He et al. 2022). For classification (Dosovitskiy et al. 2021) the encoder reads all patches, and a
linear layer their mean. The pictures are four shapes of random place, size and colours.

    python examples/masked_autoencoder.py
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from _common import compare, console, options, pyplot
from torch import Tensor, nn

import fastseq

SIZE, PATCH, WIDTH, BATCH, SHAPES = 24, 4, 64, 64, 4
PATCHES, SEEN = (SIZE // PATCH) ** 2, (SIZE // PATCH) ** 2 // 4


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patches ``[count, PATCHES, 3 PATCH²]``, a random order of them, and which shape is shown."""
    draw = torch.Generator().manual_seed(seed)
    kind = torch.randint(SHAPES, (count,), generator=draw)
    centre = torch.randint(8, SIZE - 8, (count, 2, 1, 1), generator=draw)
    radius = torch.randint(4, 8, (count, 1, 1), generator=draw)
    y, x = ((torch.arange(SIZE) - c).abs() for c in centre.unbind(1))  # [count, 1, SIZE]
    y, distance = y.mT, (x**2 + y.mT**2).sqrt()
    square, thin = torch.maximum(x, y) <= radius, torch.minimum(x, y) <= 1
    # Disc, square, cross and ring.
    every = distance <= radius, square, square & thin, (distance - radius).abs() < 1.2
    inside = torch.stack(every, 1)[torch.arange(count), kind]
    light, dark = torch.rand(2, count, 3, 1, 1, generator=draw)
    image = torch.where(inside[:, None], 1 - 0.3 * light, 0.3 * dark)
    order = torch.rand(count, PATCHES, generator=draw).argsort(1)
    return F.unfold(image, PATCH, stride=PATCH).mT, order, kind


def layers(depth: int) -> nn.TransformerEncoder:
    """Pre-norm blocks, and a norm behind them."""
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(WIDTH), enable_nested_tensor=False)


class Autoencoder(nn.Module):
    """Encoder of the patches that are seen, decoder of all; and a classifier on the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * PATCH**2, WIDTH)
        self.places = nn.Parameter(torch.randn(2, PATCHES, WIDTH) / 50)  # for each of the two
        self.blank = nn.Parameter(torch.zeros(WIDTH))
        self.encoder, self.decoder = layers(3), layers(1)
        self.pixels, self.head = nn.Linear(WIDTH, 3 * PATCH**2), nn.Linear(WIDTH, SHAPES)
        self.loss = nn.CrossEntropyLoss()

    def imagine(self, image: Tensor, order: Tensor) -> Tensor:
        """All patches, from the first ``SEEN`` of a random ``order [B, PATCHES]`` of them."""
        seen = order[:, :SEEN, None].expand(-1, -1, WIDTH)
        hidden = self.encoder((self.patches(image) + self.places[0]).gather(1, seen))
        blanks = self.blank.expand(len(image), PATCHES, -1)
        return self.pixels(self.decoder(blanks.scatter(1, seen, hidden) + self.places[1]))

    def forward(self, image: Tensor, order: Tensor) -> Tensor:
        """The mean square error of the patches that were not seen."""
        unseen = order[:, SEEN:, None].expand(-1, -1, image.shape[-1])
        return F.mse_loss(self.imagine(image, order).gather(1, unseen), image.gather(1, unseen))

    def logits(self, image: Tensor) -> Tensor:
        """Which shape it is."""
        return self.head(self.encoder(self.patches(image) + self.places[0]).mean(1))


@torch.no_grad()
def save(model: Autoencoder, path: Path) -> None:
    """Eight pictures: what is seen of them, what is imagined, what they are."""
    image, order, _ = pictures(8, -1)
    unseen = torch.zeros(8, PATCHES, 1).scatter(1, order[:, SEEN:, None], 1.0)
    made = torch.lerp(image, model.imagine(image, order).clamp(0, 1), unseen)
    rows = [F.fold(p.mT, SIZE, PATCH, stride=PATCH) for p in (image * (1 - unseen), made, image)]
    whole = torch.cat([torch.cat(list(row), 2) for row in rows], 1).permute(1, 2, 0)
    pyplot().imsave(path, whole.repeat_interleave(6, 0).repeat_interleave(6, 1).numpy())
    console.print(f"seen, imagined, true: {path}\n")


def main() -> None:
    """Pre-train without labels, fine-tune with them, and judge on new pictures."""
    chosen = options(__doc__)
    model = compare(
        "Imagining hidden patches",
        Autoencoder(),
        lambda model, n: model(*pictures(BATCH, n)[:2]),
        steps=150,
        falls=3.0,
        quick=chosen.quick,
    )
    save(model, chosen.out / "imagined.png")

    def classified(model: nn.Module, n: int) -> Tensor:
        image, _, kind = pictures(BATCH, 1000 + n)
        return model.loss(model.logits(image), kind)

    fresh = fastseq.restore(model)  # torch's modules again, with what was learned
    tuned = compare("Which shape", fresh, classified, steps=200, falls=2.0, quick=chosen.quick)
    image, _, kind = pictures(1000, -3)
    with torch.no_grad():
        right = tuned.logits(image).argmax(-1).eq(kind).float().mean()
    console.print(f"right on new pictures: {right:.1%}")
    assert chosen.quick or right > 0.7


if __name__ == "__main__":
    main()
