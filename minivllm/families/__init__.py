"""Model families as a table: config.json -> `ModelSpec`, and what follows from it. Standard library only.

    config.json --parse_config: the row of its architecture--> ModelSpec --linear_specs, tensor_specs--> sizes, checkpoint names
                                                                         --kv_groups--> which layers share a block table

There is one decoder (`models/decoder.py`). A family, such as Qwen3, is a row of this table (docs/adding_a_model.md). The loader, the
layers and the memory planner read this package. The planner must run without torch.
"""
from minivllm.families.config_json import Config, Key, read
from minivllm.families.family import Family, PerLayer
from minivllm.families.modules import (
    ExpertsSpec,
    LinearSpec,
    TensorSpec,
    active_weights,
    embedding_spec,
    expert_specs,
    head_order,
    linear_specs,
    row_order,
    tensor_specs,
)
from minivllm.families.spec import (
    AttentionSpec,
    KVGroup,
    LatentSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    RopeSpec,
    kv_groups,
    num_kv_tensors,
)
from minivllm.families.table import FAMILIES, parse_config

__all__ = [
    "FAMILIES", "AttentionSpec", "Config", "ExpertsSpec", "Family", "KVGroup", "Key", "LatentSpec", "LayerSpec", "LinearSpec", "MLPSpec",
    "MoESpec", "ModelSpec", "PerLayer", "RopeSpec", "TensorSpec", "active_weights", "embedding_spec", "expert_specs", "head_order",
    "kv_groups", "linear_specs", "num_kv_tensors", "parse_config", "read", "row_order", "tensor_specs",
]
