"""What a DMPT is: its fields, its tree, the model, its cache, and how GPT-2 becomes one."""
