"""A row of the table: where each field of a model's specification comes from, and how checkpoints name its modules.

    config.json ── Family.parse ──▶ ModelSpec          model fields, then one LayerSpec per layer

The source of a field is a value, a `Key` of config.json, a function of config.json, or `PerLayer` of a function that gives one
value per layer.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from minivllm.families import config_json
from minivllm.families.config_json import Config, Key, read
from minivllm.families.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, MoESpec


class PerLayer(NamedTuple):
    """A field that differs between layers: config.json -> one value per layer."""

    values: Callable[[Config], Sequence[Any]]


Source: TypeAlias = Any  # a value | Key | Callable[[Config], value] | PerLayer
Fields: TypeAlias = Mapping[str, Source]
# Our module -> a tuple of the checkpoint modules whose rows are stacked, or a function that gives it; {i}: layer number, {h}: head.
Names: TypeAlias = Mapping[str, Source]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture. `model`, `attention`, `mlp`, `moe`: fields of ModelSpec, AttentionSpec, MLPSpec and MoESpec -> their sources."""

    model: Fields
    attention: Fields
    mlp: Fields
    names: Names = field(repr=False)
    block: Source = "pre"
    rope: Fields = field(default_factory=dict)  # options of `config_json.rope`, if `attention` has no rope
    rotated: Source = True  # whether a layer has that rotary embedding
    fixed: tuple[Key, ...] = ()  # keys of config.json that must have their default value
    aliases: Mapping[str, str] = field(default_factory=dict)  # a key of config.json -> this family's name for it
    text_config: bool = False  # the decoder's keys are in config.json's `text_config`; the encoder of images is left out
    moe: Fields = field(default_factory=dict)
    sparse: Source = False  # whether a layer has experts, `moe`, instead of `mlp`

    def variant(
        self, *, model: Fields = {}, attention: Fields = {}, mlp: Fields = {}, names: Names = {}, block: Source = None,  # noqa: B006
        rope: Fields = {}, aliases: Mapping[str, str] = {}, moe: Fields = {}, sparse: Source = None, text_config: bool = False,  # noqa: B006
        rotated: Source = None, fixed: tuple[Key, ...] = (),
    ) -> Family:
        """The same family with some fields and names replaced. The defaults are only read."""
        return Family(model={**self.model, **model}, attention={**self.attention, **attention}, mlp={**self.mlp, **mlp},
                      names={**self.names, **names}, block=self.block if block is None else block,
                      rope={**self.rope, **rope}, rotated=self.rotated if rotated is None else rotated, fixed=self.fixed + fixed,
                      aliases={**self.aliases, **aliases}, moe={**self.moe, **moe},
                      sparse=self.sparse if sparse is None else sparse, text_config=text_config or self.text_config)

    def parse(self, architecture: str, config: Config) -> ModelSpec:
        """The specification that a parsed config.json describes. Raises `ModelError` naming the key."""
        if self.text_config:
            config = {**config, **read(config, Key("text_config", dict))}
        config = {**{ours: config[theirs] for ours, theirs in self.aliases.items() if theirs in config}, **config}
        for key in (Key("is_causal", bool, True), Key("per_layer_config", dict, {}), *self.fixed):
            config_json.check_default(config, key)
        layers = config_json.num_layers(config)
        model = {name: _value(source, config) for name, source in self.model.items()}
        names = {module: _value(source, config) for module, source in self.names.items()}
        attention = dict(self.attention)
        if "rope" not in attention:
            options = {name: _value(source, config) for name, source in {"head": attention["head_dim"], **self.rope}.items()}
            rope, model["max_model_len"] = config_json.rope(config, model["max_model_len"], **options)
            rotated = [rope if layer["rotated"] else None for layer in _by_layer({"rotated": self.rotated}, config, layers)]
            attention["rope"] = PerLayer(lambda _: rotated)
        columns = [_by_layer(fields, config, layers) for fields in (attention, self.mlp, {"block": self.block})]
        sparse = [layer["sparse"] for layer in _by_layer({"sparse": self.sparse}, config, layers)]
        moe = _by_layer(self.moe if any(sparse) else {}, config, layers)
        return ModelSpec(architecture=architecture, dtype=config_json.dtype(config), names=names, layers=tuple(
            LayerSpec(attention=AttentionSpec(**a), mlp=MoESpec(**e) if has_experts else MLPSpec(**m), **b)
            for a, m, b, e, has_experts in zip(*columns, moe, sparse, strict=True)), **model)


def _value(source: Source, config: Config) -> Any:
    if isinstance(source, Key):
        return read(config, source)
    assert not isinstance(source, PerLayer), "a field of the model has one value"
    return source(config) if callable(source) else source


def _by_layer(fields: Fields, config: Config, layers: int) -> list[dict[str, Any]]:
    """Each layer's fields."""
    shared = {name: _value(source, config) for name, source in fields.items() if not isinstance(source, PerLayer)}
    columns = {name: source.values(config) for name, source in fields.items() if isinstance(source, PerLayer)}
    assert all(len(values) == layers for values in columns.values()), "a source of `PerLayer` checks the lists of config.json that it reads"
    return [{**shared, **{name: values[i] for name, values in columns.items()}} for i in range(layers)]
