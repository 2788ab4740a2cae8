"""The masked autoencoder: the student of SdAE and, with pixels as output, MAE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdae.models.encoder import Block, Encoder, LayerNorm, gather, init_xavier, run_blocks, sincos_positions
from sdae.models.linear import speed_up
from sdae.sections import Model


class MaskedAutoencoder(Encoder):
    """Encoder on the visible tokens, light decoder over all of them; predicts the asked masked tokens only.

    The decoder's tokens keep noise order (cls, visible, masked) with their positions gathered along: attention does not
    mind the order, so nothing is unshuffled, and the masked tokens are one slice.
    """

    def __init__(self, model: Model, image_size: int, outputs: int):
        super().__init__(model, image_size)
        assert model.decoder_dim and model.decoder_heads and model.decoder_depth is not None
        width = model.decoder_dim
        self.pos_embed.requires_grad_(False)  # fixed sin-cos
        self.decoder_embed = nn.Linear(self.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(width, self.side), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(width, model.decoder_heads, 4.0, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(model.decoder_depth)
        )
        self.decoder_norm = LayerNorm(width)
        self.decoder_pred = nn.Linear(width, outputs)
        speed_up(self)

    def decode(self, encoded: Tensor, visible: Tensor, masked: Tensor, used: int) -> Tensor:
        """Predicts the first `used` tokens of the masked list: (B, used, outputs). encoded: (B, 1 + visible, D)."""
        x = self.decoder_embed(encoded)
        positions = gather(self.decoder_pos_embed, torch.cat([visible, masked], dim=1) + 1)
        hidden = self.mask_token.to(x.dtype).expand(x.shape[0], masked.shape[1], -1)
        rest = torch.cat([x[:, 1:], hidden], dim=1) + positions
        x = torch.cat([x[:, :1] + self.decoder_pos_embed[:, :1], rest], dim=1)
        wanted = slice(1 + visible.shape[1], 1 + visible.shape[1] + used)
        last = len(self.decoder_blocks) - 1
        factors = [(None, wanted if i == last else None) for i in range(last + 1)]
        x = run_blocks(self.decoder_blocks, x, factors, self.checkpointing)
        return self.decoder_pred(self.decoder_norm(x if last >= 0 else x[:, wanted]))  # type: ignore[no-any-return]

    def predict(self, patches: Tensor, visible: Tensor, masked: Tensor, used: int, drop: Tensor | None) -> Tensor:
        """patches (B, L, C p^2) -> (B, used, outputs)."""
        return self.decode(self.encode(self.embed(patches, visible), drop), visible, masked, used)

    def init_weights(self) -> None:
        self.init_sincos()
        init_xavier(self)
        # after the walk over all Linears: the patch projection is a convolution and keeps its own rule
        nn.init.normal_(self.mask_token, std=0.02)

    def encoder_state(self) -> dict[str, Tensor]:
        """The encoder's weights alone, under timm's names."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(("decoder_", "mask_token"))}
