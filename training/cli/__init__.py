"""The options of `dmpt-export train`, the checks they need, and ready-made recipes."""
