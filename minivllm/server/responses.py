"""The endpoints below `/v1/responses`: create a response, and read or delete a stored one."""
from __future__ import annotations

import dataclasses
import json
from functools import partial

from fastapi import FastAPI, Request
from starlette.responses import Response

from minivllm.errors import InvalidInput, NotSupportedYet
from minivllm.server.authentication import OWNER
from minivllm.server.errors import ApiError, json_response
from minivllm.server.frontend import Frontend
from minivllm.server.generation import GenerationResponse
from minivllm.server.logprobs import NumberedTokens
from minivllm.server.openapi import body_of
from minivllm.server.prepare import Preprocessor
from minivllm.server.response_store import StoredItem, StoredResponse
from minivllm.server.responses_formatter import ResponsesFormatter
from minivllm.server.responses_protocol import Conversation, ResponsesRequest, responses_names

MAX_PAGE = 100  # items of one page of a list


def add_responses(app: FastAPI, frontend: Frontend, preprocessor: Preprocessor) -> None:
    store, names = frontend.responses, frontend.tokenizer or NumberedTokens()

    @app.post("/v1/responses", openapi_extra=body_of(ResponsesRequest))
    async def create(request: Request) -> Response:
        """A chat in OpenAI's newer form, which may continue a stored response."""
        body, owner = await frontend.read(request, ResponsesRequest), request.scope[OWNER]
        ignored = body.ignored_fields(frontend.config.permissive)
        body.check()
        if body.store and not store.max_bytes:
            ignored.append("store")
        earlier: tuple[StoredItem, ...] = ()
        if body.previous_response_id is not None:
            previous = store.get(owner, body.previous_response_id)
            if previous is None:
                raise ApiError(400, f"Previous response with id '{body.previous_response_id}' not found: it was created with store set to "
                                    "false or another key, or it was dropped; send the earlier items instead",
                               param="previous_response_id", code="previous_response_not_found")
            earlier = previous.conversation
        conversation = Conversation(body.instructions, ignored, partial(store.item, owner))
        conversation.read([json.loads(item.content) for item in earlier], body.input)
        with responses_names():
            chat = body.as_chat(conversation)
            chat._size = body.size + sum(len(item.content) for item in earlier)
            prepared = await preprocessor.chat(chat, ignored, "resp_", owner)
        prepared = dataclasses.replace(prepared, ignored=tuple(map(conversation.item_name, prepared.ignored)))
        keep = partial(store.put, owner, earlier=earlier, items=conversation.items) if body.store is not False and store.max_bytes else None
        return GenerationResponse(frontend.client, frontend.running, partial(ResponsesFormatter, prepared, names, body, keep))

    def find(request: Request, response_id: str) -> StoredResponse:
        if request.query_params.get("stream", "false") != "false":
            raise NotSupportedYet("stream is not supported for a response that is complete: leave it out", "stream")
        stored = store.get(request.scope[OWNER], response_id)
        if stored is None:
            raise ApiError(404, f"Response with id '{response_id}' not found.", param="response_id")
        return stored

    @app.get("/v1/responses/{response_id}")
    async def retrieve(request: Request, response_id: str) -> Response:
        """A stored response."""
        return Response(find(request, response_id).body, media_type="application/json")

    @app.delete("/v1/responses/{response_id}")
    async def delete(request: Request, response_id: str) -> Response:
        """Delete a stored response."""
        find(request, response_id)
        return json_response({"id": response_id, "object": "response", "deleted": store.delete(request.scope[OWNER], response_id)})

    @app.get("/v1/responses/{response_id}/input_items")
    async def input_items(request: Request, response_id: str) -> Response:
        """The input of a stored response, in pages: order (asc, desc), limit (1 to 100), after (an item's id)."""
        items = [json.loads(item.content) for item in find(request, response_id).input]
        query = request.query_params
        order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after", "")
        if order not in ("asc", "desc"):
            raise InvalidInput(f"order must be asc or desc, got {order!r}", "order")
        if not limit.isdecimal() or not 1 <= int(limit[:9]) <= MAX_PAGE:
            raise InvalidInput(f"limit must be from 1 to {MAX_PAGE}, got {limit!r}", "limit")
        items = items if order == "asc" else items[::-1]
        ids = [item["id"] for item in items]
        if after and after not in ids:
            raise InvalidInput(f"after must be the id of an item of this list, got {after!r}", "after")
        start = ids.index(after) + 1 if after else 0
        page = items[start:start + int(limit)]
        return json_response({"object": "list", "data": page, "has_more": start + len(page) < len(items),
                              "first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None})
