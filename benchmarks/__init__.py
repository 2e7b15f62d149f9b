"""Quality, speed and comparison of models: plain GPT-2 and DMPT through the same doors."""
