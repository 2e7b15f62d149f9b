"""Exported folders in the lm-evaluation-harness: `python -m benchmarks.lm_eval --model dmpt ...`."""
