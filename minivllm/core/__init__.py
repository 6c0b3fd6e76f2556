"""The control plane: who runs, how many tokens, in which blocks. Standard library only; it imports without PyTorch.

Read it from the ground up:

    block_pool      physical blocks: references, the free list, what free blocks still remember
    block_table     one sequence's map from logical to physical blocks; forks and copy-on-write
    prefix_cache    names of blocks (chained hashes) and how a prompt finds what is already computed
    host_tier       blocks in host memory, and moves under way
    kv_manager      one sequence's life in blocks, made of the four above
    request         requests, sequences and their counters
    waiting_queue   who waits, in order
    roster          everybody's place: queue, row, or gone
    admission       settings, and the door
    plan            what goes down to the workers and comes back up
    plan_builder    a plan while it is written, and what is remembered of it
    stopping        when a sequence ends
    scheduler       continuous batching: schedule() and update()
    invariants      what is always true, as assertions
    trace ...       recording, replaying and comparing
"""
