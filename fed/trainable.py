"""Which parameters of the server's model distillation trains: all, the head, or low-rank additions.

The paper says "fine-tuning" and not which parameters (spec 1.2), so it is a choice.
"""

import dataclasses

from jaxtyping import Array

from fed.models import Model, Params
from quant.lora import Lora


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What is trained.

    Attributes:
      what: full; head (parameters whose first name is in the model's ``head``); lora (``quant.Lora``: W + alpha / rank * A B
        for every matrix).
      rank, alpha: of lora.

    Raises:
      ValueError, TypeError: for another name, or a rank or an alpha that ``quant.Lora`` refuses.
    """

    what: str = "full"
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.what not in ("full", "head", "lora"):
            raise ValueError(f"trainable must be full, head or lora; got {self.what!r}.")
        self._lora()

    def _lora(self) -> Lora:
        return Lora(self.rank, self.alpha)

    def __call__(self, trained: Params, base: Params) -> Params:
        """The model's parameters from the trained ones and those that stay."""
        if self.what == "full":
            return trained
        if self.what == "head":
            return {**base, **trained}
        return self._lora()(base, trained)

    def begin(self, model: Model, params: Params, key: Array) -> tuple[Params, Params]:
        """(trained, base): what distillation changes, and what it leaves alone.

        Raises:
          ValueError: if the model has no such parameters, or for lora one of which it isn't known which axes are its matrix's.
        """
        if self.what == "full":
            return params, {}
        if self.what == "lora":
            try:
                return self._lora().init(params, key), params
            except ValueError as error:
                raise ValueError(
                    f"trainable='lora' does not fit {model.name}: {error} Or take 'full' or 'head'."
                ) from None
        names = [name for name in model.head if name in params]
        if not names:
            raise ValueError(
                f"trainable='head' needs one of the parameters {model.head}; {model.name} has {sorted(params)}; name its "
                "last block in Model.head."
            )
        return {k: v for k, v in params.items() if k in names}, {
            k: v for k, v in params.items() if k not in names
        }
