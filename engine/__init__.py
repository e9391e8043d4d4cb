"""Runs plans: requests in, tokens out.

Owns requests and their sequences, the scheduler, drafters, acceptance rules, samplers, stops, streaming text, and the
executor. What always holds: slots are touched only through the ledger and only as a verified binding says; one
request's failure ends that request alone; tokens with `coupled` acceptance do not depend on drafter, width or batch.
"""
