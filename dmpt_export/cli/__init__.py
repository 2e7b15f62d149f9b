"""One module per verb, each with a click command named `command`; checks.py: what several of them refuse at once.

At the top a verb's module imports click, the standard library, `dmpt_export.cli.extras` and the checks only; everything
else is imported inside its functions, and what is heavy after the arguments are checked. So `dmpt-export --help` stays
quick, a mistake is told in the first second, and a verb needs only its own extra.
"""
