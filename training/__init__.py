"""Model, data, losses and trainer of DMPT. Importing the package imports nothing heavy."""
