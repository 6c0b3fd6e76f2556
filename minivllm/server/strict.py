"""The base of every request's classes: a JSON object that ignores no field in silence. `protocol.py` says what the classes are."""
from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from minivllm.errors import InvalidInput, NotSupportedYet, nearest


class Strict(BaseModel):
    """A JSON object whose unknown names are sorted into the four classes by `extras`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    INERT: ClassVar[frozenset[str]] = frozenset()
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = types.MappingProxyType({})

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Unknown fields are refused, unless the server is permissive; the other classes are as good as declared."""
        schema = handler.resolve_ref_schema(handler(core))
        fields = schema.setdefault("properties", {})
        for name in sorted(cls.INERT):
            fields[name] = {"description": "accepted; changes nothing"}
        for name, harmless in sorted(cls.UNSUPPORTED.items()):
            fields[name] = {"enum": [None, *harmless], "description": "not supported: only values that ask for nothing are accepted"}
        schema["additionalProperties"] = False
        return schema

    def extras(self, path: str, permissive: bool) -> list[str]:
        """Names to report as ignored; raises over those that must not be."""
        ignored = []
        for name, value in (self.model_extra or {}).items():
            where = path + name
            if name in self.UNSUPPORTED:
                if value is not None and not any(value == v and type(value) is type(v) for v in self.UNSUPPORTED[name]):
                    raise NotSupportedYet(f"{where} is not supported yet: leave it out", where)
            elif name in self.INERT:
                if value is not None:
                    ignored.append(where)
            elif permissive:
                ignored.append(where)
            else:
                known = [*type(self).model_fields, *self.INERT, *self.UNSUPPORTED]
                raise InvalidInput(f"unknown field {where!r}{nearest(name, known)}", where)
        return ignored
