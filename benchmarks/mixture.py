"""Dense, sparse, linear and pruned heads in one plan, and what is lost with each family switched off.

    python -m benchmarks run mixture                        # the shipped model and two trained here; a quarter of an hour
    python -m benchmarks run mixture -- --models diffuse    # one of demo, diffuse, recall
    python -m benchmarks run mixture -- --quick             # short and few, to check the script
    python -m benchmarks run mixture -- --keep              # also benchmarks/results, docs/figures and docs/linear.md

Every model is profiled, its heads' far parts are fitted and tried on the same text, and the planner is asked for the
least damage within shares of dense's cost: of prefill, as timed, or of the cache's bytes. Each plan then runs on
held-out text through the operators that ship. The families that it may use:

    all                 spans, linear, taylor, compensation and pruned heads
    no linear ...       all but one
    spans               sinks and windows alone, as without `attnopt distill`
    spans, mean         sinks and windows, with and without RazorAttention's compensation token

Costs: *timed*, all plans' attentions once more, interleaved, on random numbers; *cache*, bytes of one sequence. A plan
whose operators differ from the definition by more than rounding has no figures.
"""
