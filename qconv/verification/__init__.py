"""Whether a build is what it claims: its checksums, its structure, its values, and its distance from the source."""
