"""What programs, launch lines and environments written for vLLM expect to find, as data.

    settings.py      keywords of LLM(...) and flags of `serve`: inert, refused, or another spelling of a setting of this engine
    imports.py       vLLM's module paths, such as minivllm.v1.engine.async_llm
    engine_args.py   EngineArgs, AsyncEngineArgs, FlexibleArgumentParser
    environment.py   VLLM_* variables

`docs/from_vllm.md` is generated from these tables: `python -m minivllm.compat`.
"""
