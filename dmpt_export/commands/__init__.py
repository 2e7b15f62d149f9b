"""One module per verb, each with a click command named `command`.

At the top a verb's module imports click, the standard library and `dmpt_export.extras` only; everything else
is imported inside its functions, so `dmpt-export --help` stays quick and a verb needs only its own extra.
"""
