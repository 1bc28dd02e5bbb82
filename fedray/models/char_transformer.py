"""A small transformer that names the next character, for sequences as in LEAF's Shakespeare.

Vaswani et al., "Attention is all you need", NeurIPS 2017; the layers of PyTorch, normalised first (Xiong et
al., ICML 2020): two of width 64 with four heads and 128 hidden units. LEAF's own network is an LSTM, whose
FLOPs torch does not count. 85,584 parameters for 80 characters of 80 kinds.
"""

import torch
from torch import Tensor, nn

from fedray.models.spec import Architecture, InputShape, examples_of

TOKENS = 128
"""Different tokens that it embeds: those of Shakespeare (80), or ASCII."""
WIDTH, HEADS, HIDDEN, LAYERS = 64, 4, 128, 2


class CharTransformer(nn.Module):
    """Embedding with learned positions, transformer layers, and a linear layer."""

    def __init__(self, length: int, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, WIDTH))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(LAYERS)
            )
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (n, classes) of what follows sequences, int64 (n, length)."""
        hidden = self.layers(self.embedding(tokens) + self.positions)
        logits: Tensor = self.head(self.norm(hidden[:, -1]))
        return logits


def _build(input_shape: InputShape, num_classes: int) -> nn.Module:
    (length,) = input_shape
    return CharTransformer(length, num_classes)


def _accepts(input_shape: InputShape) -> str | None:
    if len(input_shape) == 1:
        return None
    return f"char_transformer takes sequences of tokens, not {examples_of(input_shape)}"


CHAR_TRANSFORMER = Architecture(
    build=_build,
    accepts=_accepts,
    source="after Vaswani et al., NeurIPS 2017",
    summary="embedding 64, 2 transformer layers (4 heads, 128), fc classes of the last position",
    tokens=TOKENS,
)
