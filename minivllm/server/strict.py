"""The base class of all request models: a JSON object in which no field is silently ignored. `protocol.py` lists the four classes."""
from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from minivllm.errors import NotSupportedYet, UnknownField, unknown_field


class StrictModel(BaseModel):
    """A JSON object. `ignored_fields` sorts names that are no fields of the class into inert, unsupported and unknown."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    _size: int = 0  # bytes of the body
    INERT: ClassVar[frozenset[str]] = frozenset()
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = types.MappingProxyType({})

    @property
    def size(self) -> int:
        """Bytes of the body: no smaller than the characters of all its texts."""
        return self._size

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The schema lists inert and unsupported fields too. Unknown fields must be null unless the server is permissive."""
        schema = handler.resolve_ref_schema(handler(core))
        fields = schema.setdefault("properties", {})
        for name in sorted(cls.INERT):
            fields[name] = {"description": "accepted; has no effect"}
        for name, harmless in sorted(cls.UNSUPPORTED.items()):
            fields[name] = {"enum": [None, *harmless], "description": "not supported: only values that request nothing are accepted"}
        schema["additionalProperties"] = {"type": "null"}
        return schema

    def ignored_fields(self, permissive: bool, path: str = "") -> list[str]:
        """Dotted names to report as ignored, nested models included. Raises for unsupported and unknown ones."""
        ignored = []
        for name, value in (self.model_extra or {}).items():
            where = path + name
            if name in self.UNSUPPORTED:
                if value is not None and not any(value == v and type(value) is type(v) for v in self.UNSUPPORTED[name]):
                    raise NotSupportedYet(f"{where} is not supported yet: leave it out", where)
            elif name in self.INERT:
                if value is not None:
                    ignored.append(where)
            elif permissive or value is None:  # null requests nothing: SDKs write it for every field that is not set
                ignored.append(where)
            else:
                fields = [field.alias or name for name, field in type(self).model_fields.items()]
                known = [*fields, *self.INERT, *self.UNSUPPORTED]
                raise UnknownField(unknown_field(where, name, known), where)
        for where, model in self._nested(path):
            ignored += model.ignored_fields(permissive, where + ".")
        return ignored

    def _nested(self, path: str) -> Iterator[tuple[str, StrictModel]]:
        """Every model in a field or in a list of models, with its dotted name."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, StrictModel):
                yield path + name, value
            elif isinstance(value, list) and value and isinstance(value[0], StrictModel):
                yield from ((f"{path}{name}.{i}", model) for i, model in enumerate(value))
