"""Whether DMPT pays: models of a few million parameters, trained on the same tokens, from one command."""
