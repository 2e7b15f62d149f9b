"""Quality, speed and comparison of models; plain GPT-2 and DMPT use the same code."""
