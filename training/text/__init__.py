"""From text files to token ids and evaluation windows."""
