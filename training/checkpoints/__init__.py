"""Model folders on disk: reading GPT-2 and DMPT, writing DMPT, and reading other projects' files."""
