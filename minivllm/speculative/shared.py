"""What a learned head shares with its target: the embedding table, the final norm and the output head."""
from __future__ import annotations

from torch import Tensor

from minivllm.errors import InvalidInput
from minivllm.layers.norm import RMSNorm
from minivllm.models.decoder import Decoder


def final_norm(target: Decoder) -> RMSNorm:
    """The norm before the output head. Raises `InvalidInput` for a target that no head fits."""
    norm = target.head.norm
    if target.project_out is not None or not isinstance(norm, RMSNorm) or target.spec.learned_positions:
        raise InvalidInput(f"speculative_config: a head needs a target with rotary positions and RMSNorm before its output head, and "
                           f"{target.spec.architecture} has none: use method ngram or draft_model", "speculative_config")
    return norm


def output_rows(target: Decoder, ids: Tensor) -> Tensor:
    """Rows of the output head, without its norm: ids [n] -> [n, hidden] in the model's dtype."""
    build, hidden = target.build, target.spec.hidden_size
    return target.head.dense_weight(hidden, build.device, build.dtype).index_select(0, ids.to(build.device))
