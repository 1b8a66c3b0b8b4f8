"""A model on its way between electrax and another format."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from electrax.config import UserError
from electrax.models.encoder import EncoderConfig
from electrax.models.heads import HeadStyle
from electrax.tasks.base import Params

CONSTANT = "a constant, not a weight"
THE_SAME = "the same as "  # another tensor
# tensors that no parameter here is made of, and why
NOT_NEEDED = (
    (r"(\w+\.)?embeddings\.(position_ids|token_type_ids)", CONSTANT),
    (r"(bert\.)?pooler\.dense\.\w+", "the pooler, which only next-sentence prediction was trained with"),
    (r"cls\.seq_relationship\.\w+", "next-sentence prediction"),
    (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", CONSTANT),
)
AGAIN = {  # tied tensors that some files hold a second time
    "generator_lm_head.weight": "word_embeddings.weight",
    "cls.predictions.decoder.weight": "word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.weight": "wte.weight",
}


@dataclass(frozen=True)
class Head:
    """What the outputs of a fine-tuned model are."""

    task: Literal["classify", "tag", "answer"]
    kind: Literal["classes", "labels", "number", "choice"] = "classes"
    style: HeadStyle | Literal["joint", "plain"] = "linear"
    classes: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        if self.task == "answer":
            return 2
        return 1 if self.kind in ("number", "choice") else len(self.classes)


@dataclass(frozen=True)
class Model:
    """Towers and what stands on them. Pretraining has `encoder` for the discriminator (None in a masked LM alone) and
    `generator`; a fine-tuned model has `encoder` and `head`. `params` is the tree that electrax keeps of such a model.
    """

    params: Params
    encoder: EncoderConfig | None
    generator: EncoderConfig | None = None
    head: Head | None = None
    used: tuple[str, ...] = ()  # tensors of the source
    left_out: Mapping[str, str] = field(default_factory=dict)  # and why

    @property
    def separate_embeddings(self) -> bool:
        return "generator_embeddings" in self.params

    def report(self, source: str) -> dict[str, Any]:
        """What became of every tensor of the source."""
        return {"from": source, "used": list(self.used), "left_out": dict(self.left_out)}


def account(tensors: Mapping[str, np.ndarray], used: Iterable[str], source: str) -> dict[str, str]:
    """The tensors that were not used, and why. Raises UserError where there is no reason, or where an output layer is
    not the word table that it is tied to in electrax."""
    left_out, unknown = {}, []
    for name in tensors.keys() - set(used):
        reason = next((reason for pattern, reason in NOT_NEEDED if re.fullmatch(pattern, name)), None)
        twin = next((other for other in tensors if name in AGAIN and other.endswith(AGAIN[name])), None)
        if twin:
            if not np.array_equal(tensors[name], tensors[twin]):
                raise UserError(f"{source}: {name} is not {twin}; electrax has these two in one")
            reason = f"{THE_SAME}{twin}"
        if reason:
            left_out[name] = reason
        else:
            unknown.append(name)
    if unknown:
        shown = ", ".join(sorted(unknown)[:5]) + (", …" if len(unknown) > 5 else "")
        raise UserError(f"{source}: {len(unknown)} tensors have no place in the model: {shown}")
    return dict(sorted(left_out.items()))
