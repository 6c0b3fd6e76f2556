"""The OpenAI-compatible HTTP server. It reaches the engine only through `EngineClient`.

    run.py         from settings to a listening server: port, engine, readiness
    listen.py      uvicorn, and how it ends
    app.py         the application: which path does what
    protocol.py    what a request may say, strictly
    generation.py  a request on its way: prompts out, deltas in, bytes to the client
    answers.py     deltas as the JSON of the two generation endpoints, whole or streamed
    logprobs.py    log-probabilities in OpenAI's two formats
    errors.py      every failure as {"error": {message, type, param, code}}
    door.py        keys, request ids

FastAPI, pydantic and uvicorn are imported here and nowhere else, so the engine runs without them.
"""
