"""Several models side by side, and what may be said about them."""
