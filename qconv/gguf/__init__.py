"""GGUF files for llama.cpp: what they hold, which type each tensor gets, and the files themselves."""
