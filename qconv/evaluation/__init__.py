"""Whether a build is worse than its reference, how sure that is, and where: measuring, statistics, gates."""
