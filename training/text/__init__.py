"""From files of text to token ids and windows of them."""
