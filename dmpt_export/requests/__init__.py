"""Requests of the verbs: one frozen dataclass per verb, whose fields have the names of its command's parameters.

`check()` reports all mistakes that can be found without torch or ONNX: first those in the fields alone (OptionError),
then those in files. It returns what it has read, for `run()`, which does the work. Neither uses click or prints
results; importing a request imports nothing heavy. dmpt_export.cli has the commands; the request of `train` is
training.cli.request.TrainRequest, because `accelerate launch -m training` also uses it.
"""
