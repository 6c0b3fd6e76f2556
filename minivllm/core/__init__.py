"""The control plane: decides which sequences run, how many tokens each computes, and in which KV blocks.

It uses the standard library only and imports without PyTorch. Reading order, from the ground up:

    block_math         how many blocks a sequence needs
    block_pool         physical blocks: reference counts, free list, cached blocks
    block_table        one sequence's map from logical to physical blocks; forks and copy-on-write
    prefix_cache       block hashes, and the search for the part of a prompt that is computed already
    offload            KV blocks in CPU memory, and the moves between CPU and device
    kv_manager         all block operations of a sequence, built on block_pool, block_table, prefix_cache and offload
    request            requests, sequences and their counters
    waiting_queue      sequences that wait for a row and blocks, in priority order
    scheduler_config   the settings
    admission          refuses requests that can never fit
    plan               what goes to the worker (StepPlan) and what comes back (StepResult)
    plan_builder       a plan under construction, and the record of a launched plan
    scheduler_state    every unfinished sequence: waiting, running or preempted
    preemption         blocks for a running sequence, if necessary taken from one with lower priority
    step_planner       fills a step: decodes, draft verifications, prompt chunks, waiting sequences
    forks              n > 1 and beam search
    stopping           the stop rule
    step_result        applies a result: confirms tokens, finishes sequences
    scheduler          continuous batching: the public interface to all of this
    invariants         what is true between any two calls, as assertions
    snapshot           a view of the scheduler for a person who watches it
    trace              records all calls of a scheduler and its plans, and replays them
    trace_summary      the summary of a trace: tokens, blocks and waste of each step
    simulate           compares settings on the same requests, with a simulated clock
"""
