"""The algorithm of `dk.sample`, and the file that each line lives in.

    plan = the model with checked options          plan.py, config.py (options), parity.py, schedules.py
    canvases = prompts with masks behind them      prompts.py
    while rows wait or are in flight:              loop.py; graph_loop.py where steps are CUDA graphs
        admit rows: pages of the cache, tensors    slots.py
        view = the positions that a forward sees   views.py
        output = model(ids, view)                  step.py, runner.py
        canvas <- what the rule accepts            step.py; the rule: ../rule.py, csrc/core/acceptance.h
        rows go on to their next block, or end     loop.py
    SampleOutput                                   output.py

api.py has the public functions, choose.py and canvas_control.py those for single positions; prefix_cache.py
carries keys and values from call to call.
plain_loop.py is the same without caches, batches and operators: a specification to read, and the oracle of
the tests.
"""
