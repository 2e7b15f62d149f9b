"""One module per verb, each with a click command named `command`; checks.py: parameters that several of them have.

A command makes a request of its parameters (dmpt_export.requests), has it checked and run, and prints the result. At
the top a verb's module imports click, the standard library and its request only; everything else is imported inside its
functions, and what is heavy after the request is checked. So `dmpt-export --help` stays quick, a mistake is told in the
first second, and a verb needs only its own extra.
"""
