"""SdAE: a student autoencoder learns to predict the features of a teacher, its moving average (paper section 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdae.config import Pretrain
from sdae.models.autoencoder import MaskedAutoencoder
from sdae.models.encoder import Encoder, patchify
from sdae.objective import cosine_loss, normalize, similarity_axis
from sdae.training.sharding import whole
from sdae.views import View, as_rows, split


class Output(NamedTuple):
    """loss: scalar. prediction and target: (rows, tokens, channels). features: what the target was made of."""

    loss: Tensor
    prediction: Tensor
    target: Tensor
    features: Tensor


class SdAE(nn.Module):
    """Student and teacher. The teacher has its own patch embedding and positions, no stochastic depth, no gradient."""

    def __init__(self, config: Pretrain, view: View | None = None):
        super().__init__()
        method = config.method
        assert method.teacher is not None and method.similarity is not None and config.model.width
        self.view = view or View.of(method.teacher, config.masked)
        self.visible = config.tokens - config.masked
        self.normalize = method.teacher.normalize
        self.axis = similarity_axis(method.similarity, self.view.full)
        self.start_from_student = method.teacher.init == "student"
        self.student = MaskedAutoencoder(config.model, config.data.image_size, config.model.width)
        self.teacher = Encoder(config.model, config.data.image_size).requires_grad_(False)
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    def init_weights(self) -> None:
        """The student's as MAE's; the teacher's own (timm), or the student's where the config says so."""
        self.student.init_weights()
        if self.start_from_student:
            self.teacher.load_state_dict(self.student.encoder_state())
        else:
            self.teacher.init_timm()

    def forward(self, images: Tensor, noise: Tensor, drop: Tensor | None = None) -> Output:
        """images (B, C, H, W), noise (B, L) uniform, drop (depth, 2, B) stochastic-depth factors of the student."""
        patches = patchify(images, self.student.patch)
        visible, masked = split(noise, self.visible)
        features = self.features(patches, masked)
        prediction = self.student.predict(patches, visible, masked, self.view.used, drop)
        prediction = as_rows(prediction, self.view.folds)
        target = normalize(features.float()) if self.normalize else features
        return Output(cosine_loss(prediction, target, self.axis), prediction, target, features)

    @torch.no_grad()
    def features(self, patches: Tensor, masked: Tensor) -> Tensor:
        """The teacher's features of the tokens that the loss uses: (B * folds, length, D)."""
        view = self.view
        if view.full:
            return self.teacher.encode(self.teacher.embed(patches), keep=masked + 1)
        tokens = as_rows(self.teacher.embed(patches, masked[:, : view.used]), view.folds)
        return self.teacher.encode(tokens, keep=slice(1, None))

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Eq. (7), for every encoder parameter incl. position and cls, in two foreach calls.

        One call of `_foreach_lerp_` would round otherwise and give the runs of before other bits.
        """
        if self._pairs is None:
            student = dict(self.student.named_parameters())
            names, teacher = zip(*self.teacher.named_parameters(), strict=True)
            self._pairs = (list(teacher), [student[name] for name in names])
        teacher_parameters, student_parameters = self._pairs
        torch._foreach_mul_(teacher_parameters, momentum)
        torch._foreach_add_(teacher_parameters, student_parameters, alpha=1 - momentum)

    @torch.no_grad()
    def teacher_distance(self) -> float:
        """|teacher - student| / |student| over the encoder's parameters."""
        student = dict(self.student.named_parameters())
        gap = sum((p - student[n]).square().sum() for n, p in self.teacher.named_parameters())
        size = sum(student[n].square().sum() for n, _ in self.teacher.named_parameters())
        return float((whole(gap) / whole(size)) ** 0.5)  # type: ignore[arg-type]
