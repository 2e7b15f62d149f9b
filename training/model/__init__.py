"""The DMPT: its fields, its tree, the model, its cache, and its initialisation from GPT-2."""
