"""The request models of embeddings and scores."""
from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from minivllm.errors import InvalidInput
from minivllm.sampling_params import PoolingParams
from minivllm.server.protocol import NO_EFFECT, EngineBody, PromptField


class PoolingRequest(EngineBody):
    """The fields that embeddings and scores share."""

    truncate_prompt_tokens: int | None = None  # keep only the last so many tokens of each text; -1: as many as the context holds
    add_special_tokens: bool | None = None  # put a BOS token in front of a text, if the model uses one
    pooling_type: Literal["LAST", "MEAN"] | None = None  # the last token's hidden state, or their mean; default: the server's

    INERT = NO_EFFECT
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = types.MappingProxyType({
        "truncation_side": ("left",), "mm_processor_kwargs": (), "softmax": (), "activation": ()})

    def params(self) -> PoolingParams:
        return PoolingParams(pooling_type=self.pooling_type, truncate_prompt_tokens=self.truncate_prompt_tokens)


class EmbeddingRequest(PoolingRequest):
    """`POST /v1/embeddings`."""

    input: PromptField  # one text or several, or their token ids
    encoding_format: Literal["float", "base64"] | None = None  # base64: of float32, little-endian
    dimensions: int | None = None  # keep only the first entries of each vector, and scale it to length 1 again
    use_activation: bool | None = None  # false: do not scale vectors to length 1
    normalize: bool | None = None  # older name of use_activation

    UNSUPPORTED = types.MappingProxyType({
        **PoolingRequest.UNSUPPORTED, "messages": (), "embed_dtype": ("float32",), "endianness": ("native", "little")})

    def params(self) -> PoolingParams:
        return PoolingParams(pooling_type=self.pooling_type, truncate_prompt_tokens=self.truncate_prompt_tokens,
                             dimensions=self.dimensions, use_activation=self.use_activation, normalize=self.normalize)


class ScoreRequest(PoolingRequest):
    """`POST /score`: how similar texts are. One text with each of several, or pair by pair."""

    text_1: PromptField | None = None  # one text or several, or their token ids
    text_2: PromptField | None = None  # the texts to compare with
    queries: PromptField | None = None  # another name of text_1
    documents: PromptField | None = None  # another name of text_2
    data_1: PromptField | None = None  # another name of text_1
    data_2: PromptField | None = None  # another name of text_2

    def sides(self) -> tuple[tuple[str, list[Any]], tuple[str, list[Any]]]:
        """The two sides, each with the name of its field."""
        first, second = self._side("text_1", "queries", "data_1"), self._side("text_2", "documents", "data_2")
        if len(first[1]) not in (1, len(second[1])):
            raise InvalidInput(f"{first[0]} has {len(first[1])} texts and {second[0]} has {len(second[1])}: send one, or as many", first[0])
        return first, second

    def _side(self, *names: str) -> tuple[str, list[Any]]:
        found = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        if len(found) != 1:
            raise InvalidInput(f"{names[0]} is required, and {' and '.join(names[1:])} are other names of it: send one of them", names[0])
        return found[0]
