"""From a request body to a request that is ready for the engine.

    body ──▶ prompts as token ids ──▶ SamplingParams (ranges), output limit ──▶ PreparedRequest (an engine request for each prompt)
"""
from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from functools import partial

from minivllm.engine.prompts import check_num_logprobs, check_vocabulary, truncate
from minivllm.engine_request import EngineRequest
from minivllm.errors import InvalidInput
from minivllm.server.chat import ChatPreprocessor
from minivllm.server.chat_protocol import ChatRequest
from minivllm.server.cost import check_choices, check_entries, check_repeated, check_tokenized, check_tokens
from minivllm.server.errors import context_error
from minivllm.server.formatters import PreparedRequest
from minivllm.server.frontend import Frontend
from minivllm.server.output_spec import OutputSpec
from minivllm.server.protocol import CompletionRequest, EngineBody, GenerationRequest

DEFAULT_OUTPUT = 16  # tokens of a completion without max_tokens; a chat's answer may fill the context


class Preprocessor:
    """Prepares the requests of one server."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._max_model_len = frontend.client.info.max_model_len
        self._chat = ChatPreprocessor(frontend.config, frontend.tokenizer, self._max_model_len)

    async def completion(self, body: CompletionRequest, owner: str) -> PreparedRequest:
        ignored = body.ignored_fields(self._frontend.config.permissive)
        body.check()
        self._frontend.check_model(body.model)
        check_choices(len(body.prompt), body.n or 1, self._frontend.config.max_choices)
        every = await self.encode(body.prompt, owner, param="prompt", add_special_tokens=body.add_special_tokens is not False,
                                  keeps_end=body.truncate_prompt_tokens is not None)
        prompts = [self._truncated(body, prompt, DEFAULT_OUTPUT) for prompt in every]
        echo = await self._echo(body, prompts, owner) if body.echo else None
        prepare = partial(self._prepared, "cmpl-", owner, body, prompts, ignored, default_output=DEFAULT_OUTPUT, echo=echo)
        return await self._frontend.handle(owner, body.size, prepare)

    async def chat(self, body: ChatRequest, ignored: list[str], prefix: str, owner: str) -> PreparedRequest:
        """`prefix`: of the response's id. Appends to `ignored`."""
        body.check()
        self._frontend.check_model(body.model)
        check_choices(1, body.n or 1, self._frontend.config.max_choices)
        self._chat.check_choice(body)
        prompt, output = await self.chat_prompt(body, ignored, owner)
        prompts = [self._truncated(body, prompt, None)]
        prepare = partial(self._prepared, prefix, owner, body, prompts, ignored, default_output=None, output=output)
        return await self._frontend.handle(owner, body.size, prepare)

    async def chat_prompt(self, body: ChatRequest, ignored: list[str], owner: str) -> tuple[list[int], OutputSpec | None]:
        tokenizer = self._frontend.need_tokenizer("messages")
        return await self._frontend.workers.run(owner, body.size, lambda: self._chat.prompt(body, tokenizer, ignored))

    async def encode(
        self, prompts: Sequence[str] | Sequence[list[int]], owner: str, *, param: str, add_special_tokens: bool, keeps_end: bool,
    ) -> list[list[int]]:
        """The token ids of each prompt. param: its field. keeps_end: it will be truncated, so a text may be longer than the context."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if not texts:
            token_ids = [prompt for prompt in prompts if not isinstance(prompt, str)]
            for prompt in token_ids:
                check_vocabulary(param, prompt, self._frontend.client.info.vocab_size)
            return token_ids
        tokenizer = self._frontend.need_tokenizer(param)
        encode = partial(tokenizer.encode, add_special_tokens=add_special_tokens)

        def tokenize() -> list[list[int]]:
            for text in texts:
                if keeps_end:
                    check_tokenized(len(text), self._max_model_len, param, "characters")
                else:
                    check_tokens(text, encode, self._max_model_len, param)
            return [encode(text) for text in texts]

        return await self._frontend.tokenize(owner, sum(map(len, texts)), tokenize)

    async def _echo(self, body: CompletionRequest, prompts: Sequence[Sequence[int]], owner: str) -> tuple[str, ...]:
        """The text of each prompt."""
        if isinstance(body.prompt[0], str) and body.truncate_prompt_tokens is None:
            texts = tuple(prompt for prompt in body.prompt if isinstance(prompt, str))
        else:
            decode = partial(self._frontend.need_tokenizer("echo").decode, skip_special_tokens=body.skip_special_tokens is not False)
            texts = await self._frontend.tokenize(owner, sum(map(len, prompts)), lambda: tuple(map(decode, prompts)))
        check_repeated(body.n or 1, sum(map(len, texts)), "characters", "echo")
        return texts

    def _truncated(self, body: GenerationRequest, prompt: Sequence[int], default_output: int | None) -> Sequence[int]:
        limit, _ = body.output_limit()
        return truncate(prompt, body.truncate_prompt_tokens, self._max_model_len, default_output if limit is None else limit)

    def _prepared(
        self, prefix: str, owner: str, body: GenerationRequest, prompts: Sequence[Sequence[int]], ignored: Sequence[str], *,
        default_output: int | None, echo: tuple[str, ...] | None = None, output: OutputSpec | None = None,
    ) -> PreparedRequest:
        frontend = self._frontend
        frontend.check_alive()  # the engine may have died since the body was read
        request_id, engine_id, salt = self.identity(prefix, body, owner)
        now = time.monotonic()
        self._check_logprobs(body)
        structure = body.structure()
        defaults = frontend.defaults if structure is None else {**frontend.defaults, "structured_outputs": structure}
        requests = []
        for i, prompt in enumerate(prompts):
            params = body.sampling(defaults, self._max_tokens(body, len(prompt), default_output))
            requests.append(EngineRequest(
                request_id=engine_id if len(prompts) == 1 else f"{engine_id}-{i}", prompt_token_ids=tuple(prompt),
                params=params if output is None else output.apply(params),
                priority=body.priority or 0, cache_salt=salt, arrival_time=now, owner=owner,
                lora_request=frontend.lora_request(body.model),
            ))
        self._check_entries(requests)
        if body.return_token_ids:
            check_repeated(body.n or 1, sum(map(len, prompts)), "token ids", "return_token_ids")
        options = body.stream_options
        return PreparedRequest(
            id=request_id, owner=owner, created=int(time.time()), model=frontend.check_model(body.model), fingerprint=frontend.fingerprint,
            prompts=tuple(requests), stream=bool(body.stream), include_usage=options is not None and bool(options.include_usage),
            continuous_usage=options is not None and bool(options.continuous_usage_stats),
            return_token_ids=bool(body.return_token_ids), return_prompt_logprobs=body.prompt_logprobs is not None, echo=echo,
            ignored=tuple(ignored), output=output,
        )

    def identity(self, prefix: str, body: EngineBody, owner: str) -> tuple[str, str, str | None]:
        """(the response's id, its id in the engine, salt of the prefix cache). Checks the priority."""
        frontend = self._frontend
        if body.priority and frontend.client.info.scheduling_policy != "priority":
            raise InvalidInput("priority has no effect on this server: leave it out, or start the server with --scheduling-policy priority",
                               "priority")
        response_id = prefix + (body.request_id or uuid.uuid4().hex)
        engine_id = f"{owner}:{response_id}" if owner else response_id  # ids belong to an owner
        salt = f"{owner}:{body.cache_salt or ''}" if owner and not frontend.config.share_prefix_cache else body.cache_salt
        return response_id, engine_id, salt

    def _check_entries(self, requests: Sequence[EngineRequest]) -> None:
        params, prompts = requests[0].params, [request.prompt_token_ids for request in requests]
        vocabulary = self._frontend.client.info.vocab_size
        wanted = {name: vocabulary if count == -1 else count
                  for name in ("logprobs", "prompt_logprobs") if (count := getattr(params, name)) is not None}
        if wanted:
            prompt_tokens = params.n * sum(map(len, prompts)) if "prompt_logprobs" in wanted else 0  # each choice repeats them
            tokens = max(request.params.max_tokens or 0 for request in requests) if "logprobs" in wanted else 0
            check_entries(len(requests) * params.n, tokens, max(wanted.values()), prompt_tokens, self._max_model_len, next(iter(wanted)))

    def _check_logprobs(self, body: GenerationRequest) -> None:
        """Under the names that this endpoint has for them. (In a chat, `logprobs` is true or false.)"""
        info = self._frontend.client.info
        for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
            if type(count := getattr(body, name, None)) is int:
                check_num_logprobs(name, count, info.vocab_size, info.max_logprobs)

    def _max_tokens(self, body: GenerationRequest, prompt_tokens: int, default: int | None) -> int:
        """The output limit for one prompt: the requested one if it fits, else the default or what is left of the context."""
        context = self._max_model_len
        requested, field = body.output_limit()
        prompt = "messages" if isinstance(body, ChatRequest) else "prompt"
        if prompt_tokens == 0:
            raise InvalidInput("the prompt is empty: send at least one token", prompt)
        if requested is not None:
            if prompt_tokens + requested > context:
                raise context_error(prompt_tokens, context, prompt, requested, field)
            return requested
        room = context - prompt_tokens
        if room < 1:
            raise context_error(prompt_tokens, context, prompt)
        return room if default is None else min(default, room)
