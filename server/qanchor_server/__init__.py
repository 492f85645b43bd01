"""The Q-Anchor server: gRPC in front, one engine behind, no torch.

The way of a request: service (validate, resolve) -> admission -> worker inbox -> scheduler.plan
-> kv_pool.reserve -> engine -> scheduler.commit -> reply with provenance.
"""
