"""The OpenAI-compatible HTTP server. It reaches the engine only through `EngineClient`.

    run.py                    from settings to a listening server: port, engine, readiness
    listen.py                 uvicorn: shutdown, connections; connections.py limits them, tls.py is HTTPS
    app.py                    the application: which path does what
    authentication.py         API keys and request ids
    frontend.py               what all endpoints share
    protocol.py               the request models; chat_protocol.py, tools.py; parsing.py reads a body
    responses.py              /v1/responses: responses_protocol.py, responses_formatter.py; response_store.py keeps its responses
    prepare.py, chat.py       from a request model to engine requests
    generation.py             the response: engine requests out, deltas in, bytes to the client
    formatters.py             deltas as JSON, streamed or complete; parsed_chat.py
    output_spec.py            how an output is parsed, by output_parsers/, and the grammar that keeps it in form
    errors.py                 every failure as {"error": {message, type, param, code}}

FastAPI, pydantic and uvicorn are imported only here, so the engine runs without them.
"""
