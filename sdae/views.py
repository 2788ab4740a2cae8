"""Which tokens the student and the teacher see (paper section 2.2, Fig. 3): full, masked, crop, folds.

Noise is uniform, one value per patch. The patches of lowest noise are visible, in noise order; the others, in noise
order, are the masked list. Every teacher view is a number of tokens from the head of that list, cut into equal folds.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sdae.sections import Teacher


@dataclass(frozen=True)
class View:
    """The teacher's input: `folds` sequences of `length` masked tokens each, or the full picture.

    `used` = folds x length is the number of masked tokens that the loss sees.
    """

    length: int
    folds: int = 1
    full: bool = False

    @property
    def used(self) -> int:
        """Masked patches that some fold sees."""
        return self.length * self.folds

    @classmethod
    def of(cls, teacher: Teacher, masked: int) -> View:
        """The view that a config names, for `masked` = M masked patches. Folds are of floor(M / folds) patches;
        what is left over is seen by no teacher."""
        if teacher.view == "full":
            return cls(masked, full=True)
        tokens = teacher.tokens if teacher.view == "crop" and teacher.tokens else masked
        folds = teacher.folds if teacher.view == "folds" and teacher.folds else 1
        return cls(tokens // folds, folds)


def split(noise: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Ids of the visible (B, visible) and the masked patches (B, L - visible), both in noise order. noise: (B, L)."""
    order = noise.argsort(dim=1)
    return order[:, :visible], order[:, visible:]


def as_rows(tokens: Tensor, folds: int) -> Tensor:
    """(B, folds * n, C) -> (B * folds, n, C): folds are extra batch rows."""
    batch, length, channels = tokens.shape
    return tokens.reshape(batch * folds, length // folds, channels)
