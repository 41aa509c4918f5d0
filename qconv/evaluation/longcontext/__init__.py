"""The task ``longcontext``: how far a build is from its reference at each position of a long context."""
