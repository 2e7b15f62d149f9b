"""Other runtimes that can run GPT-2, each behind one small adapter."""
