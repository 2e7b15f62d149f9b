"""Other runtimes for GPT-2, each with a small adapter."""
