"""HumanEval: prompts, completions, verdicts and pass@k."""
