"""Reading the coverage table: which parameter is trained how, and what is refused.

python docs/gallery/coverage.py
"""

import torch
from own_lstm import SYMBOLS, CharacterModel
from torch import nn

from kfacrnn import KFAC
from kfacrnn.nn import convert
from kfacrnn.predictive import Categorical


class Scale(nn.Module):
    """A layer of one's own, of which K-FAC knows nothing."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * x


class Scaled(CharacterModel):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale(128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.scale(self.lstm(self.embedding(tokens))[0]))


class Tied(CharacterModel):
    """The logits from the embedding itself."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(128, 32)
        self.decoder = nn.Linear(32, len(SYMBOLS))
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.narrow(self.lstm(self.embedding(tokens))[0]))


def refusal(model: nn.Module) -> str:
    try:
        KFAC(model, "option1", loss_scale=50)
    except ValueError as error:
        return str(error)
    raise AssertionError("was not refused")


def main() -> None:
    # A row per Fisher block. The four gates of an LSTM are four blocks: they share the A side, of inputs, hidden state
    # and a constant 1 for the biases, 32 + 128 + 1; each has a G side of its own. The embedding's A is diagonal: its
    # inputs are one-hot.
    model = convert(CharacterModel())
    optimizer = KFAC(model, "option1", loss_scale=50)
    print(optimizer.coverage(), "\n")

    # Logits are recognised in the first statistics pass. Their gradients are uncorrelated over time, so the block needs
    # no lag factors, whatever the approximation, and is trained as by "indep".
    tokens = torch.randint(len(SYMBOLS), (50, 16))
    optimizer.update_statistics(lambda: Categorical(logits=model(tokens)))
    print(optimizer.coverage(), "\n")

    # What no block covers is an error that names it; or it follows the plain gradient, if that is asked for.
    scaled = convert(Scaled())
    print("refused:", refusal(scaled), "\n")
    print(KFAC(scaled, "option1", loss_scale=50, fallback="gradient").coverage(), "\n")

    # A weight that embedding and decoder share is one block, the sum of two: both rows say how large their factors are.
    print(KFAC(convert(Tied()), "option1", loss_scale=50).coverage(), "\n")

    # torch's own LSTM does not show its pre-activations.
    print("refused:", refusal(CharacterModel()), "\n")

    model.embedding.weight.requires_grad_(False)
    print(KFAC(model, "option1", loss_scale=50).coverage())


if __name__ == "__main__":
    main()
