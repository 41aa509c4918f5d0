"""Safetensors checkpoints in and out: headers, shards, index, Hub access."""
